"""Preview a new model before anything is embedded with it.

The new model embeds a few thousand chunks and the queries. A bridge turns the stored vectors into its space, and both
models rank the whole corpus by the gate's queries. Mapped vectors are worse than the model's own, so a preview
understates it, and more so if the held-out cosine is low. So it never decides, and cutover does not read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedline.catalog import progress
from embedline.catalog.load import load_embedding_model, load_pipeline
from embedline.catalog.modality import require_text
from embedline.catalog.rights import require_control
from embedline.catalog.values import Model, Pipeline
from embedline.core import statistics, vectors
from embedline.core.processes import prepare_environment
from embedline.core.request_tokens import plausible_tokens
from embedline.core.scores import score_rankings
from embedline.core.sql_text import quote_ident
from embedline.core.vectors import FloatMatrix
from embedline.errors import InvalidParameter, InvalidVectors, NotReady
from embedline.gate import report
from embedline.gate.evaluate import Evaluation, record
from embedline.gate.model_bridge import Bridge, fit_bridge
from embedline.gate.options import GateOptions
from embedline.gate.queries import PROBES, QuerySet, draw_places, load_queries
from embedline.gate.report import Row
from embedline.gate.training import require_untrained
from embedline.models import circuit
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.postgres.claims import CALLERS_TRANSACTION
from embedline.postgres.entry import calling_ours, entry_point, require_given
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.search.exact_ranking import ExactRanking, read_pages
from embedline.search.query_batches import embed_queries
from embedline.search.ranking import version_view
from embedline.spending import ledger

_SAMPLE = (100, 100_000)
# Texts of one request. With chunks of the longest context it stays below the provider's limit of tokens.
_REQUEST_TEXTS = 16
_LABEL = "preview: "


@dataclass(frozen=True)
class _Sample:
    """Chunks with their vectors of the serving version, shape (chunks, dimensions)."""

    chunk_ids: list[int]
    stored: FloatMatrix


@entry_point
def preview_version(
    session: Session, pipeline_name: str, model_name: str, canaries: str | None, sample: int, k: int, margin: float,
    query_count: int, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare a model with the serving one through a bridge, and store the preview.

    A sample of the chunks is embedded with the model to fit the bridge. Returns the preview's rows.
    """
    require_given(sample=sample, k=k, margin=margin, query_count=query_count, seed=seed)
    options = GateOptions(k, margin, query_count, None, seed, 1.0)
    low, high = _SAMPLE
    if not low <= sample <= high:
        raise InvalidParameter(
            f"sample must be between {low} and {high}, not {sample}", hint="3000 chunks make a good bridge."
        )
    prepare_environment()
    pipeline, model = load_pipeline(session, pipeline_name), load_embedding_model(session, model_name)
    require_text(pipeline, "a preview")
    with progress.reported(session, "preview_version", pipeline):
        progress.report(session, "reading the queries", 0, None)
        queries = load_queries(session, [pipeline], canaries, query_count, None, seed)
        if canaries is not None:
            require_untrained(session, [model], queries.words, canaries)
        bridge = _bridge(session, pipeline, model, sample, seed)
        scores = _scores(session, pipeline, model, bridge, queries, k)
    compared = statistics.judge_columns(scores[0], scores[1], margin, seed)
    verdict = compared[statistics.DECIDING].verdict
    note = f"{queries.note}; opens no cutover: the new model is judged by mapped vectors, which understate it"
    cosine = (
        f"of {bridge.pairs} chunks, 1 is a perfect map; the lower it is, the more the preview understates the new model"
    )
    rows = [
        Row("verdict", verdict=verdict, detail=note),
        Row("bridge cosine", new=bridge.held_out_cosine, detail=cosine),
        *report.quality_rows(compared, k, margin, queries.more_come_from),
    ]
    rows = [replace(row, measure=_LABEL + row.measure) for row in rows]
    evidence = {
        "preview": True, "model": model.config.name, "canaries": canaries, "queries": queries.note, "sample": bridge.pairs,
        "bridge_cosine": bridge.held_out_cosine, "rows": [row.as_dict() for row in rows],
    }  # fmt: skip
    # That model has no version, so the row belongs to the serving one, under the model's own fingerprint.
    record(
        session, pipeline, pipeline.version,
        Evaluation("preview", (verdict, "inconclusive", verdict), queries, options, model.fingerprint, evidence),
    )  # fmt: skip
    return [row.as_dict() for row in rows]


def _with_model(pipeline: Pipeline, model: Model) -> Pipeline:
    """Return the pipeline as if its version were of another model."""
    version = replace(
        pipeline.version,
        model=model,
        dimensions=int(model.config.dimensions or 0),
        column_type="vector",
        distance="cosine",
    )
    return replace(pipeline, version=version)


def _bridge(session: Session, pipeline: Pipeline, model: Model, sample: int, seed: int) -> Bridge:
    chosen = _draw(session, pipeline, sample, seed)
    with calling_ours(session):
        rows = session.query(
            "SELECT chunk_id, vector FROM embedline._embed_chunks($1, $2, $3)",
            ["text", "text", "bigint[]"], pipeline.name, model.config.name, chosen.chunk_ids,
        )  # fmt: skip
    place = {chunk_id: i for i, chunk_id in enumerate(chosen.chunk_ids)}
    data = b"".join(row["vector"] for row in rows)
    new = vectors.matrix_from_bytes(data, len(rows), int(model.config.dimensions or 0))
    old = chosen.stored[[place[int(row["chunk_id"])] for row in rows]]
    usable = old.any(axis=1) & new.any(axis=1)
    try:
        return fit_bridge(old[usable], new[usable], seed)
    except ValueError as error:
        raise NotReady(
            f'pipeline "{pipeline.name}" has too few chunks for a preview: {error}',
            hint=f"SELECT embedline.add_embedding_version('{pipeline.name}', '{model.config.name}'); embeds so few at once.",
        ) from error


def _draw(session: Session, pipeline: Pipeline, sample: int, seed: int) -> _Sample:
    """Return random chunks that the caller may see, each once."""
    view, names, column_type = version_view(session, pipeline), pipeline.view_columns, pipeline.version.column_type
    chunk_id, embedding = f"e.{quote_ident(names['chunk_id'])}", f"e.{quote_ident(names['embedding'])}"
    rows = session.query(
        f"""
        WITH picked AS MATERIALIZED (
            SELECT f.chunk_id FROM unnest($1) WITH ORDINALITY AS p (place, position) CROSS JOIN LATERAL (
                SELECT {chunk_id} AS chunk_id FROM {view} AS e WHERE {chunk_id} >= p.place ORDER BY {chunk_id} LIMIT 1
            ) AS f GROUP BY f.chunk_id ORDER BY min(p.position) LIMIT $2
        )
        SELECT {chunk_id} AS chunk_id, {vector_schema(session)}.{column_type}_send({embedding}) AS vector
        FROM picked AS p JOIN {view} AS e ON {chunk_id} = p.chunk_id ORDER BY 1
        """,
        ["bigint[]", "bigint"],
        draw_places(session, pipeline, sample * PROBES, seed),
        sample,
    )
    if not rows:
        return _Sample([], np.zeros((0, pipeline.version.dimensions), dtype=np.float32))
    stored = vectors.vectors_from_send([row["vector"] for row in rows], column_type)
    return _Sample([int(row["chunk_id"]) for row in rows], stored)


def _scores(
    session: Session, pipeline: Pipeline, model: Model, bridge: Bridge, queries: QuerySet, k: int
) -> tuple[statistics.FloatArray, statistics.FloatArray]:
    """Return the measures of both models over the whole corpus, exactly ranked.

    Each has the shape (queries, measures).
    """
    old, new = (embed_queries(session, version, queries.texts) for version in (pipeline, _with_model(pipeline, model)))
    before = ExactRanking(old, pipeline.version.column_type, pipeline.version.distance, k)
    after = ExactRanking(new, "vector", "cosine", k)
    for page in read_pages(session, pipeline):
        before.add(page.keys, page.matrix)
        after.add(page.keys, bridge.map(page.matrix))
    return score_rankings(before.keys(), queries.grades, k), score_rankings(after.keys(), queries.grades, k)


@entry_point
def embed_chunks(session: Session, name: str, model_name: str, chunk_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Embed stored chunks with any registered model, within budgets and rate limits.

    Returns float32 vectors of unit length.
    """
    require_control(session, name)
    prepare_environment()
    model = load_embedding_model(session, model_name)
    pipeline = _with_model(load_pipeline(session, name), model)
    require_text(pipeline, "a preview")
    if circuit.is_open(session, model.model_id):
        raise NotReady(f'model "{model_name}" is unavailable for now', hint="SELECT * FROM embedline.circuit;")
    rows = session.query(
        f"SELECT chunk_id, coalesce(prefix, '') || btrim(content, E' \\t\\n\\r\\f\\v') AS text FROM {pipeline.chunk}"
        " WHERE chunk_id = ANY ($1) ORDER BY chunk_id",
        ["bigint[]"], list(chunk_ids),
    )  # fmt: skip
    matrix = _embed_within_budget(session, pipeline, [str(row["text"]) for row in rows])
    return [
        {"chunk_id": row["chunk_id"], "vector": matrix[i].astype("<f4").tobytes()}
        for i, row in enumerate(rows)
    ]  # fmt: skip


def _embed_within_budget(session: Session, pipeline: Pipeline, texts: Sequence[str]) -> FloatMatrix:
    size = min(pipeline.version.model.config.max_batch_items, _REQUEST_TEXTS)
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    # A token has about four characters; two are on the safe side.
    grant = ledger.reserve(session, pipeline, [1 + sum(map(len, batch)) // 2 for batch in batches], CALLERS_TRANSACTION)
    if grant.count < len(batches):
        raise NotReady(
            f"the sample of {len(texts)} chunks is more than may be sent now: {grant.reason}",
            hint=f"SELECT * FROM embedline.preview_version('{pipeline.name}',"
            f" '{pipeline.version.model.config.name}', sample => {max(grant.count * size, _SAMPLE[0])});",
        )
    embedder, breathe = embedder_for(session, pipeline.version.model), let_cancel_through(session)
    futures = [embedder.submit(batch, "document") for batch in batches]
    blocks = []
    for number, future in enumerate(futures):
        progress.report(session, "embedding a sample", number * size, len(texts))
        blocks.append(wait_result(future, breathe))
    if grant.reservation_id is not None:
        prefix = pipeline.version.model.config.document_prefix
        counted = [plausible_tokens(b.tokens, batch, prefix) for b, batch in zip(blocks, batches, strict=True)]
        used = sum(t for t in counted if t is not None) if None not in counted else None
        ledger.settle(session, grant.reservation_id, used)
    if not blocks:
        return np.zeros((0, pipeline.version.dimensions), dtype=np.float32)
    matrix = np.concatenate([vectors.matrix_from_bytes(b.data, b.count, b.dimensions) for b in blocks])
    vectors.check_shape(matrix, len(texts), pipeline.version.dimensions)
    usable, faults = vectors.usable_vectors(matrix, "vector", True)
    if len(faults) == len(texts):
        raise InvalidVectors(next(iter(faults.values())))
    # A vector without a direction is left out of the bridge.
    usable[list(faults)] = 0
    return usable
