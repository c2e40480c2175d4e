"""What capture costs an application: the same statements on a plain table and on one with a pipeline.

Each operation runs on both tables in turn, and which is first changes every round; before each, the outbox is
emptied, the table vacuumed and a checkpoint done. Autovacuum is off for these tables, so that it falls into neither side.
"""

from __future__ import annotations

from typing import Any

import psycopg
from harness import Bench, Figure, scalar, timed

from generated_names import BENCH

ROWS = 50_000
SIDES = ("bench_plain", "bench_watched")
# The public view: what waits, wherever it is kept.
# Counted exactly; embedline.status estimates long queues.
PENDING = f"""
    SELECT (SELECT count(*) FROM {BENCH("outbox")}) + coalesce((
        SELECT sum(cardinality(q.key_id)) FROM (
            SELECT key_id FROM {BENCH("inbox")} UNION ALL SELECT key_id FROM {BENCH("deleted")}
        ) AS q
    ), 0)::bigint
"""
QUEUES = (
    "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'embedline_data'::regnamespace"
    " AND relname IN ('bench_outbox', 'bench_inbox', 'bench_deleted', 'bench_hidden')"
)

SETUP = f"""
    CREATE TABLE bench_rows AS
    SELECT g AS id, 'Title of row ' || g AS title, left(repeat(md5(g::text) || ' ', 7), 200) AS body, g % 100 AS n
    FROM generate_series(1::bigint, {ROWS}) AS g;
    CREATE TABLE bench_plain (id bigint PRIMARY KEY, title text, body text, n integer) WITH (autovacuum_enabled = off);
    CREATE TABLE bench_watched (id bigint PRIMARY KEY, title text, body text, n integer) WITH (autovacuum_enabled = off);
    VACUUM ANALYZE bench_rows;
"""
CREATE = """
    SELECT embedline.create_pipeline('bench', 'bench_watched', $$title || E'\\n\\n' || body$$, 'static-256',
        index_method => 'none')
"""
# What a worker leaves of each row: a document, a chunk, a vector of 256 dimensions.
EMBEDDED = (
    f"INSERT INTO {BENCH('document')} (key_id, content_hash, state, embedded_at)"
    " SELECT id, sha256(convert_to(title || E'\\n\\n' || body, 'UTF8')), 'embedded', now() FROM bench_rows",
    f"INSERT INTO {BENCH('chunk')} (chunk_id, key_id, seq, start_offset, end_offset, content_hash, content)"
    " SELECT id, id, 0, 0, 200, md5(id::text)::uuid, body FROM bench_rows",
    f"INSERT INTO {BENCH.version(1)} (chunk_id, embedding_v1)"
    " SELECT id, array_fill(1::real, ARRAY[256])::vector FROM bench_rows",
)

# Label, statement, limit of the ratio, rows that it must put into the outbox.
INSERT = ("INSERT of 50,000 rows", "INSERT INTO {} SELECT * FROM bench_rows", 1.6, ROWS)
DELETE = "DELETE FROM {}"
RELOAD = "BEGIN; DELETE FROM {0}; INSERT INTO {0} SELECT * FROM bench_rows; COMMIT"
FORGET = f"TRUNCATE {BENCH('document')}, {BENCH('chunk')} CASCADE"
OPERATIONS: tuple[tuple[str, str, float | None, int], ...] = (
    INSERT,
    ("UPDATE of an unrelated column", "UPDATE {} SET n = n + 1", 1.1, 0),
    ("UPDATE that sets body = body", "UPDATE {} SET body = body", None, 0),
    ("UPDATE of the content", "UPDATE {} SET body = 'x' || body", None, ROWS),
    ("DELETE, no row embedded yet", DELETE, 3.0, ROWS),
    ("INSERT again", INSERT[1], None, ROWS),
    ("reload by DELETE and INSERT, each row embedded", RELOAD, None, 2 * ROWS),
    ("TRUNCATE, each row embedded", "TRUNCATE {}", None, ROWS),
    ("INSERT again", INSERT[1], None, ROWS),
    ("DELETE, each row embedded", DELETE, 3.0, ROWS),
)


def run(bench: Bench) -> None:
    """Measure every operation on both sides, in `bench.rounds` interleaved rounds."""
    seconds: dict[tuple[int, str], list[float]] = {}
    enqueued: dict[int, set[int]] = {}
    with bench.connect() as connection:
        _setup(connection)
        task = bench.progress.add_task("Measuring", total=(bench.rounds + 1) * len(OPERATIONS) * 2)
        for number in range(bench.rounds + 1):
            for position, (label, statement, _, _) in enumerate(OPERATIONS):
                if "embedded" in label and "no row" not in label:
                    _embed_all(connection)
                for side in SIDES if number % 2 else SIDES[::-1]:
                    bench.progress.update(task, advance=1, description=label)
                    elapsed = _measure(connection, side, statement)
                    if number > 0:  # the first round warms caches and file system
                        seconds.setdefault((position, side), []).append(elapsed)
                    if side == "bench_watched":
                        enqueued.setdefault(position, set()).add(scalar(connection, PENDING))
            for table in SIDES:
                connection.execute(f"TRUNCATE {table}")
            connection.execute(FORGET)
    for position, (label, _, limit, expected) in enumerate(OPERATIONS):
        bench.compare(label, seconds[position, "bench_watched"], seconds[position, "bench_plain"], limit)
        worst = max(enqueued[position])
        bench.add(Figure("  rows enqueued", worst, "rows", expected))
        if min(enqueued[position]) < expected:
            raise SystemExit(f"{label}: {min(enqueued[position])} rows in the outbox, not {expected}")


def _setup(connection: psycopg.Connection[Any]) -> None:
    for statement in SETUP.split(";")[:-1]:
        connection.execute(statement)
    connection.execute(CREATE)
    generated = (BENCH("document"), BENCH("chunk"), BENCH.version(1))
    for table in (*generated, *(queue for (queue,) in connection.execute(QUEUES).fetchall())):
        connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")


def _embed_all(connection: psycopg.Connection[Any]) -> None:
    connection.execute(FORGET)
    for statement in EMBEDDED:
        connection.execute(statement)
    connection.execute(f"VACUUM ANALYZE {BENCH('document')}, {BENCH('chunk')}, {BENCH.version(1)}")


def _measure(connection: psycopg.Connection[Any], side: str, statement: str) -> float:
    for (queue,) in connection.execute(QUEUES).fetchall():
        connection.execute(f"TRUNCATE {queue}")
    connection.execute(f"VACUUM ANALYZE {side}")
    connection.execute("CHECKPOINT")
    return timed(lambda: connection.execute(statement.format(side)))
