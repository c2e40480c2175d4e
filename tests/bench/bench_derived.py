"""Derived vectors: what the triggers add to writes of events, and how many subjects a worker computes a second.

5,000 items of 256 dimensions, and 50,000 events of 5,000 readers, ten each. Each write is made on a plain table and on one
with derived vectors in turn, and which is first changes every round.
"""

from __future__ import annotations

from harness import Bench, Figure, scalar, timed
from workers import Session, check_count, create_pipeline, drain, fill, recreate_source, register_stub

from generated_names import derived
from stub_provider import stub_provider

ITEMS, READERS, EVENTS = 5_000, 5_000, 50_000
DIMENSIONS = 256
SIDES = ("bench_event_plain", "bench_event_watched")
SETUP = (
    "DROP TABLE IF EXISTS bench_events, bench_event_plain, bench_event_watched",
    f"CREATE TABLE bench_events AS SELECT g AS event_id, g * 7919 % {READERS} AS reader, 1 + g * 104729 % {ITEMS} AS item,"
    " 1.0::double precision AS weight, '2026-01-01'::timestamptz + g * interval '1 minute' AS at"
    f" FROM generate_series(1::bigint, {EVENTS}) AS g",
    *(
        f"CREATE TABLE {side} (event_id bigint PRIMARY KEY, reader bigint, item bigint, weight double precision, at timestamptz)"
        " WITH (autovacuum_enabled = off)"
        for side in SIDES
    ),
    *(f"CREATE INDEX ON {side} ({column})" for side in SIDES for column in ("reader", "item")),
)
DERIVE = """
    SELECT embedline.create_derived('bench_readers', 'bench', 'bench_event_watched', subject => 'reader', item_key => 'item',
        weight => 'weight', at => 'at', half_life => '30 days')
"""
DIRTY = derived("bench_readers", "dirty")
COMPUTED = f"SELECT count(*) FROM {derived('bench_readers', 'of_v1')}"
INSERT = "INSERT INTO {} SELECT * FROM bench_events"
ONE_BY_ONE = """
    DO $do$ BEGIN
        FOR i IN 1..5000 LOOP INSERT INTO {0} SELECT * FROM bench_events WHERE event_id = i; END LOOP;
    END $do$
"""
OPERATIONS = (
    ("INSERT of 50,000 events", INSERT, "TRUNCATE {}"),
    ("INSERT of 5,000 events, one a statement", ONE_BY_ONE, "TRUNCATE {}"),
    ("UPDATE of 50,000 weights", "UPDATE {} SET weight = weight + 1", None),
    ("DELETE of 50,000 events", "DELETE FROM {}", None),
)


def run(bench: Bench) -> None:
    """Measure the writes, then the workers' part."""
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        model = register_stub(session, provider)
        recreate_source(session)
        create_pipeline(session, model)
        fill(session, range(1, ITEMS + 1))
        provider.counts()
        drain(session)
        check_count(session, ITEMS, provider.counts()["texts"], ITEMS)
        for statement in SETUP:
            session.execute(statement)
        session.execute("CREATE UNIQUE INDEX ON bench_events (event_id)")
        session.execute("VACUUM ANALYZE bench_events")
        session.execute(DERIVE)
        _compare_writes(bench, session)
        _compute(bench, session)
        session.execute("SELECT embedline.drop_derived('bench_readers')")


def _compare_writes(bench: Bench, session: Session) -> None:
    task = bench.progress.add_task("Writing events", total=(bench.rounds + 1) * len(OPERATIONS))
    for position, (label, statement, before) in enumerate(OPERATIONS):
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(bench.rounds + 1):
            for side in SIDES if number % 2 else SIDES[::-1]:
                session.execute(f"TRUNCATE {side}")
                if before is None:
                    session.execute(INSERT.format(side))
                session.execute(f"TRUNCATE {DIRTY}")
                session.execute(f"VACUUM ANALYZE {side}")
                session.execute("CHECKPOINT")
                elapsed = timed(lambda side=side, statement=statement: session.execute(statement.format(side)))
                if number > 0:
                    seconds[side].append(elapsed)
            bench.progress.update(task, advance=1, description=label)
        bench.compare(
            label, seconds["bench_event_watched"], seconds["bench_event_plain"], 1.6 if not position else None
        )
        if position == 0:
            added = min(seconds["bench_event_watched"]) - min(seconds["bench_event_plain"])
            bench.add(Figure("  added for each event", added / EVENTS * 1e6, "µs"))


def _compute(bench: Bench, session: Session) -> None:
    session.execute("TRUNCATE bench_event_watched")
    drain(session)
    rates = []
    task = bench.progress.add_task("Computing", total=bench.rounds)
    for _ in range(bench.rounds):
        session.execute(f"TRUNCATE bench_event_watched; {INSERT.format('bench_event_watched')}")
        session.execute(f"TRUNCATE {DIRTY}; INSERT INTO {DIRTY} (subjects) VALUES (NULL)")
        session.execute("VACUUM ANALYZE bench_event_watched")
        rates.append(READERS / timed(lambda: drain(session)))
        if scalar(session, COMPUTED) != READERS:
            raise SystemExit(f"{scalar(session, COMPUTED)} vectors, not {READERS}")
        bench.progress.update(task, advance=1)
    rates.sort()
    bench.add(
        Figure(
            "subjects of ten events computed in one session",
            rates[len(rates) // 2],
            "subjects/s",
            detail=f"{rates[0]:.0f} to {rates[-1]:.0f}",
        )
    )
