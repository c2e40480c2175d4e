"""What a provider call of 10 s holds up: no transaction, no snapshot, and no UPDATE or DELETE of a row in flight.

A resident worker has 800 rows at the stub, which takes 10 s for each request. Meanwhile pg_stat_activity is read every
50 ms, and an application updates 50 of these rows and deletes 50 others, each in a transaction of its own; a table that
nobody watches gets the same statements in turn, to show what the server's own commit takes. In the end every vector must
be that of its row's content, and nothing may be left of the deleted rows.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field

from harness import Bench, Figure, scalar, timed
from workers import (
    Session,
    check_vector,
    create_pipeline,
    drain,
    fill,
    pending,
    recreate_source,
    register_stub,
    resident_worker,
    wait_until,
)

from generated_names import BENCH
from stub_provider import StubProvider, stub_provider

ROWS, EDITS, DIMENSIONS, REQUEST_ITEMS = 800, 50, 384, 100
LATENCY, SAMPLE_SECONDS = 10.0, 0.05
OLD_SECONDS, XMIN_SECONDS, MOST_MS = 0.5, 1.0, 10
UPDATED, DELETED = range(1, 2 * EDITS, 2), range(2, 2 * EDITS + 1, 2)
# A worker between two of its transactions is in one that has neither a snapshot nor an id: PostgreSQL starts it at the
# commit of the last. Its age counts here all the same.
ACTIVITY = """
    SELECT state, extract(epoch FROM clock_timestamp() - xact_start)::float8, backend_xmin IS NOT NULL,
        backend_xid IS NOT NULL
    FROM pg_stat_activity WHERE pid = %s
"""
LEFT = f"""
    SELECT (SELECT count(*) FROM {BENCH("document")} WHERE key_id NOT IN (SELECT id FROM bench_source))
        + (SELECT count(*) FROM {BENCH("chunk")} WHERE key_id NOT IN (SELECT id FROM bench_source))
        + (SELECT count(*) FROM {BENCH.version(1)} WHERE chunk_id NOT IN
            (SELECT chunk_id FROM {BENCH("chunk")}))
"""


@dataclass
class Activity:
    """Seconds that the worker's transactions were old, and that they held a snapshot, as seen in each sample."""

    ages: list[float] = field(default_factory=list)
    snapshots: list[float] = field(default_factory=list)
    with_id: int = 0


def run(bench: Bench) -> None:
    """Let the worker wait for its provider, and look."""
    activity, stop = Activity(), threading.Event()
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        model = register_stub(session, provider, max_batch_items=REQUEST_ITEMS)
        recreate_source(session)
        create_pipeline(session, model)
        _plain(session)
        # Not the first work of its kind: the sessions are warm, and there is a row of each kind already.
        fill(session, range(-1, 1))
        drain(session)
        task = bench.progress.add_task("Waiting for the provider", total=3)
        with resident_worker(bench) as pid:
            provider.behave(latency=LATENCY)
            fill(session, range(1, ROWS + 1))
            wait_until(lambda: provider.in_flight() == ROWS, "all rows are in flight")
            watcher = threading.Thread(target=_watch, args=(bench, pid, activity, stop))
            started = time.perf_counter()
            watcher.start()
            spent = _edit(session)
            bench.progress.update(task, advance=1)
            if provider.in_flight() != ROWS:
                raise SystemExit(f"the edits took {time.perf_counter() - started:.1f} s, longer than the call")
            # The next calls, for what was edited, need not be slow.
            provider.behave(latency=0)
            wait_until(lambda: provider.in_flight() == 0, "the provider has answered")
            stop.set()
            watcher.join()
            bench.progress.update(task, advance=1)
            wait_until(lambda: pending(session) == 0, "everything is written")
        _check(session, provider)
    _report(bench, activity, spent)


def _plain(session: Session) -> None:
    session.execute("CREATE TABLE bench_plain (id bigint PRIMARY KEY, body text NOT NULL)")
    session.execute("INSERT INTO bench_plain SELECT g, md5(g::text) FROM generate_series(1, %s) AS g", (ROWS,))


def _edit(session: Session) -> dict[tuple[str, str], list[float]]:
    """Update and delete rows in flight and of the plain table, in turn; return the milliseconds of each statement."""
    statements = {
        "UPDATE": "UPDATE {} SET body = 'changed ' || body WHERE id = %s",
        "DELETE": "DELETE FROM {} WHERE id = %s",
    }
    found: dict[tuple[str, str], list[float]] = {}
    for table in ("bench_source", "bench_plain"):
        for verb, statement in statements.items():
            session.execute(statement.format(table), (-1 if verb == "UPDATE" else 0,))
    for keys in zip(UPDATED, DELETED, strict=True):
        for (verb, statement), key in zip(statements.items(), keys, strict=True):
            for table in ("bench_source", "bench_plain"):
                query = statement.format(table)
                elapsed = timed(lambda q=query, k=key: session.execute(q, (k,)))
                found.setdefault((verb, table), []).append(elapsed * 1000)
    return found


def _watch(bench: Bench, pid: int, activity: Activity, stop: threading.Event) -> None:
    with bench.connect() as session:
        while not stop.is_set():
            row = session.execute(ACTIVITY, (pid,)).fetchone()
            if row is not None and row[1] is not None:
                activity.ages.append(row[1])
                if row[2]:
                    activity.snapshots.append(row[1])
                activity.with_id += row[3]
            else:
                activity.ages.append(0.0)
            time.sleep(SAMPLE_SECONDS)


def _check(session: Session, provider: StubProvider) -> None:
    left = scalar(session, LEFT)
    stored = scalar(session, "SELECT count(*) FROM bench_embedding WHERE chunk = body")
    expected = scalar(session, "SELECT count(*) FROM bench_source")
    if left or stored != expected or expected != ROWS + 1 - EDITS:
        raise SystemExit(f"{left} rows are left of deleted ones, {stored} of {expected} rows are embedded as they are")
    for key in (*UPDATED[:5], UPDATED[-1], ROWS):
        check_vector(session, provider, key)


def _report(bench: Bench, activity: Activity, spent: dict[tuple[str, str], list[float]]) -> None:
    old = sum(age > OLD_SECONDS for age in activity.ages)
    detail = f"of {len(activity.ages)} in {LATENCY:.0f} s; {activity.with_id} with a transaction id"
    bench.add(Figure("samples with a transaction older than 0.5 s", old, "samples", 0, detail))
    bench.add(
        Figure("  oldest", max(activity.ages) * 1000, "ms", detail="from the last commit, with or without a snapshot")
    )
    held = max(activity.snapshots, default=0.0)
    detail = f"{len(activity.snapshots)} samples had one"
    bench.add(Figure("backend_xmin held at most", held * 1000, "ms", XMIN_SECONDS * 1000, detail))
    for verb in ("UPDATE", "DELETE"):
        ours, plain = spent[verb, "bench_source"], spent[verb, "bench_plain"]
        detail = (
            f"median {statistics.median(ours):.1f} ms of {len(ours)};"
            f" plain table: most {max(plain):.1f}, median {statistics.median(plain):.1f} ms"
        )
        bench.add(Figure(f"{verb} of a row in flight, most", max(ours), "ms", MOST_MS, detail))
