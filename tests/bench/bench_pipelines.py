"""One pipeline and 1,000: what an idle worker takes, how long a commit waits for it, and how long status takes.

Each pipeline has a table of its own with 20 rows, which are embedded before anything is measured. Then one worker runs. Its
processor time is read from the system while nothing is written; then single rows are changed, each in a pipeline chosen at
random, and the routing view is asked until it shows the change.
"""

from __future__ import annotations

import random
import statistics
import time

from harness import Bench, Figure, percentile, scalar, timed
from workers import Session, processor_seconds, resident_worker, wait_until

COUNTS = (1, 1000)
ROWS, CHANGES, IDLE_SECONDS, STATUS_ROUNDS = 20, 100, 20, 5
IDLE_PERCENT, P50_MS, STATUS_MS = 3.0, 200.0, 300.0
POLL_SECONDS = 0.003


def run(bench: Bench) -> None:
    """Measure with one pipeline, then with all."""
    with bench.connect() as session:
        have = 0
        for count in COUNTS:
            task = bench.progress.add_task(f"Creating {count:,} pipelines", total=count - have)
            for number in range(have, count):
                _create(session, number)
                bench.progress.update(task, advance=1)
            have = count
            bench.progress.add_task("Embedding their rows", total=None)
            seconds = timed(lambda: session.execute("CALL embedline.run_worker(until_idle => true)"))
            embedded = scalar(session, "SELECT count(*) FROM embedline.status WHERE pending = 0 AND backfill_complete")
            if embedded != count:
                raise SystemExit(f"{embedded} of {count} pipelines are embedded")
            session.execute("VACUUM ANALYZE")
            bench.add(Figure(f"{count:,} pipelines: first {ROWS * count:,} rows embedded", seconds, "s"))
            _measure(bench, session, count)


def _create(session: Session, number: int) -> None:
    session.execute(f"CREATE TABLE bench_{number} (id integer PRIMARY KEY, body text NOT NULL)")
    session.execute(
        f"INSERT INTO bench_{number} SELECT g, 'row ' || g || ' of ' || md5(g::text) FROM generate_series(1, {ROWS}) AS g"
    )
    session.execute(
        "SELECT embedline.create_pipeline(%s, %s::regclass, 'body', 'static-256', index_method => 'none',"
        " chunking => 'none')",
        (f"bench_{number}", f"bench_{number}"),
    )


def _measure(bench: Bench, session: Session, count: int) -> None:
    label = f"{count:,} pipelines:"
    with resident_worker(bench) as pid:
        # Its first look is one at every pipeline.
        wait_until(lambda: _change(session, 0) is not None, "the worker is through with its first look", 120)
        bench.progress.add_task("Watching the idle worker", total=None)
        time.sleep(5)
        before = processor_seconds(pid)
        time.sleep(IDLE_SECONDS)
        percent = (processor_seconds(pid) - before) / IDLE_SECONDS * 100
        bench.add(Figure(f"{label} idle worker, of a core", percent, "%", IDLE_PERCENT))
        task = bench.progress.add_task("Changing rows", total=CHANGES)
        latencies = []
        for number in random.Random(1).choices(range(count), k=CHANGES):
            latencies.append(_change(session, number) * 1000)
            bench.progress.update(task, advance=1)
    detail = f"p90 {percentile(latencies, 0.9):.0f}, most {max(latencies):.0f} ms"
    bench.add(Figure(f"{label} commit to found, p50", statistics.median(latencies), "ms", P50_MS, detail))
    status = [timed(lambda: session.execute("SELECT * FROM embedline.status").fetchall()) for _ in range(STATUS_ROUNDS)]
    detail = f"rounds {min(status) * 1000:.0f} to {max(status) * 1000:.0f} ms"
    bench.add(
        Figure(f"{label} SELECT * FROM embedline.status", statistics.median(status) * 1000, "ms", STATUS_MS, detail)
    )


def _change(session: Session, number: int) -> float:
    """Change a row of a pipeline; return the seconds from the commit until the routing view shows it."""
    key, body = random.randint(1, ROWS), f"changed to {random.random()}"
    session.execute(f"UPDATE bench_{number} SET body = %s WHERE id = %s", (body, key))
    committed = time.perf_counter()
    found = f"SELECT count(*) FROM bench_{number}_embedding WHERE id = %s AND chunk = %s"
    while not scalar(session, found, (key, body)):
        if time.perf_counter() - committed > 60:
            raise SystemExit(f"a change of pipeline bench_{number} was not found in 60 s")
        time.sleep(POLL_SECONDS)
    # Not at the same point of the worker's pause each time.
    elapsed = time.perf_counter() - committed
    time.sleep(random.uniform(0.1, 0.3))
    return elapsed
