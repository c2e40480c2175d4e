"""The keyword index: its search times, its upkeep, and its bytes.

Texts are 148 words in a row of the PostgreSQL manual, from anywhere in it, and two words that are nearly unique. Queries are 3
to 15 words in a row of the manual. The chunks of the large pipeline are inserted directly, with vectors drawn at random.
Workers build its keyword index as they do for a pipeline that gets one later. Its HNSW index is a small one (m 8,
ef_construction 32), because the usual one takes an hour. The arms are compared on both pipelines; the rows of the small one
are embedded.

EMBEDLINE_BENCH_ROWS=1000000,50000 sets the rows of both.
"""

from __future__ import annotations

import os
import random
import statistics
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from harness import Bench, Figure, percentile, scalar, timed
from manual import sentences
from workers import Session, create_pipeline, drain, processor_seconds, recreate_source, register_stub, spread

from embedline.client import build_index
from generated_names import BENCH
from stub_provider import stub_provider

DEFAULT_ROWS, WRITTEN, WORDS, QUERIES, DIMENSIONS = "1000000,50000", 10_000, 150, 300, 256
KEYWORD_MS, HYBRID, UPKEEP, BYTES = 60.0, 1.3, 1.25, 300.0
_TABLES = tuple(BENCH(f"keyword_{part}") for part in ("entry", "segment", "page"))


def run(bench: Bench) -> None:
    """Measure writing, then the arms of a hybrid search, then the large index."""
    large, small = (int(rows) for rows in os.environ.get("EMBEDLINE_BENCH_ROWS", DEFAULT_ROWS).split(","))
    texts = Texts()
    with stub_provider(384) as provider, bench.connect() as session:
        _measure_upkeep(bench, session, register_stub(session, provider), texts)
    with bench.connect() as session:
        _compare_arms(bench, session, texts, small)
    with bench.connect() as session:
        _time_keywords(bench, session, texts, large)


class Texts:
    """Texts of 150 words, and queries, the same in each run."""

    def __init__(self) -> None:
        self._words = " ".join(sentences()).split()

    def _run(self, drawn: random.Random, length: int) -> list[str]:
        start = drawn.randrange(len(self._words) - length)
        return self._words[start : start + length]

    def texts(self, count: int) -> Iterator[str]:
        """Yield so many texts."""
        drawn = random.Random(3)
        for number in range(count):
            yield " ".join([*self._run(drawn, WORDS - 2), f"x{number:x}", f"y{drawn.randrange(count):x}"])

    def queries(self, count: int) -> list[str]:
        """Return queries of 3 to 15 words."""
        drawn = random.Random(5)
        return [" ".join(self._run(drawn, drawn.randint(3, 15))) for _ in range(count)]


def _measure_upkeep(bench: Bench, session: Session, model: str, texts: Texts) -> None:
    """Compare the processor time of draining rows with and without a keyword index."""
    bodies = list(texts.texts(WRITTEN))
    extra, writes = [], []
    task = bench.progress.add_task("Writing with and without keywords", total=2 * (bench.rounds + 1))
    for number in range(bench.rounds + 1):
        seconds = {}
        for keyword in (None, "english") if number % 2 else ("english", None):
            recreate_source(session)
            create_pipeline(session, model, chunking="none", keyword=keyword)
            _insert(session, bodies)
            with bench.connect() as worker:
                worker.execute("CALL embedline.run_worker(max_seconds => 0)")
                before = processor_seconds(worker.info.backend_pid)
                drain(worker)
                seconds[keyword] = processor_seconds(worker.info.backend_pid) - before
            if scalar(session, f"SELECT count(*) FROM {BENCH('chunk')}") != WRITTEN:
                raise SystemExit("not every row is one chunk")
            bench.progress.update(task, advance=1)
        if number:
            extra.append(seconds["english"] - seconds[None])
            writes.append(seconds[None])
    shares = [more / write for more, write in zip(extra, writes, strict=True)]
    detail = (
        f"{statistics.median(extra) / WRITTEN * 1e6:.0f} µs a chunk beside {statistics.median(writes) / WRITTEN * 1e6:.0f} µs;"
        f" {spread(shares)}"
    )
    bench.add(Figure("keyword upkeep, of a row's way without it", statistics.median(shares), "×", UPKEEP, detail))


def _insert(session: Session, bodies: Sequence[str]) -> None:
    with session.cursor().copy("COPY bench_source (id, body) FROM STDIN") as copy:
        for number, body in enumerate(bodies, 1):
            copy.write_row((number, body))


def _compare_arms(bench: Bench, session: Session, texts: Texts, rows: int) -> None:
    recreate_source(session)
    create_pipeline(session, "static-256", index_method="hnsw", chunking="none", keyword="english")
    task = bench.progress.add_task(f"Embedding {rows:,} rows", total=None)
    _insert(session, list(texts.texts(rows)))
    drain(session)
    bench.progress.update(task, description="Building the vector index")
    build_index.build(build_index.PsycopgClient(session), "bench")
    session.execute("VACUUM ANALYZE")
    bench.progress.remove_task(task)
    _time_arms(bench, session, texts, rows)


def _time_arms(bench: Bench, session: Session, texts: Texts, rows: int) -> float:
    """Ask each query in each mode, in turns; return the keyword arm's 95th percentile in milliseconds."""
    seconds: dict[str, list[float]] = {"vector": [], "keyword": [], "hybrid": []}
    for number, query in enumerate(texts.queries(QUERIES + 20)):
        for mode, found in seconds.items():
            elapsed = timed(lambda q=query, m=mode: _search(session, q, m))
            if number >= 20:
                found.append(elapsed * 1000)
    p95 = {mode: percentile(found, 0.95) for mode, found in seconds.items()}
    slower = max(p95["vector"], p95["keyword"])
    detail = "; ".join(
        f"{mode} {statistics.median(found):.1f}, p95 {p95[mode]:.1f} ms" for mode, found in seconds.items()
    )
    bench.add(
        Figure(f"{rows:,} chunks: p95 of hybrid, of the slower arm's", p95["hybrid"] / slower, "×", HYBRID, detail)
    )
    return p95["keyword"]


def _time_keywords(bench: Bench, session: Session, texts: Texts, rows: int) -> None:
    recreate_source(session)
    small_index = '{"m": 8, "ef_construction": 32}'
    create_pipeline(session, "static-256", index_method="hnsw", chunking="none", index_options=small_index)
    task = bench.progress.add_task(f"Loading {rows:,} rows", total=None)
    session.execute("SET session_replication_role = replica")
    _insert(session, list(texts.texts(rows)))
    session.execute(
        f"INSERT INTO {BENCH('chunk')} (key_id, seq, start_offset, end_offset, content_hash, content)"
        " SELECT id, 0, 0, length(body), md5(body)::uuid, body FROM bench_source ORDER BY id"
    )
    _write_vectors(session)
    session.execute(
        f"INSERT INTO {BENCH('document')} (key_id, content_hash, state, embedded_at, recipe)"
        " SELECT s.id, sha256(convert_to(s.body, 'UTF8')), 'embedded', now(), p.recipe"
        " FROM bench_source AS s, embedline.pipeline AS p"
    )
    session.execute("RESET session_replication_role")
    session.execute("DELETE FROM embedline.backfill_range")
    session.execute("VACUUM ANALYZE")
    bench.progress.update(task, description="Building the keyword index")
    session.execute("SELECT embedline.alter_pipeline('bench', keyword => 'english')")
    build = timed(lambda: _build(session))
    session.execute("VACUUM ANALYZE")
    bench.progress.remove_task(task)
    size = sum(scalar(session, "SELECT pg_total_relation_size(%s::regclass)", (table,)) for table in _TABLES)
    bench.add(Figure("bytes of the keyword index, a chunk", size / rows, "bytes", BYTES, f"built in {build:.0f} s"))
    task = bench.progress.add_task("Building the vector index", total=None)
    session.execute("SET maintenance_work_mem = '4GB'")
    build = timed(lambda: build_index.build(build_index.PsycopgClient(session), "bench"))
    session.execute("RESET maintenance_work_mem")
    bench.progress.remove_task(task)
    keyword = _time_arms(bench, session, texts, rows)
    detail = f"{QUERIES} queries of 3 to 15 words; the small HNSW index was built in {build:.0f} s"
    bench.add(Figure(f"{rows:,} chunks: p95 of the keyword arm", keyword, "ms", KEYWORD_MS, detail))


def _write_vectors(session: Session) -> None:
    """Store a vector of random direction for each chunk."""
    chunks = [row[0] for row in session.execute(f"SELECT chunk_id FROM {BENCH('chunk')} ORDER BY chunk_id")]
    drawn = np.random.default_rng(7)
    head = struct.pack(">HH", DIMENSIONS, 0)
    with session.cursor().copy(f"COPY {BENCH('v1')} FROM STDIN (FORMAT binary)") as copy:
        # Bytes are sent as they are, in the form that the vector's type receives.
        copy.set_types(["int8", "bytea"])
        for start in range(0, len(chunks), 10_000):
            part = chunks[start : start + 10_000]
            vectors = drawn.standard_normal((len(part), DIMENSIONS), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            for chunk, vector in zip(part, vectors.astype(">f4"), strict=True):
                copy.write_row((chunk, head + vector.tobytes()))


def _build(session: Session) -> None:
    while scalar(session, "SELECT count(*) FROM embedline.keyword_build WHERE built_to < build_to"):
        session.execute("CALL embedline.run_worker(max_seconds => 20)")


def _search(session: Session, query: str, mode: str) -> list[tuple[Any, ...]]:
    statement = "SELECT key, chunk, score FROM embedline.search('bench', %s, 10, mode => %s)"
    return session.execute(statement, (query, mode)).fetchall()
