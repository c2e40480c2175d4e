"""Lend vectors from outside the pipeline to chunks of the same content.

An import and an adoption put vectors into a loan. Workers find them there before they ask the model, as they find the vectors
of the pipeline's own chunks (see reuse).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.modality import require_text
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.chunking import Chunk
from embedline.chunking.chunk import content_digest
from embedline.core import vectors
from embedline.documents.values import Vector
from embedline.errors import DimensionMismatch, InvalidParameter, InvalidVectors
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

# Days until lent vectors are removed if end_loan has not removed them.
_DAYS = 7
# Largest deviation of a norm from 1, as for stored vectors: float16 rounds it by under 5e-4.
_NORM_TOLERANCE = 0.01
_BEGIN = f"""
    INSERT INTO embedline.loan (version_id, expires_at) VALUES ($1, clock_timestamp() + interval '{_DAYS} days')
    ON CONFLICT (version_id) DO UPDATE SET expires_at = excluded.expires_at
"""
_ADD = """
    WITH added AS (
        INSERT INTO embedline.loan_vector (version_id, content_hash, vector)
        SELECT $1, n.content_hash, n.vector FROM unnest($2::uuid[], $3) AS n (content_hash, vector)
        ON CONFLICT DO NOTHING RETURNING 1
    )
    SELECT count(*) FROM added
"""
_BORROW = """
    SELECT uuid_send(l.content_hash) AS digest, l.vector FROM unnest($2::uuid[]) AS w (content_hash)
    JOIN embedline.loan_vector AS l ON l.version_id = $1 AND l.content_hash = w.content_hash
"""

_NOTE_TAKEN = """
    INSERT INTO embedline.loan_taken (version_id, lent_hash, chunk_hash)
    SELECT $1, t.lent_hash, t.chunk_hash FROM unnest($2::uuid[], $3::uuid[]) AS t (lent_hash, chunk_hash)
    WHERE EXISTS (SELECT FROM embedline.loan AS l WHERE l.version_id = $1)
"""


@entry_point
def add_loan(
    session: Session, pipeline_name: str, version: int | None, content_hashes: Sequence[str], sent: Sequence[bytes]
) -> int:
    """Add vectors to the loan of a version; return how many were new.

    Raises InvalidVectors if one cannot be stored: the version would never be searched by it.
    """
    require_control(session, pipeline_name)
    pipeline = version_of(session, pipeline_name, version)
    require_text(pipeline, "a loan of vectors")
    if None in content_hashes or None in sent or len(content_hashes) != len(sent):
        raise InvalidParameter("there must be one hash for each vector, and none of them NULL")
    matrix_of(pipeline, sent)
    version_id = pipeline.version.version_id
    session.query(_BEGIN, ["bigint"], version_id)
    added = session.scalar(_ADD, ["bigint", "text[]", "bytea[]"], version_id, list(content_hashes), list(sent))
    return int(added)


@entry_point
def end_loan(session: Session, pipeline_name: str, version: int | None) -> list[dict[str, Any]]:
    """Remove what was lent to a version; return how much of it was taken.

    One row: lent vectors, those of them that chunks took, chunks of the version with a vector, those with a lent one.
    """
    require_control(session, pipeline_name)
    pipeline = version_of(session, pipeline_name, version)
    version_id = pipeline.version.version_id
    counted = session.query(
        f"""
        SELECT (SELECT count(*) FROM embedline.loan_vector AS l WHERE l.version_id = $1) AS lent,
            (SELECT count(DISTINCT t.lent_hash) FROM embedline.loan_taken AS t WHERE t.version_id = $1) AS taken,
            count(*) AS chunks, count(*) FILTER (WHERE c.content_hash IN (
                SELECT t.chunk_hash FROM embedline.loan_taken AS t WHERE t.version_id = $1)) AS lent_chunks
        FROM {pipeline.vectors} AS v JOIN {pipeline.chunk} AS c ON c.chunk_id = v.chunk_id
        """,
        ["bigint"],
        version_id,
    )
    session.query("DELETE FROM embedline.loan WHERE version_id = $1", ["bigint"], version_id)
    return counted


def version_of(session: Session, pipeline_name: str, version: int | None) -> Pipeline:
    """Return the pipeline with one of its versions, the serving one if none is named."""
    return load_pipeline(session, pipeline_name) if version is None else load_version(session, pipeline_name, version)


def matrix_of(pipeline: Pipeline, sent: Sequence[bytes]) -> vectors.FloatMatrix:
    """Return vectors in the column's binary form as a matrix.

    Raises DimensionMismatch or InvalidVectors for the first that the column or its index cannot hold.
    """
    version = pipeline.version
    size = 2 if version.column_type == "halfvec" else 4
    if not sent:
        return np.zeros((0, version.dimensions), dtype=np.float32)
    for place, blob in enumerate(sent, 1):
        if len(blob) != 4 + size * version.dimensions or int.from_bytes(blob[:2], "big") != version.dimensions:
            raise DimensionMismatch(
                f"vector {place} is no {version.vector_type}",
                detail=f"It has {len(blob)} bytes; the form of {version.column_type}_send has {4 + size * version.dimensions}.",
            )
    matrix = vectors.vectors_from_send([bytes(blob) for blob in sent], version.column_type)
    faults = vectors.find_faults(matrix, version.column_type)
    if faults:
        place, fault = next(iter(faults.items()))
        raise InvalidVectors(f"vector {place + 1}: {fault}")
    norms = np.linalg.norm(matrix.astype(np.float64), axis=1)
    if version.distance != "l2" and bool((np.abs(norms - 1) > _NORM_TOLERANCE).any()):
        worst = int(np.abs(norms - 1).argmax())
        raise InvalidVectors(
            f"vector {worst + 1} has norm {norms[worst]:.4f}; those of distance {version.distance} have norm 1"
        )
    return matrix


def borrow(session: Session, pipeline: Pipeline, chunks: Sequence[Chunk]) -> dict[bytes, Vector]:
    """Return lent vectors of chunks, by the chunks' digests.

    White space around a content does not count, because the model does not read it.
    """
    version_id = pipeline.version.version_id
    if not chunks or not session.scalar(
        "SELECT EXISTS (SELECT FROM embedline.loan WHERE version_id = $1)", ["bigint"], version_id
    ):
        return {}
    read_as = {chunk.digest: content_digest(chunk.content.strip(), chunk.prefix) for chunk in chunks}
    wanted = {*read_as, *read_as.values()}
    rows = session.query(_BORROW, ["bigint", "text[]"], version_id, [digest.hex() for digest in wanted])
    if not rows:
        return {}
    matrix = vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
    lent = {bytes(row["digest"]): matrix[i] for i, row in enumerate(rows)}
    taken = {digest: next((d for d in (digest, other) if d in lent), None) for digest, other in read_as.items()}
    pairs = [(digest, source) for digest, source in taken.items() if source is not None]
    session.query(
        _NOTE_TAKEN,
        ["bigint", "text[]", "text[]"],
        version_id,
        [source.hex() for _, source in pairs],
        [digest.hex() for digest, _ in pairs],
    )
    return {digest: lent[source] for digest, source in pairs}
