"""Check whether stored vectors are still those of the model.

A remote model may change behind its name, and a file may be replaced. A vector of another model is as wide as its
neighbours and answers queries with nonsense. Only embedding the text again shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt

from embedline.catalog import keys
from embedline.catalog.values import Pipeline
from embedline.core import vectors
from embedline.core.json_values import as_mapping
from embedline.core.media import ModelInput
from embedline.core.sql_text import quote_ident
from embedline.documents.files import stored_inputs
from embedline.errors import ProviderError
from embedline.models import circuit
from embedline.models.document_embedding import embed_texts, lowest_cosine
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.postgres.claims import CALLERS_TRANSACTION
from embedline.postgres.locks import hold_source
from embedline.postgres.relations import vector_schema
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.search.exact_rows import keep_exact, random_chunks
from embedline.spending import ledger

MAX_SAMPLE = 1000
# Share of foreign vectors in the sample above which the whole pipeline is embedded again.
_EVERYWHERE = 0.5


@dataclass(frozen=True)
class StoredVector:
    """A sampled chunk: its digest, its row's key, and its vector from the model now."""

    digest: bytes
    key: Mapping[str, Any]
    cosine: float
    vector: tuple[float, ...]


@dataclass(frozen=True)
class Drift:
    """The result of a sample.

    `fingerprint` is the model's present one if it is not the registered one.
    """

    sampled: int = 0
    foreign: tuple[StoredVector, ...] = ()
    fingerprint: str | None = None
    error: str | None = None

    @property
    def is_finding(self) -> bool:
        """Return True if there is something to report."""
        return bool(self.foreign or self.fingerprint or self.error)

    @property
    def is_everywhere(self) -> bool:
        """Return True if most of the pipeline's vectors must be taken for foreign."""
        return len(self.foreign) > _EVERYWHERE * self.sampled

    @property
    def example(self) -> dict[str, Any]:
        """Return the facts by which a person can judge the finding."""
        if self.error is not None:
            return {"not_checked": self.error}
        shown: dict[str, Any] = {"sampled": self.sampled}
        if self.foreign:
            worst = min(self.foreign, key=lambda stored: stored.cosine)
            shown |= {"key": dict(worst.key), "lowest_cosine": round(worst.cosine, 4)}
            shown["hint"] = (
                "most vectors are of another model: repair => true embeds all rows again"
                if self.is_everywhere
                else "some vectors are of another model: verify a larger sample; repair => true replaces those found"
            )
        if self.fingerprint is not None:
            shown["fingerprint"] = self.fingerprint
        return shown


def examine(session: Session, pipeline: Pipeline, sample: int) -> Drift:
    """Embed the texts of up to `sample` random chunks again, and compare.

    Asks the model nothing if there are none. One probe and one request for each 16 texts, inside the caller's
    transaction; the statement stays cancellable. No table of the pipeline is locked meanwhile, so a TRUNCATE of the
    source does not wait for the model.
    """
    model = pipeline.version.model

    def choose() -> list[dict[str, Any]]:
        hold_source(session, pipeline.source_oid)
        return _choose(session, pipeline, sample)

    chosen = read_and_release(session, choose)
    if not chosen:
        return Drift()
    try:
        fresh, fingerprint = embed_fresh(session, pipeline, [row["text"] for row in chosen])
    except ProviderError as error:
        return Drift(error=str(error))
    stored = vectors.vectors_from_send([row["vector"] for row in chosen], pipeline.version.column_type)
    cosines = cosines_of(stored, fresh)
    usable = fresh if pipeline.version.distance == "l2" else vectors.normalise(fresh)
    lowest = lowest_cosine(model.config)
    foreign = tuple(
        StoredVector(
            bytes(row["digest"]), as_mapping(row["key"]), float(cosines[i]), tuple(float(x) for x in usable[i])
        )
        for i, row in enumerate(chosen)
        if cosines[i] < lowest
    )
    changed = fingerprint if fingerprint != (model.probed_fingerprint or model.fingerprint) else None
    return Drift(len(chosen), foreign, changed)


def embed_fresh(session: Session, pipeline: Pipeline, texts: Sequence[ModelInput]) -> tuple[vectors.FloatMatrix, str]:
    """Return the vectors that the model gives texts now, and its present fingerprint.

    Raises ProviderError if the model cannot be asked, also because of a budget.
    """
    model = pipeline.version.model
    if circuit.is_open(session, model.model_id):
        raise ProviderError(f'model "{model.config.name}" is unavailable for now')
    # A token has about four characters; two are on the safe side. The probe is one short text.
    grant = ledger.reserve(session, pipeline, [1 + sum(map(len, texts)) // 2], CALLERS_TRANSACTION)
    if not grant.count:
        raise ProviderError(grant.reason)
    try:
        embedder = embedder_for(session, model)
        info = wait_result(embedder.probe(), let_cancel_through(session))
        return embed_texts(session, pipeline, embedder, texts), info.fingerprint
    finally:
        if grant.reservation_id is not None:
            ledger.settle(session, grant.reservation_id, None)


def cosines_of(stored: vectors.FloatMatrix, fresh: vectors.FloatMatrix) -> npt.NDArray[np.float64]:
    """Return the cosine of each row of two matrices."""
    found: npt.NDArray[np.float64] = np.einsum(
        "ij,ij->i", vectors.normalise(stored).astype(np.float64), vectors.normalise(fresh)
    )
    return found


def _choose(session: Session, pipeline: Pipeline, sample: int) -> list[dict[str, Any]]:
    """Return random chunks with their vectors.

    They are found through the primary key, at the same cost on any table. Known foreign chunks that wait for the
    backfill are left out.
    """
    version = pipeline.version
    rows = session.query(
        f"""
        WITH {random_chunks(pipeline)}
        SELECT c.chunk_id, uuid_send(c.content_hash) AS digest, {keys.as_json(pipeline, "c")} AS key, c.prefix, c.content,
            {vector_schema(session)}.{version.column_type}_send(v.{quote_ident(version.column)}) AS vector
        FROM picked AS p
        JOIN {pipeline.vectors} AS v ON v.chunk_id = p.chunk_id
        JOIN {pipeline.chunk} AS c ON c.chunk_id = p.chunk_id
        JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "c")}
        JOIN embedline.version AS w ON w.version_id = $2
        WHERE w.vectors_valid_from IS NULL OR d.embedded_at >= w.vectors_valid_from
        """,
        ["integer", "bigint"],
        sample,
        version.version_id,
    )
    # A zero vector has no direction to compare; it is another check's finding.
    matrix = (
        vectors.vectors_from_send([row["vector"] for row in rows], version.column_type) if rows else np.zeros((0, 1))
    )
    compared = [row for i, row in enumerate(rows) if matrix[i].any()]
    return [{**row, "text": given} for row, given in stored_inputs(session, pipeline, compared)]


def replace_vectors(session: Session, pipeline: Pipeline, foreign: Sequence[StoredVector]) -> int:
    """Replace foreign vectors by the model's present ones.

    All chunks of the text get the new vector. Returns the number of texts.
    """
    if not foreign:
        return 0
    version, schema = pipeline.version, vector_schema(session)
    column = quote_ident(version.column)
    rows = session.query(
        f"""
        WITH fresh AS MATERIALIZED (
            SELECT n.digest::uuid AS digest, n.vector::{schema}.{version.vector_type} AS vector
            FROM unnest($1, $2) AS n (digest, vector)
        ), locked AS MATERIALIZED (
            SELECT v.chunk_id, n.digest, n.vector FROM fresh AS n
            JOIN {pipeline.chunk} AS c ON c.content_hash = n.digest
            JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id
            FOR UPDATE OF v SKIP LOCKED
        ), replaced AS (
            UPDATE {pipeline.vectors} AS v SET {column} = l.vector FROM locked AS l
            WHERE v.chunk_id = l.chunk_id RETURNING l.chunk_id, l.digest
        )
        SELECT count(DISTINCT digest) AS replaced, array_agg(chunk_id) AS chunk_ids FROM replaced
        """,
        ["text[]", "text[]"],
        [str(UUID(bytes=stored.digest)) for stored in foreign],
        ["[" + ",".join(f"{value:.9g}" for value in stored.vector) + "]" for stored in foreign],
    )
    # Copies of the earlier vectors are no longer ranked. The new ones are ranked exactly until they are checked.
    changed = rows[0]["chunk_ids"] or []
    keep_exact(session, pipeline, changed, [None] * len(changed))
    return int(rows[0]["replaced"])


def accept_fingerprint(session: Session, pipeline: Pipeline, found: Drift) -> None:
    """Register the model's present fingerprint.

    That is done if its vectors are the stored ones, or if all vectors are replaced. The stored vectors of a model of towers
    do not tell whether another tower has changed.
    """
    is_same = not found.foreign and not pipeline.version.model.has_towers
    if found.fingerprint is not None and (found.is_everywhere or is_same):
        session.query(
            "UPDATE embedline.model SET fingerprint = $2, probed_fingerprint = NULL WHERE model_id = $1",
            ["bigint", "text"],
            pipeline.version.model.model_id,
            found.fingerprint,
        )
