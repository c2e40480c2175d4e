"""What each precision index of a version finds, how fast, and how large it is, on sentences of the PostgreSQL manual.

Ranked through the version's view with the statement that search uses; recall@10 is against exact search over the whole
vectors. Queries are sentences that are not among the texts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import psycopg
from harness import Bench, Figure, percentile, scalar
from manual import sentences

from embedline.client import build_index
from embedline.core.retrieval_metrics import recall_at_k
from generated_names import BENCH

CHUNKS, QUERIES, K = 10_000, 200, 10
MODEL = "static-256"
# (kind, dimensions, oversampling); the column's own index comes first.
SHAPES = (("halfvec", None, 4), ("binary", None, 8), ("prefix", 128, 4), ("prefix", 64, 8))

STATEMENT = """
    CREATE FUNCTION bench_ranking(precision_name text) RETURNS TABLE (statement text, ef integer)
    LANGUAGE plpython3u AS $python$
        from embedline.catalog import load as catalog
        from embedline.indexes import precision
        from embedline.indexes import definitions as vector_index
        from embedline.postgres.session import Session
        session = Session(plpy, GD)
        pipeline = catalog.load_pipeline(session, "bench")
        index = vector_index.find_index(session, pipeline, precision_name)
        view = session.scalar("SELECT $1::oid::regclass::text", ["bigint"], pipeline.version.view_oid)
        shown = {"key": "e.id::text", "chunk": "e.chunk"}
        rows = precision.RankedRelation(f"{view} AS e", "e.embedding", shown)
        ranked = precision.ranked_rows(session, pipeline, index, rows, 10)
        statement = f"SELECT key, chunk, 1 - distance AS score FROM ({ranked}) AS n ORDER BY distance"
        return [(statement, precision.ef_search(index, 10))]
    $python$
"""


def run(bench: Bench) -> None:
    """Embed the sentences, build every index, and rank with each of them."""
    texts = sentences(CHUNKS + QUERIES)
    with bench.connect() as connection:
        connection.execute("CREATE TABLE bench_text (id bigint PRIMARY KEY, body text NOT NULL)")
        with connection.cursor().copy("COPY bench_text (id, body) FROM STDIN") as copy:
            for number, text in enumerate(texts[:CHUNKS]):
                copy.write_row((number, text))
        connection.execute("SELECT embedline.create_pipeline('bench', 'bench_text', 'body', %s)", (MODEL,))
        task = bench.progress.add_task("Embedding", total=CHUNKS)
        while embedded := scalar(connection, "SELECT embedline.embed_pending(1000, 'bench')"):
            bench.progress.update(task, advance=embedded)
        connection.execute(f"VACUUM ANALYZE bench_text, {BENCH('chunk')}, {BENCH.version(1)}")
        connection.execute(STATEMENT)
        vectors = [
            scalar(connection, "SELECT embedline.embed_query('bench', %s)", (query,)) for query in texts[CHUNKS:]
        ]
        exact = _rank(bench, connection, None, vectors)[0]
        for kind, dimensions, oversampling in ((None, None, 1), *SHAPES):
            _measure(bench, connection, kind, dimensions, oversampling, vectors, exact)


def _measure(
    bench: Bench,
    connection: psycopg.Connection[Any],
    kind: str | None,
    dimensions: int | None,
    oversampling: int,
    vectors: list[str],
    exact: list[list[str]],
) -> None:
    name = None
    if kind is not None:
        call = "SELECT embedline.add_precision_index('bench', 1, %s, %s, %s)"
        name = scalar(connection, call, (kind, dimensions, oversampling))
    build_index.build(build_index.PsycopgClient(connection), "bench", 1, name)
    size = scalar(
        connection,
        "SELECT bytes FROM embedline.index_progress('bench') WHERE name = %s",
        (f"bench_v1_{name or 'embedding'}_idx",),
    )
    found, seconds = _rank(bench, connection, name, vectors)
    recall = statistics.fmean(recall_at_k(f, e, K) for f, e in zip(found, exact, strict=True))
    label = f"{name}, {oversampling} times as many" if name else "the column itself"
    times = [value * 1000 for value in seconds]
    detail = f"p50 {statistics.median(times):.1f} ms, p95 {percentile(times, 0.95):.1f} ms, index {size / 2**20:.1f} MB"
    bench.add(Figure(f"recall@{K} with {label}", recall * 100, "%", detail=detail))


def _rank(
    bench: Bench, connection: psycopg.Connection[Any], name: str | None, vectors: list[str]
) -> tuple[list[list[str]], list[float]]:
    """Return the keys that each query finds, and how long it took. Before any index is built this is exact search."""
    row = connection.execute("SELECT statement, ef FROM bench_ranking(%s)", (name,)).fetchone()
    assert row is not None
    connection.execute(f"SET hnsw.ef_search = {row[1]}; SET hnsw.iterative_scan = strict_order")
    connection.execute(f"PREPARE ranking (vector) AS {row[0]}")
    found, seconds = [], []
    task = bench.progress.add_task(f"Ranking with {name or 'the column itself'}", total=len(vectors))
    for vector in vectors:
        start = time.perf_counter()
        rows = connection.execute(f"EXECUTE ranking ('{vector}')").fetchall()
        seconds.append(time.perf_counter() - start)
        found.append([key for key, _, _ in rows])
        bench.progress.update(task, advance=1)
    connection.execute("DEALLOCATE ranking")
    return found, seconds
