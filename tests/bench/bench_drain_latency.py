"""A provider that takes 200 ms for each request: one worker has to keep eight in flight all the time.

Ideal is 8 requests of 100 texts every 0.2 s. The time counts from the CALL to its return, so the first requests, the
last ones and the stub's own work are in it; live changes and backfill, each with 20,000 rows.
"""

from __future__ import annotations

import statistics

from harness import Bench, Figure
from workers import (
    Session,
    check_count,
    check_vector,
    create_pipeline,
    drain,
    fill,
    recreate_source,
    register_stub,
    spread,
)

from stub_provider import StubProvider, stub_provider

ROWS, DIMENSIONS = 20_000, 384
LATENCY, CONCURRENCY, REQUEST_ITEMS = 0.2, 8, 100
IDEAL = CONCURRENCY * REQUEST_ITEMS / LATENCY
SHARE = 0.85
SIDES = ("live", "backfill")


def run(bench: Bench) -> None:
    """Drain live changes and a backfill in turn, in `bench.rounds` rounds after one that warms the session."""
    task = bench.progress.add_task("Draining", total=(bench.rounds + 1) * len(SIDES))
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, int] = dict.fromkeys(SIDES, 0)
    requests: dict[str, int] = dict.fromkeys(SIDES, 0)
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        model = register_stub(session, provider, max_batch_items=REQUEST_ITEMS, concurrency=CONCURRENCY)
        provider.behave(latency=LATENCY)
        for number in range(bench.rounds + 1):
            for side in SIDES if number % 2 else SIDES[::-1]:
                seconds, counts = _drain(session, provider, model, side)
                peaks[side] = max(peaks[side], counts["peak"])
                requests[side] = max(requests[side], counts["requests"])
                if number > 0:
                    rates[side].append(ROWS / seconds)
                bench.progress.update(task, advance=1)
    for side in SIDES:
        rate = statistics.median(rates[side])
        shares = [found / IDEAL for found in rates[side]]
        detail = f"{rate:,.0f} of {IDEAL:,.0f} rows/s; {spread(shares)}"
        bench.add(Figure(f"{side}: share of the ideal rate", rate / IDEAL, "×", SHARE, detail, at_least=True))
        bench.add(Figure("  requests in flight at most", peaks[side], "requests", CONCURRENCY))
        detail = f"{ROWS // REQUEST_ITEMS} full ones would do"
        bench.add(Figure("  requests for 20,000 rows at most", requests[side], "requests", detail=detail))


def _drain(session: Session, provider: StubProvider, model: str, side: str) -> tuple[float, dict[str, int]]:
    recreate_source(session)
    if side == "live":
        create_pipeline(session, model)
    fill(session, range(1, ROWS + 1))
    if side == "backfill":
        create_pipeline(session, model)
    session.execute("CHECKPOINT")
    provider.counts()
    seconds = drain(session)
    counts = provider.counts()
    check_count(session, ROWS, counts["texts"], ROWS)
    check_vector(session, provider, 4711)
    return seconds, counts
