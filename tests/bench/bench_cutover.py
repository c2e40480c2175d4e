"""20 cutovers and 20 rollbacks under 8 readers and 2 writers: failed reads, results of two models, pauses, seconds of a swap.

The two models have vectors of the same width that mean nothing to each other: a query of one against vectors of the other is
no error, it only ranks by chance. Each read asks for the text of a row that nobody changes and must find that row with a
score of 1; a mixed one cannot. Half of the reads are the user's own statement over the routing view, half embedline.search.
Readers are processes of their own, each with a read every 40 ms on average; a read's time is what its caller waits. What
readers wait while nothing is swapped stands beside the longest wait, because the machine has two cores for all of this.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import threading
import time
from dataclasses import dataclass
from queue import Queue
from typing import Any

import psycopg
from harness import Bench, Figure, percentile, scalar, timed
from manual import sentences
from workers import Session, create_pipeline, drain, recreate_source, resident_worker, wait_until

from small_models import register_static

ROWS, PROBES = 5_000, 200
READERS, WRITERS, SWAPS = 8, 2, 20
READ_SECONDS, WRITE_SECONDS, REST_SECONDS = 0.04, 0.05, 0.4
MOST_PAUSE_MS, MOST_SWAP_MS = 50, 1000
OVERRIDE = "SELECT embedline.cutover('bench', 2, override_reason => 'both are the same model but for the order')"
VIEW = (
    "SELECT id, 1 - (embedding <=> q.vector) FROM bench_embedding,"
    " (SELECT embedline.embed_query('bench', %s) AS vector) AS q"
    " ORDER BY embedding <=> (SELECT embedline.embed_query('bench', %s)) LIMIT 1"
)
SEARCH = "SELECT key::bigint, score FROM embedline.search('bench', %s, 1)"


@dataclass
class Reads:
    """What a reader saw: of each read when it began and how long it took, in seconds; failures; wrong results."""

    times: list[tuple[float, float]]
    failures: list[str]
    mixed: int


def run(bench: Bench) -> None:
    """Swap to and fro while readers and writers are at work."""
    texts = sentences(ROWS)
    with bench.connect() as session:
        _prepare(session, texts)
        context = multiprocessing.get_context("spawn")
        results: Any = context.Queue()
        stop = context.Event()
        probes = list(enumerate(texts[:PROBES]))
        readers = [
            context.Process(target=_read, args=(bench.dsn, probes, seed, stop, results)) for seed in range(READERS)
        ]
        with resident_worker(bench), _writing(bench, texts) as written:
            for reader in readers:
                reader.start()
            for _ in readers:
                results.get(timeout=60)
            # Plans and models are warm; what a first read of a session takes is the bench query's matter.
            time.sleep(2)
            swaps = _swap(bench, session)
            stop.set()
            found = [results.get(timeout=60) for _ in readers]
            for reader in readers:
                reader.join()
        drain(session)
        _check(session, written)
    _report(bench, found, swaps)


def _prepare(session: Session, texts: list[str]) -> None:
    register_static(session, 256, is_reversed=True)
    recreate_source(session)
    with session.cursor().copy("COPY bench_source (id, body) FROM STDIN") as copy:
        for key, text in enumerate(texts):
            copy.write_row((key, text))
    create_pipeline(session, "static-256", index_method="hnsw", chunking="none")
    drain(session)
    session.execute(scalar(session, "SELECT embedline.index_statement('bench')"))
    session.execute("SELECT embedline.add_embedding_version('bench', 'static-256-reversed')")
    drain(session)
    session.execute(scalar(session, "SELECT embedline.index_statement('bench', 2)"))
    session.execute("VACUUM ANALYZE bench_source")


def _read(dsn: str, probes: list[tuple[int, str]], seed: int, stop: Any, results: Queue[Reads | None]) -> None:
    """Read until told to stop; say first that the session is warm."""
    draw, reads = random.Random(seed), Reads([], [], 0)
    with psycopg.connect(dsn, autocommit=True) as session:
        for version in (1, 2):
            # Both models' connections are made by use; a reader of a pool has served many requests before.
            session.execute("SELECT * FROM embedline.search('bench', 'x', 1, session_key => %s)", (str(version),))
        results.put(None)
        while not stop.is_set():
            time.sleep(draw.uniform(0, 2 * READ_SECONDS))
            key, text = draw.choice(probes)
            statement, parameters = (VIEW, (text, text)) if draw.random() < 0.5 else (SEARCH, (text,))
            start = time.monotonic()
            try:
                row = session.execute(statement, parameters).fetchone()
            except psycopg.Error as error:
                reads.failures.append(str(error))
            else:
                reads.mixed += row is None or row[0] != key or row[1] < 0.999
            reads.times.append((start, time.monotonic() - start))
    results.put(reads)


@contextlib.contextmanager
def _writing(bench: Bench, texts: list[str]) -> Any:
    """Change, add and delete rows that no reader looks for; yield what each row that was written last must be."""
    stop, written = threading.Event(), dict[int, str | None]()

    def write(seed: int) -> None:
        draw = random.Random(seed)
        with bench.connect() as session:
            number = 0
            while not stop.wait(draw.uniform(0, 2 * WRITE_SECONDS)):
                number += 1
                key = draw.randrange(PROBES, ROWS) // WRITERS * WRITERS + seed
                body = f"{draw.choice(texts)} {seed} {number}"
                if number % 10 == 0:
                    session.execute("DELETE FROM bench_source WHERE id = %s", (key,))
                    written[key] = None
                else:
                    session.execute(
                        "INSERT INTO bench_source (id, body) VALUES (%s, %s)"
                        " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                        (key, body),
                    )
                    written[key] = body

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(WRITERS)]
    for thread in threads:
        thread.start()
    try:
        yield written
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _swap(bench: Bench, session: Session) -> list[tuple[str, float, float]]:
    """Cut over and roll back in turn; return what it was, when it began and how long it took."""
    task = bench.progress.add_task("Swapping", total=2 * SWAPS)
    swaps = []
    for _ in range(SWAPS):
        for kind, statement in (("cutover", OVERRIDE), ("rollback", "SELECT embedline.rollback('bench')")):
            start = time.monotonic()
            swaps.append((kind, start, timed(lambda statement=statement: session.execute(statement))))
            bench.progress.update(task, advance=1)
            time.sleep(REST_SECONDS)
    return swaps


def _check(session: Session, written: dict[int, str | None]) -> None:
    """Raise SystemExit unless each version has every row as it was written last."""
    wait_until(
        lambda: scalar(session, "SELECT bool_and(missing = 0) FROM embedline.versions"), "both versions are full"
    )
    for view in ("bench_embedding_v1", "bench_embedding_v2"):
        found = dict(session.execute(f"SELECT id, chunk FROM {view} WHERE id >= %s", (PROBES,)).fetchall())
        wrong = [key for key, body in written.items() if found.get(key) != body]
        if wrong:
            raise SystemExit(f"{view} is not as it was written: {len(wrong)} rows, {wrong[:3]}")


def _report(bench: Bench, found: list[Reads], swaps: list[tuple[str, float, float]]) -> None:
    times = [read for reads in found for read in reads.times]
    during, beside = [], []
    for start, seconds in times:
        meets = any(start < begin + took + 0.05 and start + seconds > begin for _, begin, took in swaps)
        (during if meets else beside).append(seconds * 1000)
    failures = [failure for reads in found for failure in reads.failures]
    bench.add(Figure("failed reads", len(failures), "reads", 0, failures[0] if failures else f"of {len(times):,}"))
    bench.add(Figure("results of two models", sum(reads.mixed for reads in found), "reads", 0, "score below 0.999"))
    detail = f"p50 {percentile(during, 0.5):.1f}, p99 {percentile(during, 0.99):.1f} ms of {len(during):,} reads"
    bench.add(Figure("longest wait of a reader in a swap", max(during), "ms", MOST_PAUSE_MS, detail))
    detail = f"p50 {percentile(beside, 0.5):.1f}, p99 {percentile(beside, 0.99):.1f} ms of {len(beside):,} reads"
    bench.add(Figure("longest wait while nothing is swapped", max(beside), "ms", detail=detail))
    for kind in ("cutover", "rollback"):
        taken = [seconds * 1000 for name, _, seconds in swaps if name == kind]
        detail = f"p50 {percentile(taken, 0.5):.0f} ms of {len(taken)}"
        bench.add(Figure(f"longest {kind}", max(taken), "ms", MOST_SWAP_MS, detail))
