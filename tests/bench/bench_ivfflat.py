"""IVFFlat against HNSW on 100,000 package summaries: recall, times, sizes.

Three pipelines of one table have the same vectors. Each index is built as build-index builds it, and searched with what the
measurement chose for it. Queries are summaries that are not among the texts, and sentences on other subjects. Recall@10 is
against exact ranking of the same vectors.

Afterwards the lists are built on a tenth of the rows, and the others are added. The same queries are asked with the probes that
were chosen for the tenth.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness import Bench, Figure, percentile, scalar, timed
from off_topic import OFF_TOPIC
from packages import summaries
from rich.progress import TaskID
from workers import Session

from embedline.client import build_index
from embedline.core import ivfflat, storage_size
from generated_names import Generated

CHUNKS, QUERIES, K = 100_000, 300, 10
MODEL = "static-256"
DIMENSIONS = 256
# Pipeline: its index method, and the lists that are asked for; without them pgvector's rule gives 100.
PIPELINES: dict[str, tuple[str, int | None]] = {
    "hnsw": ("hnsw", None),
    "ivfflat": ("ivfflat", None),
    "ivfflat_1000": ("ivfflat", 1_000),
}
IVFFLAT = Generated("ivfflat")
# Distances that agree to so much are the same, because pgvector sums in single precision.
TOLERANCE = 1e-5

CREATE = """
    SELECT embedline.create_pipeline(%s, 'bench_text', 'body', %s, chunking => 'none', index_method => %s, index_options => %s)
"""
# What search does once it has the query's vector. `effort` is ef_search or probes; NULL takes what was measured.
RANK = """
    CREATE FUNCTION bench_rank(pipeline text, query text, k integer, effort integer, how text)
    RETURNS TABLE (distance double precision)
    LANGUAGE plpython3u
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    AS $python$
        from embedline.catalog.load import load_pipeline
        from embedline.postgres.session import Session
        from embedline.search.ranking import Ranker
        session = Session(plpy, GD)
        ranker = Ranker(session, load_pipeline(session, pipeline), effort)
        return [row["distance"] for row in ranker.nearest(query, k, how=how)]
    $python$
"""
MEASURE = """
    CREATE FUNCTION bench_measure(pipeline text) RETURNS text
    LANGUAGE plpython3u
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    AS $python$
        from embedline.catalog.load import load_pipeline
        from embedline.postgres.session import Session
        from embedline.search.index_recall import Measurement
        session = Session(plpy, GD)
        measurement = Measurement(session, load_pipeline(session, pipeline))
        measurement.run()
        return str(measurement.outcome)
    $python$
"""


@dataclass(frozen=True)
class Queries:
    """Vectors of queries, with the exact distances of the nearest rows of each."""

    name: str
    vectors: list[str]
    exact: list[list[float]]


def run(bench: Bench) -> None:
    """Fill both pipelines, build and search each, then let the lists drift."""
    texts = summaries(CHUNKS + QUERIES).texts
    with bench.connect() as session:
        session.execute("CREATE TABLE bench_text (id bigint PRIMARY KEY, body text NOT NULL)")
        with session.cursor().copy("COPY bench_text (id, body) FROM STDIN") as copy:
            for number, text in enumerate(texts[:CHUNKS]):
                copy.write_row((number, text))
        session.execute(RANK)
        session.execute(MEASURE)
        asked = {"summaries": texts[CHUNKS:], "off-topic questions": [question for _, question in OFF_TOPIC]}
        queries: list[Queries] = []
        for name, (method, lists) in PIPELINES.items():
            options = json.dumps({} if lists is None else {"lists": lists})
            session.execute(CREATE, (name, MODEL, method, options))
            _embed(bench, session, name)
            queries = queries or [_exact(bench, session, name, kind, of_kind) for kind, of_kind in asked.items()]
            _build(bench, session, name)
            _search(bench, session, name, queries)
        _drift(bench, session, queries[0])


def _embed(bench: Bench, session: Session, method: str) -> None:
    task = bench.progress.add_task(f"Embedding for {method}", total=CHUNKS)
    complete = "SELECT bool_and(state = 'complete' AND missing = 0) FROM embedline.versions"
    while not scalar(session, complete):
        bench.progress.update(task, advance=scalar(session, "SELECT embedline.embed_pending(1000, %s)", (method,)))
    bench.progress.remove_task(task)
    names = Generated(method)
    session.execute(f"VACUUM ANALYZE bench_text, {names('chunk')}, {names.version(1)}")


def _exact(bench: Bench, session: Session, method: str, name: str, texts: Sequence[str]) -> Queries:
    vectors = [scalar(session, "SELECT embedline.embed_query(%s, %s)", (method, text)) for text in texts]
    task = bench.progress.add_task(f"Ranking exactly: {name}", total=len(vectors))
    exact = []
    for vector in vectors:
        exact.append(_ranked(session, method, vector, None, "exact"))
        bench.progress.update(task, advance=1)
    bench.progress.remove_task(task)
    return Queries(name, vectors, exact)


def _ranked(session: Session, method: str, vector: str, effort: int | None, how: str | None = None) -> list[float]:
    call = "SELECT distance FROM bench_rank(%s, %s, %s, %s, %s)"
    return [row[0] for row in session.execute(call, (method, vector, K, effort, how)).fetchall()]


def _build(bench: Bench, session: Session, method: str) -> None:
    seconds = timed(lambda: build_index.build(build_index.PsycopgClient(session), method))
    size = scalar(session, "SELECT bytes FROM embedline.index_progress(%s)", (method,))
    index = "SELECT array_to_string(reloptions, ', ') FROM pg_class WHERE oid = %s::regclass"
    options = scalar(session, index, (Generated(method).index(1),))
    shape = (CHUNKS, DIMENSIONS, "vector")
    if PIPELINES[method][0] == "hnsw":
        memory = storage_size.hnsw_build_memory(*shape, 16, session.info.server_version)
    else:
        memory = ivfflat.build_memory(*shape, PIPELINES[method][1] or ivfflat.default_lists(CHUNKS))
    detail = f"{options}; {size / 2**20:.1f} MB, built in {memory / 2**20:.0f} MB of memory"
    bench.add(Figure(f"{method}: build", seconds, "s", detail=detail))
    measured = timed(lambda: session.execute("SELECT bench_measure(%s)", (method,)))
    chosen = session.execute(
        "SELECT coalesce(r.probes, r.ef_search), coalesce(r.wide_probes, r.wide_ef_search), r.recall"
        " FROM embedline.index_reach AS r JOIN embedline.pipeline AS p ON p.serving_version_id = r.version_id"
        " WHERE p.name = %s",
        (method,),
    ).fetchone()
    assert chosen is not None
    detail = f"usual queries, far ones {chosen[1] or 'exactly'}; made-up queries {chosen[2]:.3f}; measured in {measured:.0f} s"
    bench.add(Figure(f"{method}: {'ef_search' if method == 'hnsw' else 'probes'}", chosen[0], "", detail=detail))


def _search(bench: Bench, session: Session, method: str, queries: Sequence[Queries]) -> None:
    for kind in queries:
        recall, times = _asked(bench, session, method, kind, None)
        detail = f"{recall:.4f} of {len(kind.vectors)} {kind.name}; p50 {statistics.median(times):.1f} ms,"
        detail += f" p95 {percentile(times, 0.95):.1f} ms"
        bench.add(Figure(f"{method}: recall@{K}, {kind.name}", 100 * recall, "%", detail=detail))


def _asked(bench: Bench, session: Session, method: str, kind: Queries, effort: int | None) -> tuple[float, list[float]]:
    """Return mean recall and the milliseconds of each search."""
    task: TaskID = bench.progress.add_task(f"Searching with {method}", total=len(kind.vectors))
    _ranked(session, method, kind.vectors[0], effort)  # warm
    recalls, times = [], []
    for vector, exact in zip(kind.vectors, kind.exact, strict=True):
        start = time.perf_counter()
        found = _ranked(session, method, vector, effort)
        times.append(1000 * (time.perf_counter() - start))
        recalls.append(sum(distance <= exact[-1] + TOLERANCE for distance in found) / K)
        bench.progress.update(task, advance=1)
    bench.progress.remove_task(task)
    return statistics.fmean(recalls), times


def _drift(bench: Bench, session: Session, kind: Queries) -> None:
    """Build the lists on a tenth of the rows, add the others, and search."""
    table, index = IVFFLAT.version(1), IVFFLAT.index(1)
    session.execute(f"CREATE TEMP TABLE kept AS SELECT * FROM {table} WHERE chunk_id % 10 <> 0")
    session.execute(f"DELETE FROM {table} WHERE chunk_id % 10 <> 0")
    session.execute(f"VACUUM ANALYZE {table}")
    session.execute(f"ALTER INDEX {index} SET (lists = {CHUNKS // 10_000})")
    session.execute(f"REINDEX INDEX CONCURRENTLY {index}")
    session.execute("UPDATE embedline.index_reach SET built_probes = NULL")
    session.execute("SELECT bench_measure('ivfflat')")
    chosen = scalar(session, "SELECT probes FROM embedline.status WHERE pipeline = 'ivfflat'")
    session.execute(f"INSERT INTO {table} SELECT * FROM kept")
    session.execute(f"VACUUM ANALYZE {table}")
    recall, times = _asked(bench, session, "ivfflat", kind, chosen)
    detail = f"{chosen} probes of {CHUNKS // 10_000} lists; p50 {statistics.median(times):.1f} ms"
    bench.add(Figure("ivfflat: recall of lists built on a tenth of the rows", 100 * recall, "%", detail=detail))
