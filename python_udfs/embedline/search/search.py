"""Search: embed a text with the serving version's model, and rank that version."""

from __future__ import annotations

import functools
import math
from array import array
from typing import Any

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.values import Pipeline
from embedline.core.text import repair_text
from embedline.errors import DimensionMismatch, InvalidParameter, InvalidVectors
from embedline.models.query_embedding import QueryEmbedding
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.postgres.spans import span, start_exporters
from embedline.search.version_choice import answer

_MAX_K = 10_000
# Each setting is changed only if it has pgvector's default. A scan thinned out by a filter ends after max_scan_tuples
# rows, or once it has used scan_mem_multiplier times work_mem.
_PREPARE_SCAN = """
    SELECT set_config(s.name, s.value, true)
    FROM (VALUES ('hnsw.iterative_scan', 'off', 'strict_order'), ('hnsw.ef_search', '40', $1),
        ('hnsw.max_scan_tuples', '20000', '200000'), ('hnsw.scan_mem_multiplier', '1', '16')) AS s (name, usual, value)
    WHERE current_setting(s.name, true) = s.usual OR current_setting(s.name, true) IS NULL
"""


@entry_point
def embed_query(session: Session, pipeline_name: str, query: str) -> str:
    """Return the query's vector in pgvector's text form.

    The model of the serving version makes it.
    """
    from embedline.catalog.serving import serving_number

    pipeline = load_pipeline(session, pipeline_name)
    shown = serving_number(session, pipeline)
    if shown != pipeline.version.number:
        # The view was cut over after this transaction's snapshot was taken. The statement reads the view as it is now.
        pipeline = load_version(session, pipeline_name, shown)
    _prepare_scan(session, pipeline)
    return _embed(session, pipeline, query)


def _prepare_scan(session: Session, pipeline: Pipeline) -> None:
    """Let the transaction's index scans return as many and as good rows as asked for.

    pgvector reads these settings when a scan gives its first row, after the query's vector is known. Without an
    iterative scan LIMIT 100 over the routing view gave 40 rows, and a filter fewer still. Values that the session has
    set itself stay.
    """
    from embedline.search import ranking

    reach = pipeline.version.reach
    measured = None if reach is None else reach.ef_search
    session.query(_PREPARE_SCAN, ["text"], str(measured or ranking.DEFAULT_EF_SEARCH))


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
    """Return the k nearest chunks, or documents by their best chunk.

    Rows are of key, chunk, score.
    """
    require_given(k=k)
    if not 1 <= k <= _MAX_K:
        raise InvalidParameter(f"k must be between 1 and {_MAX_K}, not {k}")
    if ef_search is not None and not 1 <= ef_search <= 1000:
        raise InvalidParameter("ef_search must be between 1 and 1000")

    def rank(pipeline: Pipeline) -> list[dict[str, Any]]:
        return _rank(session, pipeline, query, k, per_document, ef_search)

    start_exporters(session)
    with span("search", {"pipeline": pipeline_name}):
        return answer(session, load_pipeline(session, pipeline_name), tenant, session_key, k, rank)


def _rank(
    session: Session, pipeline: Pipeline, query: str, k: int, per_document: bool, ef_search: int | None
) -> list[dict[str, Any]]:
    """Search with one version.

    Its model embeds the query and it alone is ranked, whichever version the routing view shows.
    """
    pending = _start(session, pipeline, query)
    try:
        # While the provider works: a session's first search imports the ranker, and each search prepares it.
        from embedline.search import ranking

        ranker = ranking.Ranker(session, pipeline, ef_search)
    except BaseException:
        pending.cancel()
        raise
    vector = _finish(pipeline, pending)
    offset = 1.0 if pipeline.version.distance == "cosine" else 0.0
    return [
        {"key": row["key"], "chunk": row["chunk"], "score": offset - row["distance"]}
        for row in ranker.nearest(vector, k, per_document=per_document)
    ]


def _embed(session: Session, pipeline: Pipeline, query: str | None) -> str:
    return _finish(pipeline, _start(session, pipeline, query))


def _start(session: Session, pipeline: Pipeline, query: str | None) -> QueryEmbedding:
    if query is None:
        raise InvalidParameter("the query must not be NULL")
    return QueryEmbedding(session, pipeline.version, repair_text(query))


def _finish(pipeline: Pipeline, pending: QueryEmbedding) -> str:
    """Return the query's vector in pgvector's text form.

    It is normalised if the version's vectors are.
    """
    version, block = pipeline.version, pending.result()
    if (block.count, block.dimensions) != (1, version.dimensions):
        raise DimensionMismatch(
            f"the model returned {block.dimensions} dimensions, pipeline {pipeline.name} has {version.dimensions}"
        )
    values = array("f", block.data)
    # hypot and one format string run in C: 0.44 ms for 1,536 dimensions. A loop over the values took 0.70 ms.
    norm = math.hypot(*values)
    if not math.isfinite(norm) or norm == 0:
        raise InvalidVectors("the query's vector has no direction", hint="Ask with other words.")
    scale = 1.0 if version.distance == "l2" else 1.0 / norm
    return _text_form(len(values)) % tuple([value * scale for value in values])


@functools.cache
def _text_form(dimensions: int) -> str:
    return "[" + ",".join(["%.9g"] * dimensions) + "]"
