"""What create_pipeline costs on a large table: it writes one row for each block range, none for each source row."""

from __future__ import annotations

from harness import Bench, Figure, scalar, timed

from generated_names import BENCH

ROWS = 1_000_000
FILL = f"""
    INSERT INTO bench_large
    SELECT g, 'Title of row ' || g, left(repeat(md5(g::text) || ' ', 7), 200), g % 100
    FROM generate_series(1::bigint, {ROWS}) AS g
"""
CREATE = "SELECT embedline.create_pipeline('bench', 'bench_large', $$title || E'\\n\\n' || body$$, 'static-256')"


def run(bench: Bench) -> None:
    """Create the pipeline in a new session each time, as its user would."""
    task = bench.progress.add_task("Filling a table of 1,000,000 rows", total=bench.rounds + 1)
    with bench.connect() as connection:
        connection.execute("CREATE TABLE bench_large (id bigint PRIMARY KEY, title text, body text, n integer)")
        connection.execute(FILL)
        blocks = scalar(connection, "SELECT pg_relation_size('bench_large') / current_setting('block_size')::integer")
    bench.progress.update(task, advance=1, description="Creating the pipeline")
    seconds, enqueued, ranges = [], 0, 0
    for _ in range(bench.rounds):
        with bench.connect() as connection:
            seconds.append(timed(lambda connection=connection: connection.execute(CREATE)))
            enqueued = max(enqueued, scalar(connection, f"SELECT count(*) FROM {BENCH('outbox')}"))
            ranges = scalar(connection, "SELECT count(*) FROM embedline.backfill_range")
            connection.execute("SELECT embedline.drop_pipeline('bench')")
        bench.progress.update(task, advance=1)
    median = sorted(seconds)[len(seconds) // 2]
    detail = f"slowest of {len(seconds)} new sessions; median {median * 1000:.0f} ms"
    bench.add(Figure("create_pipeline on 1,000,000 rows", max(seconds) * 1000, "ms", 1000, detail))
    bench.add(Figure("  outbox rows", enqueued, "rows", 0))
    bench.add(Figure("  blocks of the source", blocks, "blocks"))
    bench.add(Figure("  backfill ranges", ranges, "ranges"))
