"""A database with all that a report tells of, and words that no report may show."""

from __future__ import annotations

from pathlib import Path

import psycopg

import programs
from embedline.client.build_index import PsycopgClient, build
from generated_names import PAGE
from stub_provider import StubProvider
from support import create_pipeline, settle
from upgrading import add_version, cut_over, settle_versions
from working import create_stub_model, dsn_of

# In each text, key, query and group of the sources.
MARK = "quokkasecret"
_ROWS = 120
# Work of 40 days: a week's wave, with a day without any.
_HISTORY = """
    INSERT INTO embedline.batch_hour (
        pipeline_id, version_id, hour, batch_count, row_count, embedded_count, retried_count, dead_count, chunk_count,
        request_count, token_count, content_bytes, claim_ms, read_ms, chunk_ms, embed_ms, write_ms)
    SELECT p.pipeline_id, p.serving_version_id, date_trunc('day', clock_timestamp(), 'UTC') - d * interval '1 day'
        + interval '9 hours', 40, n, n, n / 50, 0, n, n / 100, n * 90, n * 400, n / 20, n / 10, n / 9, n * 8, n / 2
    FROM embedline.pipeline AS p
    CROSS JOIN generate_series(1, 40) AS d
    CROSS JOIN LATERAL (SELECT (2000 + 1500 * sin(d * 0.9) + 40 * d)::integer AS n) AS w
    WHERE d <> 6
"""
_SPENDING = """
    INSERT INTO embedline.usage_day (day, model_id, pipeline_id, requests, tokens, money, busy_seconds)
    SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date - d, m.model_id, p.pipeline_id, 100 + d, 150000 + 9000 * d,
        0.4 + 0.03 * d, 60
    FROM generate_series(1, 40) AS d, embedline.model AS m, embedline.pipeline AS p WHERE m.name = 'stub'
"""


def furnish(connection: psycopg.Connection, stub: StubProvider) -> None:
    """Make a pipeline with an upgrade, dead letters, budgets, and work of 40 days."""
    create_stub_model(connection, stub, price_per_million_tokens=5)
    connection.execute("CREATE TABLE page (name text PRIMARY KEY, title text, body text)")
    connection.execute(
        f"INSERT INTO page SELECT '{MARK} key ' || n, '{MARK} title ' || mod(n, 3), '{MARK} row ' || n || ' of ' || md5(n::text)"
        " FROM generate_series(1, %s) AS n",
        (_ROWS,),
    )
    create_pipeline(connection, content="body", model="stub")
    settle(connection)
    build(PsycopgClient(connection), "page")
    connection.execute(
        f"CREATE TABLE canary AS SELECT body AS query, name AS key FROM page WHERE title <> '{MARK} title 0'"
    )
    connection.execute("SELECT embedline.preview_version('page', 'static-256', 'canary', sample => 100)")
    add_version(connection, "static-256")
    settle_versions(connection)
    build(PsycopgClient(connection), "page", 2)
    connection.execute("SELECT embedline.evaluate('page', 2, 'canary', breakdown => 'title')")
    cut_over(connection, 2)
    stub.behave(poison="poisoned")
    connection.execute(
        f"INSERT INTO page SELECT '{MARK} bad ' || n, 'x', '{MARK} poisoned ' || n FROM generate_series(1, 3) AS n"
    )
    connection.execute(f"INSERT INTO page VALUES ('{MARK} empty', '', U&'\\200B')")
    settle(connection)
    # An error of a provider may quote what it was sent.
    connection.execute(
        "INSERT INTO embedline.pipeline_health (pipeline_id, last_error) SELECT pipeline_id, %s FROM embedline.pipeline"
        " ON CONFLICT (pipeline_id) DO UPDATE SET last_error = excluded.last_error",
        (f"the provider said: {MARK}",),
    )
    connection.execute("UPDATE embedline.dead_letter SET message = message || %s", (MARK,))
    connection.execute("SELECT embedline.set_budget('month', model => 'stub', money => 25)")
    connection.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 2000000)")
    connection.execute(_HISTORY)
    connection.execute(_SPENDING)


def write_report(connection: psycopg.Connection, path: Path, *options: str, dsn: str | None = None) -> str:
    """Run the command; return the page."""
    done = programs.run("embedline", "report", "--dsn", dsn or dsn_of(connection), "--output", str(path), *options)
    assert done.returncode == 0, done.stderr
    return path.read_text(encoding="utf-8")


def vectors(connection: psycopg.Connection) -> list[str]:
    """Return a component of each stored vector, as text; short ones may be other figures by chance."""
    query = f"SELECT (embedding_v2::real[])[1]::text FROM {PAGE('v2')}"
    found = [row[0] for row in connection.execute(query).fetchall() if len(row[0]) > 7]
    assert len(found) > 50
    return found
