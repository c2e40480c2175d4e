"""Workers outside the database against one in it: 12,000 short rows through a stub that takes 200 ms for each request.

Each worker has two requests of 100 texts in flight. Outside, there is one worker, and there are four, each a process of its own.
All have worked before the rows are inserted. The processor time is that of their backends, from /proc; the program that
inserts the rows is not counted.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from harness import Bench, Figure
from workers import (
    Session,
    check_count,
    check_vector,
    create_pipeline,
    fill,
    pending,
    processor_seconds,
    recreate_source,
    register_stub,
    remote_workers,
    resident_worker,
    spread,
    wait_until,
)

from stub_provider import StubProvider, stub_provider

ROWS, DIMENSIONS, LATENCY = 12_000, 384, 0.2
REQUEST_ITEMS, CONCURRENCY = 100, 2
LEAST_TIMES, MOST_CPU = 3.0, 1.15
# Rows of the drain before the clock starts.
WARM_UP = 2_000


@dataclass(frozen=True)
class Drain:
    """Seconds of a drain, and microseconds of processor time of the workers' backends for each vector."""

    seconds: float
    cpu: float


def run(bench: Bench) -> None:
    """Drain the rows in each way in turn."""
    ways: dict[str, Callable[[Bench, Session], contextlib.AbstractContextManager[object]]] = {
        "one in the database": lambda bench, session: resident_worker(bench),
        "one outside": lambda bench, session: remote_workers(bench, session, 1),
        "four outside": lambda bench, session: remote_workers(bench, session, 4),
    }
    drains: dict[str, list[Drain]] = {way: [] for way in ways}
    task = bench.progress.add_task("Draining", total=bench.rounds * len(ways))
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        model = register_stub(session, provider, max_batch_items=REQUEST_ITEMS, concurrency=CONCURRENCY)
        for number in range(bench.rounds):
            for way, working in list(ways.items())[:: 1 if number % 2 else -1]:
                recreate_source(session)
                create_pipeline(session, model)
                session.execute("SELECT embedline.grant_remote('bench', current_user::name)")
                with working(bench, session):
                    drains[way].append(_measure(session, provider))
                bench.progress.update(task, advance=1)
    _report(bench, drains)


def _report(bench: Bench, drains: dict[str, list[Drain]]) -> None:
    inside = drains["one in the database"]
    for way, found in drains.items():
        rates = [ROWS / drain.seconds for drain in found]
        bench.add(Figure(f"{way}: rate", statistics.median(rates), "rows/s", detail=spread(rates, ",.0f")))
        cpu = [drain.cpu for drain in found]
        bench.add(
            Figure("  backends' processor time", statistics.median(cpu), "µs a vector", detail=spread(cpu, ".0f"))
        )
    for way in ("one outside", "four outside"):
        pairs = list(zip(inside, drains[way], strict=True))
        limit = LEAST_TIMES if way == "four outside" else None
        times = [a.seconds / b.seconds for a, b in pairs]
        label = f"{way}: rate of one in the database"
        bench.add(Figure(label, statistics.median(times), "×", limit, spread(times), at_least=True))
        shares = [b.cpu / a.cpu for a, b in pairs]
        bench.add(Figure("  processor time of that", statistics.median(shares), "×", MOST_CPU, spread(shares)))


def _measure(session: Session, provider: StubProvider) -> Drain:
    provider.behave()
    fill(session, range(1, WARM_UP + 1))
    wait_until(lambda: pending(session) == 0, "the workers are warm")
    provider.behave(latency=LATENCY)
    provider.counts()
    session.execute("CHECKPOINT")
    before, start = _cpu(session), time.perf_counter()
    fill(session, range(WARM_UP + 1, WARM_UP + ROWS + 1))
    wait_until(lambda: pending(session) == 0, "nothing waits")
    seconds = time.perf_counter() - start
    cpu = _cpu(session) - before
    check_count(session, WARM_UP + ROWS, provider.counts()["texts"], ROWS)
    check_vector(session, provider, WARM_UP + 4711)
    return Drain(seconds, cpu / ROWS * 1e6)


def _cpu(session: Session) -> float:
    """Return the processor seconds of the workers' backends so far."""
    return sum(processor_seconds(pid) for (pid,) in session.execute("SELECT pid FROM embedline.worker").fetchall())
