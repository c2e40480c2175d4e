"""Search: a text becomes a vector of the version that serves, and the routing view ranks with it."""

from __future__ import annotations

import math
from array import array
from typing import Any

from embedline import precision, routing, traffic
from embedline.catalog import Pipeline, load_pipeline, load_version
from embedline.database import Session, entry_point, require_given
from embedline.embedder_pool import embedder_for, let_cancel_through, wait_result
from embedline.errors import DimensionMismatch, InvalidParameter, InvalidVectors, NotFound
from embedline.text import repair_text
from embedline.vector_index import VectorIndex

_MAX_K = 10_000
# Chunks asked for at first, for each document wanted, where one document may have many of the nearest.
_OVERFETCH = 4


@entry_point
def embed_query(session: Session, pipeline_name: str, query: str) -> str:
    """Return the query's vector in pgvector's text form, made by the model of the version that serves."""
    pipeline = load_pipeline(session, pipeline_name)
    shown = routing.serving_number(session, pipeline)
    if shown != pipeline.version.number:
        # The view was cut over after this transaction's snapshot was taken; the statement reads the view as it is now.
        pipeline = load_version(session, pipeline_name, shown)
    return _embed(session, pipeline, query)


@entry_point
def search(
    session: Session,
    pipeline_name: str,
    query: str,
    k: int,
    per_document: bool,
    ef_search: int | None,
    tenant: str | None,
    session_key: str | None,
) -> list[dict[str, Any]]:
    """Return the k nearest chunks (or the k nearest documents by their best chunk) as rows of key, chunk, score."""
    require_given(k=k)
    if not 1 <= k <= _MAX_K:
        raise InvalidParameter(f"k must be between 1 and {_MAX_K}, not {k}")
    if ef_search is not None and not 1 <= ef_search <= 1000:
        raise InvalidParameter("ef_search must be between 1 and 1000")

    def rank(pipeline: Pipeline) -> list[dict[str, Any]]:
        return _rank(session, pipeline, query, k, per_document, ef_search)

    return traffic.answer(session, load_pipeline(session, pipeline_name), tenant, session_key, k, rank)


def _rank(
    session: Session, pipeline: Pipeline, query: str, k: int, per_document: bool, ef_search: int | None
) -> list[dict[str, Any]]:
    """Search with one version: its model embeds the query, its own view is read, whatever the routing view shows."""
    vector = _embed(session, pipeline, query)
    index = precision.chosen_index(session, pipeline)
    # The function's own SET clause puts the caller's value back at its end.
    limit = k * _OVERFETCH if per_document else k
    wanted_ef = precision.ef_search(index, limit) if ef_search is None else ef_search
    session.query("SELECT set_config('hnsw.ef_search', $1, true)", ["text"], str(wanted_ef))
    statement = _search_statement(session, pipeline, index)
    if not per_document:
        return _ranked(session.query(statement, ["text", "bigint"], vector, k))
    while True:
        rows = session.query(statement, ["text", "bigint"], vector, limit)
        best: dict[str, dict[str, Any]] = {}
        for row in rows:
            best.setdefault(row["key"], row)
        if len(best) >= k or len(rows) < limit:
            return _ranked(list(best.values())[:k])
        limit *= 4


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"key": row["key"], "chunk": row["chunk"], "score": row["score"]} for row in rows]


def _embed(session: Session, pipeline: Pipeline, query: str | None) -> str:
    if query is None:
        raise InvalidParameter("the query must not be NULL")
    version = pipeline.version
    future = embedder_for(session, version.model).submit([repair_text(query)], "query")
    block = wait_result(future, let_cancel_through(session))
    if (block.count, block.dimensions) != (1, version.dimensions):
        raise DimensionMismatch(
            f"the model returned {block.dimensions} dimensions, pipeline {pipeline.name} has {version.dimensions}"
        )
    values = array("f", block.data)
    norm = math.sqrt(sum(value * value for value in values))
    if not math.isfinite(norm) or norm == 0:
        raise InvalidVectors("the query's vector has no direction", hint="Ask with other words.")
    scale = 1.0 if version.distance == "l2" else 1.0 / norm
    return "[" + ",".join(f"{value * scale:.9g}" for value in values) + "]"


def _search_statement(session: Session, pipeline: Pipeline, index: VectorIndex) -> str:
    view = session.scalar(
        "SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], pipeline.version.view_oid
    )
    if view is None:
        raise NotFound(
            f'the view of version {pipeline.version.number} of pipeline "{pipeline.name}" is gone',
            hint=f"SELECT embedline.refresh_pipeline('{pipeline.name}') makes it anew.",
        )
    return precision.search_statement(session, pipeline, index, view)
