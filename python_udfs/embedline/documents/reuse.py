"""Reuse known vectors of the same text.

They are of this or another version, kept of a deleted row, or lent from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from embedline.catalog.load import load_versions
from embedline.catalog.values import ChunkSet, Pipeline
from embedline.chunking import Chunk
from embedline.core import vectors
from embedline.core.sql_text import quote_ident
from embedline.documents.loans import borrow
from embedline.documents.values import Document, Vector
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.queue import provider_batches


def known_vectors(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> dict[bytes, Vector]:
    """Return the vectors of documents' chunks that need no model, by digest."""
    chunks = {chunk.digest: chunk for document in documents for chunk in document.chunks}
    found = lend_vectors(session, pipeline, list(chunks))
    if pipeline.modality != "text":
        # Loans know contents by their text.
        return found
    if pipeline.version.model.config.provider == "openai":
        lacking = [digest for digest in chunks if digest not in found]
        found |= _batch_answers(session, pipeline, lacking)
    return borrow(session, pipeline, [chunk for digest, chunk in chunks.items() if digest not in found]) | found


def late_vectors(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    """Return vectors of texts that are no longer in an open batch of the provider.

    An answer goes once its vector is stored, so answers are read first.
    """
    found = _batch_answers(session, pipeline, digests)
    return found | lend_vectors(session, pipeline, [digest for digest in digests if digest not in found])


def _batch_answers(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    """Return the vectors that batches of the provider have given of texts, by digest."""
    answers = provider_batches.answers(session, pipeline, digests)
    return {digest: np.frombuffer(vector, dtype="<f4") for digest, vector in answers.items()}


def lend_vectors(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    """Return vectors of chunks of the pipeline with the same content.

    They are not paid for twice. A version whose model gives the same vectors lends, too. A change of the column type or
    of the chunking therefore costs only the new chunks.
    """
    found: dict[bytes, Vector] = {}
    for lender in _lenders(session, pipeline) if digests else ():
        missing = [digest for digest in digests if digest not in found]
        if missing:
            found |= _lend(session, lender, missing)
    missing = [digest for digest in digests if digest not in found]
    if missing and session.scalar(f"SELECT EXISTS (SELECT FROM {pipeline.generated('lent')})"):
        for lender in _lenders(session, pipeline):
            found = _lend_kept(session, lender, missing) | found
    return found


def _lend_kept(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    """Return vectors of replaced chunks whose text may return under another key."""
    if pipeline.version.vectors_valid_from is not None:
        return {}
    rows = session.query(
        f"""
        SELECT DISTINCT ON (l.content_hash) uuid_send(l.content_hash) AS digest, l.vector
        FROM unnest($1::uuid[]) AS w (content_hash) JOIN {pipeline.generated("lent")} AS l USING (content_hash)
        WHERE l.version_id = $2
        """,
        ["text[]", "bigint"],
        [digest.hex() for digest in digests],
        pipeline.version.version_id,
    )
    if not rows:
        return {}
    matrix = vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
    return {bytes(row["digest"]): matrix[i] for i, row in enumerate(rows)}


def keep_vectors(session: Session, pipeline: Pipeline, chunk_set: ChunkSet, chunk_ids: Sequence[int]) -> None:
    """Keep the vectors of chunks that are about to be deleted.

    Keys were moved, and another row may ask for these texts.
    """
    if not chunk_ids:
        return
    schema = vector_schema(session)
    for version in load_versions(session, pipeline.name):
        if version.chunk_set.number == chunk_set.number:
            sent = f"{schema}.{version.version.column_type}_send(v.{quote_ident(version.version.column)})"
            session.query(
                f"""
                INSERT INTO {pipeline.generated("lent")} (version_id, content_hash, vector)
                SELECT $2, c.content_hash, {sent} FROM {version.chunk} AS c
                JOIN {version.vectors} AS v ON v.chunk_id = c.chunk_id WHERE c.chunk_id = ANY ($1)
                """,
                ["bigint[]", "bigint"],
                list(chunk_ids),
                version.version.version_id,
            )


def keep_answers(session: Session, pipeline: Pipeline, chunks: Iterable[Chunk], known: Mapping[bytes, Vector]) -> None:
    """Keep vectors of chunks that cannot be written now for the next try.

    An application may lock a row for minutes: each try paid for its texts again, twice a second.
    """
    found = {chunk.digest: known[chunk.digest] for chunk in chunks if chunk.digest in known}
    answers = {digest: vector for digest, vector in found.items() if vector.size}
    if not answers:
        return
    session.query(
        f"""
        INSERT INTO {pipeline.generated("lent")} (version_id, content_hash, vector)
        SELECT $3, a.content_hash, a.vector FROM unnest($1::uuid[], $2) AS a (content_hash, vector)
        WHERE NOT EXISTS (
            SELECT FROM {pipeline.generated("lent")} AS l WHERE l.version_id = $3 AND l.content_hash = a.content_hash)
        """,
        ["text[]", "bytea[]", "bigint"],
        [digest.hex() for digest in answers],
        vectors.vectors_to_send(np.stack(list(answers.values())), pipeline.version.column_type),
        pipeline.version.version_id,
    )


def _lenders(session: Session, pipeline: Pipeline) -> list[Pipeline]:
    """Return the version itself and the other versions that can lend it vectors."""
    if len(pipeline.versions) == 1:
        return [pipeline]
    cache: dict[int, tuple[int, list[Pipeline]]] = session.cache.setdefault("embedline.lenders", {})
    generation, lenders = cache.get(pipeline.version.version_id, (0, []))
    if generation != pipeline.generation or not lenders:
        lenders = [other for other in load_versions(session, pipeline.name) if _can_lend(other, pipeline)]
        cache[pipeline.version.version_id] = pipeline.generation, lenders
    others = [lender for lender in lenders if lender.version.version_id != pipeline.version.version_id]
    return [pipeline, *others]


def _can_lend(lender: Pipeline, pipeline: Pipeline) -> bool:
    ours, theirs = pipeline.version, lender.version
    same_model = (ours.model.fingerprint, ours.model.config.document_prefix, ours.dimensions) == (
        theirs.model.fingerprint,
        theirs.model.config.document_prefix,
        theirs.dimensions,
    )
    # Rounding to float16 and normalising cannot be undone.
    is_exact = theirs.column_type in ("vector", ours.column_type)
    is_normalised = (ours.distance != "l2", theirs.distance != "l2")
    return same_model and is_exact and is_normalised in ((True, True), (False, False))


def _lend(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    column = quote_ident(pipeline.version.column)
    schema = vector_schema(session)
    rows = session.query(
        f"""
        SELECT DISTINCT ON (c.content_hash) uuid_send(c.content_hash) AS digest,
            {schema}.{pipeline.version.column_type}_send(v.{column}) AS vector
        FROM unnest($1::uuid[]) AS w (content_hash)
        JOIN {pipeline.chunk} AS c ON c.content_hash = w.content_hash
        JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id
        {_valid_join(pipeline, "$2")}
        """,
        ["text[]", "text"],
        [digest.hex() for digest in digests],
        pipeline.version.vectors_valid_from,
    )
    if not rows:
        return {}
    matrix = vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
    return {bytes(row["digest"]): matrix[i] for i, row in enumerate(rows)}


def _valid_join(pipeline: Pipeline, valid_from: str) -> str:
    """Return the join that leaves out vectors from before a model's change.

    Such a change is found behind the model's name; without one the join leaves out nothing.
    """
    if pipeline.version.vectors_valid_from is None:
        return f"AND {valid_from}::text IS NULL"
    return (
        f"JOIN {pipeline.document} AS d ON {pipeline.key_join('d', 'c')} AND d.embedded_at >= {valid_from}::timestamptz"
    )
