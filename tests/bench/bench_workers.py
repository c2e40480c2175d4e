"""1, 2, 4 and 8 workers side by side, in the database and outside, behind a stub that takes 200 ms and one that answers at once.

8,000 short rows, and 800 pages of 4,000 characters behind the fast stub, for one share of work that must not fall to one worker.
Each worker has two requests of 100 texts in flight. All have worked before the clock starts. The processor time is that of
their backends; the share of lock waits is that of samples in which one of them waited for a lock.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness import Bench, Figure, scalar
from workers import (
    Session,
    create_pipeline,
    fill,
    pending,
    processor_seconds,
    recreate_source,
    register_stub,
    remote_workers,
    wait_until,
)

from generated_names import Generated
from stub_provider import StubProvider, stub_provider

ROWS, PAGES, DIMENSIONS, LATENCY = 8_000, 800, 384, 0.2
REQUEST_ITEMS, CONCURRENCY, WARM_UP = 100, 2, 1_000
COUNTS = (1, 2, 4, 8)
# Times the even share that the busiest worker may have of long pages; and the fill rate of 4 workers to be linear on more cores.
MOST_OF_ONE = 2.0
_PIDS = "SELECT coalesce(array_agg(pid ORDER BY pid), '{}') FROM embedline.worker"
_LOCKED = """
    SELECT count(*) FILTER (WHERE wait_event_type = 'Lock') FROM pg_stat_activity
    WHERE pid IN (SELECT pid FROM embedline.worker)
"""


@dataclass(frozen=True)
class Drain:
    """Rows a second, microseconds of processor time a vector, share of samples with a lock wait, share of the busiest."""

    rate: float
    cpu: float
    locked: float
    busiest: float


def run(bench: Bench) -> None:
    """Drain the rows with each number of workers, in each place."""
    places: dict[str, Callable[[Bench, Session, int], contextlib.AbstractContextManager[None]]] = {
        "inside": _inside,
        "outside": remote_workers,
    }
    task = bench.progress.add_task("Draining", total=len(places) * len(COUNTS) * 3 * bench.rounds)
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        model = register_stub(session, provider, max_batch_items=REQUEST_ITEMS, concurrency=CONCURRENCY)
        for label, latency, long in (("200 ms", LATENCY, False), ("at once", 0.0, False), ("long pages", 0.0, True)):
            for place, working in places.items():
                found: dict[int, list[Drain]] = {count: [] for count in COUNTS}
                for _ in range(bench.rounds):
                    for count in COUNTS:
                        _prepare(session, model)
                        with working(bench, session, count):
                            found[count].append(_measure(session, provider, latency, long=long))
                        bench.progress.update(task, advance=1)
                _report(bench, f"{label}, {place}", found, is_long=long)


def _report(bench: Bench, label: str, found: dict[int, list[Drain]], *, is_long: bool) -> None:
    alone = statistics.median(drain.rate for drain in found[1])
    for count, drains in found.items():
        rate = statistics.median(drain.rate for drain in drains)
        cpu = statistics.median(drain.cpu for drain in drains)
        locked = max(drain.locked for drain in drains)
        detail = f"{rate / alone:.2f} × one; {cpu:.0f} µs of a core a vector; lock waits in {locked:.0%} of samples"
        bench.add(Figure(f"{label}: {count}", rate, "rows/s", detail=detail))
    if is_long:
        busiest = max(drain.busiest for drain in found[8])
        bench.add(Figure("  busiest of 8, times its even share", busiest * 8, "×", MOST_OF_ONE))


def _prepare(session: Session, model: str) -> None:
    recreate_source(session)
    create_pipeline(session, model)
    session.execute("SELECT embedline.grant_remote('bench', current_user::name)")


def _measure(session: Session, provider: StubProvider, latency: float, *, long: bool) -> Drain:
    provider.behave()
    fill(session, range(1, WARM_UP + 1))
    wait_until(lambda: pending(session) == 0, "the workers are warm")
    provider.behave(latency=latency)
    pids = list(scalar(session, _PIDS))
    session.execute("CHECKPOINT")
    before = [processor_seconds(pid) for pid in pids]
    vectors_before = scalar(session, f"SELECT count(*) FROM {Generated('bench')('v1')}")
    start = time.perf_counter()
    _insert(session, long=long)
    samples: list[int] = []
    while pending(session) > 0:
        samples.append(int(scalar(session, _LOCKED)))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    spent = [processor_seconds(pid) - first for pid, first in zip(pids, before, strict=True)]
    vectors = scalar(session, f"SELECT count(*) FROM {Generated('bench')('v1')}") - vectors_before
    if vectors < (PAGES if long else ROWS):
        raise SystemExit(f"{vectors} vectors are stored")
    return Drain(
        rate=(PAGES if long else ROWS) / seconds,
        cpu=sum(spent) / vectors * 1e6,
        locked=sum(sample > 0 for sample in samples) / max(len(samples), 1),
        busiest=max(spent) / sum(spent),
    )


def _insert(session: Session, *, long: bool) -> None:
    if not long:
        fill(session, range(WARM_UP + 1, WARM_UP + ROWS + 1))
        return
    session.execute(
        "INSERT INTO bench_source (id, body) SELECT g, (SELECT string_agg('Word ' || md5((g * 1000 + n)::text) || '.', ' ')"
        " FROM generate_series(1, 104) AS n) FROM generate_series(%s::bigint, %s) AS g",
        (WARM_UP + 1, WARM_UP + PAGES),
    )


@contextlib.contextmanager
def _inside(bench: Bench, session: Session, count: int) -> Iterator[None]:
    """Run so many resident workers for the length of a block."""
    sessions = [bench.connect() for _ in range(count)]
    call = "CALL embedline.run_worker(slot => %s)"
    threads = [threading.Thread(target=one.execute, args=(call, (slot,))) for slot, one in enumerate(sessions, start=1)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: scalar(session, "SELECT count(*) FROM embedline.worker") == count, "the workers are there")
        yield
    finally:
        session.execute("SELECT embedline.unschedule_workers()")
        for thread, one in zip(threads, sessions, strict=True):
            thread.join()
            one.close()
