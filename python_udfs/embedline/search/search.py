"""Search: embed a text with the serving version's model, and rank that version.

Keywords, filters and rerankers are in search.modes, which a search by vectors alone does not load.
"""

from __future__ import annotations

import random
from typing import Any

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.values import Pipeline
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.postgres.spans import span, start_exporters
from embedline.search import query_vector
from embedline.search.request import SearchRequest
from embedline.search.version_choice import answer

# Each setting is changed only if it has pgvector's default. A scan thinned out by a filter ends after max_scan_tuples
# rows, or once it has used scan_mem_multiplier times work_mem.
_PREPARE_SCAN = """
    SELECT set_config(s.name, s.value, true)
    FROM (VALUES ('hnsw.iterative_scan', 'off', 'strict_order'), ('hnsw.ef_search', '40', $1),
        ('hnsw.max_scan_tuples', '20000', '200000'), ('hnsw.scan_mem_multiplier', '1', '16'),
        ('ivfflat.iterative_scan', 'off', 'relaxed_order'), ('ivfflat.probes', '1', $2)) AS s (name, usual, value)
    WHERE current_setting(s.name, true) = s.usual OR current_setting(s.name, true) IS NULL
"""


@entry_point
def embed_query(session: Session, pipeline_name: str, query: str) -> str:
    """Return the query's vector in pgvector's text form.

    The model of the serving version makes it.
    """
    return _query_vector(session, pipeline_name, query)


@entry_point
def embed_query_media(session: Session, pipeline_name: str, query: bytes) -> str:
    """Return the vector of an image or a recording in pgvector's text form.

    The model of the serving version makes it.
    """
    return _query_vector(session, pipeline_name, query)


def _query_vector(session: Session, pipeline_name: str, query: str | bytes) -> str:
    from embedline.catalog.serving import serving_number

    pipeline = load_pipeline(session, pipeline_name)
    shown = serving_number(session, pipeline)
    if shown != pipeline.version.number:
        # The view was cut over after this transaction's snapshot was taken. The statement reads the view as it is now.
        pipeline = load_version(session, pipeline_name, shown)
    _prepare_scan(session, pipeline)
    return query_vector.finish(pipeline, query_vector.start(session, pipeline, query))


def _prepare_scan(session: Session, pipeline: Pipeline) -> None:
    """Let the transaction's index scans return as many and as good rows as asked for.

    pgvector reads these settings when a scan gives its first row, after the query's vector is known. Without an
    iterative scan LIMIT 100 over the routing view gave 40 rows, and a filter fewer still. Values that the session has
    set itself stay.
    """
    from embedline.indexes import lists, precision
    from embedline.search import ranking

    reach = pipeline.version.reach
    measured = None if reach is None else reach.effort
    ef_search, probes = measured or ranking.DEFAULT_EF_SEARCH, 1
    index = precision.chosen_index(session, pipeline)
    if index.method == "ivfflat":
        ef_search, probes = ranking.DEFAULT_EF_SEARCH, lists.probes(session, index, measured, 1)
    session.query(_PREPARE_SCAN, ["text", "text"], str(ef_search), str(probes))


@entry_point
def search(
    session: Session, pipeline_name: str, tenant: str | None, session_key: str | None, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the k best chunks, or documents by their best chunk.

    Rows are of key, chunk, score, semantic_rank, keyword_rank, chunk_start, chunk_end.
    """
    return _search(session, pipeline_name, tenant, session_key, SearchRequest.from_parameters(parameters))


@entry_point
def search_media(
    session: Session, pipeline_name: str, tenant: str | None, session_key: str | None, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the k best chunks for an image or a recording, or documents.

    Rows are those of search.
    """
    return _search(session, pipeline_name, tenant, session_key, SearchRequest.of_media(parameters))


def _search(
    session: Session, pipeline_name: str, tenant: str | None, session_key: str | None, request: SearchRequest
) -> list[dict[str, Any]]:
    def rank(pipeline: Pipeline) -> list[dict[str, Any]]:
        if (request.mode or pipeline.version.search_mode) == "vector" and request.is_plain:
            return _rank(session, pipeline, request)
        # Loads numpy, which takes 0.1 s once in a session.
        from embedline.search import modes

        return modes.rank(session, pipeline, request)

    start_exporters(session)
    serving = load_pipeline(session, pipeline_name)
    with span("search", {"pipeline": pipeline_name}):
        rows = answer(session, serving, tenant, session_key, request.k, rank)
    if request.words and serving.query_sample_share and random.random() < serving.query_sample_share:
        from embedline.search import query_samples

        query_samples.note(session, serving, request.words)
    return rows


def _rank(session: Session, pipeline: Pipeline, request: SearchRequest) -> list[dict[str, Any]]:
    """Search with one version, by vectors alone.

    Its model embeds the query and it alone is ranked, whichever version the routing view shows.
    """
    pending = query_vector.start(session, pipeline, request.query)
    try:
        # While the provider works: a session's first search imports the ranker, and each search prepares it.
        from embedline.search import ranking

        ranker = ranking.serving_ranker(session, pipeline, request.ef_search)
    except BaseException:
        pending.cancel()
        raise
    vector = query_vector.finish(pipeline, pending)
    rows = ranker.nearest(vector, request.k, per_document=request.per_document)
    return [ranking.as_result(pipeline, row, place) for place, row in enumerate(rows, 1)]
