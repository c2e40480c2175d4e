"""How long a search takes: the first of a session while the model host is warm, and later ones.

The texts are sentences of the PostgreSQL manual, one chunk each; the queries are sentences that are not among them. The remote
model is the stub provider, which takes 20 ms for each answer. Beside it are sessions that ask it with a client of their own, as
those do whose server has no host of remote models.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import psycopg
from harness import Bench, Figure, percentile, scalar, timed
from manual import sentences

from generated_names import Generated
from stub_provider import StubProvider, stub_provider

CHUNKS, QUERIES, SESSIONS, WARM_UP = 10_000, 200, 10, 10
REMOTE, DIMENSIONS, ANSWER_SECONDS = "remote", 384, 0.02
FIRST_MS = {"static-256": 300, "minilm": 300, REMOTE: 150}
LATER_MS = {"static-256": 20, "minilm": 40, REMOTE: 30}

SEARCH = "SELECT key, chunk, score FROM embedline.search(%s, %s)"
# A search taken apart: the same calls as embedline.search.search makes, each under its own clock.
STAGES = """
    CREATE FUNCTION bench_stages(pipeline_name text, query text) RETURNS double precision[]
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET hnsw.iterative_scan = 'strict_order'
    SET hnsw.ef_search = 40
    AS $python$
        from time import perf_counter
        clock = [perf_counter()]
        from embedline.catalog import load as catalog
        from embedline.search import ranking as nearest
        from embedline.search import query_vector
        from embedline.postgres.entry import check_version
        from embedline.postgres.session import Session
        clock.append(perf_counter())
        session = Session(plpy, GD)
        check_version(session)
        pipeline = catalog.load_pipeline(session, pipeline_name)
        clock.append(perf_counter())
        vector = query_vector.finish(pipeline, query_vector.start(session, pipeline, query))
        clock.append(perf_counter())
        ranker = nearest.Ranker(session, pipeline)
        clock.append(perf_counter())
        ranker.nearest(vector, 10)
        clock.append(perf_counter())
        return [(b - a) * 1000 for a, b in zip(clock, clock[1:])]
    $python$
"""
# Has the session ask providers itself, as after a failure to start the host.
ALONE = """
    CREATE FUNCTION bench_alone() RETURNS void LANGUAGE plpython3u AS $python$
        GD["embedline.query_host.unusable"] = float("inf")
    $python$
"""
STAGE_NAMES = ("imports", "catalogue", "embed", "preparation", "ranking")
PLAN = """
    CREATE FUNCTION bench_plan(pipeline_name text, query text) RETURNS SETOF text
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
    SET hnsw.iterative_scan = 'strict_order'
    SET hnsw.ef_search = 40
    AS $python$
        from embedline.catalog import load as catalog
        from embedline.search import ranking as nearest
        from embedline.search import query_vector
        from embedline.postgres.relations import vector_schema
        from embedline.postgres.session import Session
        from embedline.core.sql_text import quote_literal
        session = Session(plpy, GD)
        pipeline = catalog.load_pipeline(session, pipeline_name)
        vector = query_vector.finish(pipeline, query_vector.start(session, pipeline, query))
        statement = nearest.Ranker(session, pipeline).statement(20)
        literal = quote_literal(vector) + f"::{vector_schema(session)}.{pipeline.version.column_type}"
        after = pipeline.version.reach.checked_to if pipeline.version.reach else 0
        statement = statement.replace("$1", literal).replace("$2", str(after))
        return [row["QUERY PLAN"] for row in plpy.execute("EXPLAIN (ANALYZE, TIMING off) " + statement)]
    $python$
"""


def run(bench: Bench) -> None:
    """Measure with each model on the same texts."""
    texts = sentences(CHUNKS + QUERIES)
    queries = texts[CHUNKS:]
    with bench.connect() as connection:
        connection.execute("CREATE TABLE bench_text (id bigint PRIMARY KEY, body text NOT NULL)")
        with connection.cursor().copy("COPY bench_text (id, body) FROM STDIN") as copy:
            for number, text in enumerate(texts[:CHUNKS]):
                copy.write_row((number, text))
        connection.execute(STAGES)
        connection.execute(PLAN)
        connection.execute(ALONE)
    with stub_provider(DIMENSIONS) as stub:
        _measure(bench, stub, queries)


def _measure(bench: Bench, stub: StubProvider, queries: list[str]) -> None:
    with bench.connect() as connection:
        connection.execute("SELECT embedline.create_model(%s, 'openai', 'stub', base_url => %s)", (REMOTE, stub.url))
        for model in LATER_MS:
            _embed_all(bench, connection, model)
    stub.behave(latency=ANSWER_SECONDS)
    for model, limit in LATER_MS.items():
        _measure_first(bench, model, queries)
        _measure_later(bench, model, queries, limit)
    _compare_with_own_client(bench, queries)


_ADVANCE = """
    CREATE OR REPLACE FUNCTION bench_advance(pipeline_name text) RETURNS boolean LANGUAGE plpython3u AS $python$
        from embedline.catalog import load as catalog
        from embedline.search import exact_rows
        from embedline.postgres.session import Session

        session = Session(plpy, GD)
        return exact_rows.advance(session, catalog.load_pipeline(session, pipeline_name))
    $python$
"""


def _embed_all(bench: Bench, connection: psycopg.Connection[Any], model: str) -> None:
    pipeline = _pipeline(model)
    connection.execute("SELECT embedline.create_pipeline(%s, 'bench_text', 'body', %s)", (pipeline, model))
    task = bench.progress.add_task(f"Embedding with {model}", total=CHUNKS)
    start = time.perf_counter()
    while embedded := scalar(connection, "SELECT embedline.embed_pending(500, %s)", (pipeline,)):
        bench.progress.update(task, advance=embedded)
    seconds = time.perf_counter() - start
    bench.progress.update(task, description=f"Building the index for {model}")
    statement = scalar(connection, "SELECT embedline.index_statement(%s)", (pipeline,))
    build = timed(lambda: connection.execute(statement))
    # As an idle worker does within seconds: until then the newest rows are ranked beside the index.
    while not _is_checked(connection, pipeline):
        pass
    # As autovacuum would within a minute.
    for table in ("bench_text", f"{Generated(pipeline)('chunk')}", f"{Generated(pipeline)('v1')}"):
        connection.execute(f"VACUUM ANALYZE {table}")
    chunks = scalar(connection, f"SELECT count(*) FROM {Generated(pipeline)('v1')}")
    if chunks != CHUNKS:
        raise SystemExit(f"{model}: {chunks} chunks, not {CHUNKS}")
    bench.add(Figure(f"{model}: embedding", CHUNKS / seconds, "chunks/s", detail=f"HNSW built in {build:.1f} s"))


def _is_checked(connection: psycopg.Connection[Any], pipeline: str) -> bool:
    """Take a step of the check of what the index reaches; return True once all rows are checked."""
    connection.execute(_ADVANCE)
    return bool(scalar(connection, "SELECT bench_advance(%s)", (pipeline,)))


def _measure_first(bench: Bench, model: str, queries: list[str]) -> None:
    pipeline, first, connected, second = _pipeline(model), [], [], []
    stages: list[list[float]] = []
    task = bench.progress.add_task(f"New sessions with {model}", total=SESSIONS)
    for query, other in zip(queries[:SESSIONS], queries[-SESSIONS:], strict=True):
        start = time.perf_counter()
        with bench.connect() as connection:
            opened = time.perf_counter()
            _search(connection, pipeline, query)
            first.append((time.perf_counter() - opened) * 1000)
            connected.append((time.perf_counter() - start) * 1000)
            second.append(timed(lambda c=connection, q=other: _search(c, pipeline, q)) * 1000)
        with bench.connect() as connection:
            stages.append(scalar(connection, "SELECT bench_stages(%s, %s)", (pipeline, f"{query} again")))
        bench.progress.update(task, advance=1)
    detail = (
        f"slowest of {SESSIONS} sessions; p50 {statistics.median(first):.0f} ms,"
        f" second search {statistics.median(second):.1f} ms"
    )
    bench.add(Figure(f"{model}: first search of a session", max(first), "ms", FIRST_MS[model], detail))
    bench.add(Figure("  with the time to connect", max(connected), "ms", detail=_spent(stages)))


def _measure_later(bench: Bench, model: str, queries: list[str], limit: float) -> None:
    pipeline = _pipeline(model)
    task = bench.progress.add_task(f"Searching with {model}", total=QUERIES)
    with bench.connect() as connection:
        for query in queries[-WARM_UP:]:
            _search(connection, pipeline, query)
            scalar(connection, "SELECT bench_stages(%s, %s)", (pipeline, f"{query} again"))
        searches, stages = [], []
        for query in queries:
            searches.append(timed(lambda q=query: _search(connection, pipeline, q)) * 1000)
            stages.append(scalar(connection, "SELECT bench_stages(%s, %s)", (pipeline, f"{query} again")))
            bench.progress.update(task, advance=1)
        plan = [row[0] for row in connection.execute("SELECT bench_plan(%s, %s)", (pipeline, queries[0]))]
    nodes = [line.strip() for line in plan if "Scan" in line or "Planning Time" in line or "JIT" in line]
    bench.note("\n  ".join([f"plan of a search with {model}:", *nodes]))
    index = f"{pipeline}_v1_embedding_idx"
    if not any(f"Index Scan using {index}" in line for line in plan):
        raise SystemExit("\n".join([f"{model}: the search does not use {index}", *plan]))
    detail = f"p50 {statistics.median(searches):.1f} ms, slowest {max(searches):.1f} ms of {QUERIES} different queries"
    bench.add(Figure(f"{model}: later searches, p95", percentile(searches, 0.95), "ms", limit, detail))
    bench.add(Figure("  p50", statistics.median(searches), "ms", detail=_spent(stages)))


def _compare_with_own_client(bench: Bench, queries: list[str]) -> None:
    """Search in new sessions by the shared connections, and with a client of the session's own, in turn."""
    pipeline = _pipeline(REMOTE)
    first: dict[bool, list[float]] = {True: [], False: []}
    later: dict[bool, list[float]] = {True: [], False: []}
    task = bench.progress.add_task("New sessions with a client of their own", total=2 * SESSIONS)
    for number in range(SESSIONS):
        for shared in (True, False):
            # No query twice: the host would know its vector.
            asked = [f"{query} {shared}" for query in queries[number::SESSIONS]]
            with bench.connect() as connection:
                start = time.perf_counter()
                if not shared:
                    connection.execute("SELECT bench_alone()")
                _search(connection, pipeline, asked[0])
                first[shared].append(time.perf_counter() - start)
                later[shared] += [timed(lambda c=connection, q=query: _search(c, pipeline, q)) for query in asked[1:]]
            bench.progress.update(task, advance=1)
    bench.compare("remote: first search, shared connections against an own client", first[True], first[False])
    bench.compare("remote: later searches, the same", later[True], later[False])


def _search(connection: psycopg.Connection[Any], pipeline: str, query: str) -> None:
    rows = connection.execute(SEARCH, (pipeline, query)).fetchall()
    if len(rows) != 10:
        raise SystemExit(f"{len(rows)} results for {query!r}")


def _spent(stages: list[list[float]]) -> str:
    medians = (statistics.median(stage) for stage in zip(*stages, strict=True))
    return ", ".join(f"{name} {median:.1f}" for name, median in zip(STAGE_NAMES, medians, strict=True)) + " ms"


def _pipeline(model: str) -> str:
    return "bench_" + model.replace("-", "_")
