"""How long after an application's commit its change is found: a resident worker, the static model, 50 writes a second.

Half of the writes insert a row, half change a row that is embedded; each is a transaction of its own, and each is due at
a fixed time, whatever became of those before it. Another session asks the routing view all the time, for every write
that is not found yet, with one statement. Latency counts from the time at which a write was due, so that a writer held
up by the worker would show; the time from the COMMIT's return stands beside it. The HNSW index is there, as in use.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from dataclasses import dataclass

from harness import Bench, Figure, percentile, scalar
from manual import sentences
from rich.progress import TaskID
from workers import Session, create_pipeline, drain, recreate_source, resident_worker

ROWS, RATE, SECONDS = 10_000, 50, 60
POLL_SECONDS, PATIENCE = 0.005, 30.0
P50_MS, P99_MS = 200, 1000
WRITE = "INSERT INTO bench_source (id, body) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body"
FOUND = (
    "SELECT w.id FROM unnest(%s::bigint[], %s::text[]) AS w (id, body)"
    " JOIN bench_embedding AS e ON e.id = w.id AND e.chunk = w.body"
)


@dataclass
class Write:
    """One write on the schedule; times are of time.perf_counter, in seconds."""

    key: int
    body: str
    due: float
    committed: float = 0.0
    found: float = 0.0


def run(bench: Bench) -> None:
    """Write on schedule for a minute while the worker works and the view is watched."""
    texts = sentences(ROWS + RATE * SECONDS)
    with bench.connect() as session:
        _prepare(bench, session, texts[:ROWS])
        with resident_worker(bench):
            writes, polls = _schedule(texts[ROWS:]), list[float]()
            task = bench.progress.add_task("Writing", total=len(writes))
            watcher = threading.Thread(target=_watch, args=(bench, writes, polls, task))
            watcher.start()
            _write_all(session, writes)
            watcher.join()
    missing = sum(1 for write in writes if not write.found)
    bench.add(Figure("writes not found after 30 s", missing, "rows", 0, f"of {len(writes)}"))
    found = [write for write in writes if write.found]
    since_due = [(write.found - write.due) * 1000 for write in found]
    since_commit = [(write.found - write.committed) * 1000 for write in found]
    for share, limit in ((0.5, P50_MS), (0.99, P99_MS), (1.0, None)):
        detail = f"from the COMMIT's return {percentile(since_commit, share):.0f} ms"
        label = f"due to found, {'most' if share == 1 else f'p{share * 100:.0f}'}"
        bench.add(Figure(label, percentile(since_due, share), "ms", limit, detail))
    gaps = [(b - a) * 1000 for a, b in itertools.pairwise(polls)]
    detail = f"p99 {percentile(gaps, 0.99):.0f}, most {max(gaps):.0f} ms; it is part of each latency"
    bench.add(Figure("time from one look to the next, p50", statistics.median(gaps), "ms", detail=detail))
    late = [(write.committed - write.due) * 1000 for write in writes]
    detail = f"p99 {percentile(late, 0.99):.1f}, most {max(late):.0f} ms"
    bench.add(Figure("due to the COMMIT's return, p50", statistics.median(late), "ms", detail=detail))


def _prepare(bench: Bench, session: Session, texts: list[str]) -> None:
    recreate_source(session)
    with session.cursor().copy("COPY bench_source (id, body) FROM STDIN") as copy:
        for key, text in enumerate(texts):
            copy.write_row((key, text))
    create_pipeline(session, "static-256", index_method="hnsw", chunking="none")
    drain(session)
    session.execute(scalar(session, "SELECT embedline.index_statement('bench')"))
    session.execute("VACUUM ANALYZE bench_source")


def _schedule(texts: list[str]) -> list[Write]:
    start = time.perf_counter() + 2.0
    keys = [*random.Random(1).sample(range(ROWS), len(texts) // 2), *range(ROWS, ROWS + len(texts) // 2)]
    random.Random(2).shuffle(keys)
    return [Write(key, text, start + i / RATE) for i, (key, text) in enumerate(zip(keys, texts, strict=True))]


def _write_all(session: Session, writes: list[Write]) -> None:
    for write in writes:
        time.sleep(max(write.due - time.perf_counter(), 0.0))
        session.execute(WRITE, (write.key, write.body))
        write.committed = time.perf_counter()


def _watch(bench: Bench, writes: list[Write], polls: list[float], task: TaskID) -> None:
    """Note when each write is found, until all are or 30 s have passed since the last."""
    waiting: dict[int, Write] = {}
    upcoming = iter(writes)
    nearest = next(upcoming, None)
    limit = writes[-1].due + PATIENCE
    with bench.connect() as session:
        while (waiting or nearest) and time.perf_counter() < limit:
            while nearest and nearest.due <= time.perf_counter():
                waiting[nearest.key] = nearest
                nearest = next(upcoming, None)
            pairs = [(write.key, write.body) for write in waiting.values()]
            rows = session.execute(FOUND, ([key for key, _ in pairs], [body for _, body in pairs])).fetchall()
            now = time.perf_counter()
            polls.append(now)
            for (key,) in rows:
                # The reply to a COMMIT may come after another session has seen its rows.
                waiting.pop(key).found = now
                bench.progress.update(task, advance=1)
            time.sleep(POLL_SECONDS)
