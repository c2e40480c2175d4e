"""Whatever one pipeline has waiting, or fails at, the others have their turn, and so has its own backfill."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from generated_names import Generated
from stub_provider import StubProvider, stub_provider
from support import data_count, scalar, settle, wait_until
from upgrading import versions
from working import (
    create_stub_model,
    create_stub_pipeline,
    dsn_of,
    flood,
    insert_rows,
    seconds_until_found,
    working,
    writing,
)

# What the maintenance of indexes asks of pg_cron, which lives in one database of a server only.
CRON = """
    CREATE SCHEMA cron;
    CREATE TABLE cron.job (jobid bigserial, jobname text, command text, database text, active boolean DEFAULT true);
    CREATE FUNCTION cron.schedule(text, text, text) RETURNS bigint LANGUAGE sql AS
        'INSERT INTO cron.job (jobname, command, database) VALUES ($1, $3, current_database()) RETURNING jobid';
    CREATE FUNCTION cron.unschedule(bigint) RETURNS boolean LANGUAGE sql AS 'DELETE FROM cron.job WHERE jobid = $1; SELECT true';
"""


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A pipeline that is filled; settings are the defaults again after the test."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=40)
    settle(stub_database)
    yield stub_database
    stub_database.execute(
        "SELECT embedline.configure(name, NULL) FROM unnest(ARRAY['live_share', 'min_rows', 'max_rows']) AS name"
    )


def _half_read(connection: psycopg.Connection, *tables: str) -> None:
    """Create pipelines with 30,000 live changes and 10,000 rows for the backfill each."""
    for table in tables:
        create_stub_pipeline(connection, table, rows=40_000)
        connection.execute(f"UPDATE {table} SET body = 'live ' || id WHERE id <= 30000")


def _embedded(connection: psycopg.Connection, table: str) -> tuple[int, int]:
    """Count the live changes and the rows of the backfill that are embedded."""
    found = connection.execute(
        "SELECT count(*) FILTER (WHERE key_id <= 30000), count(*) FILTER (WHERE key_id > 30000)"
        f" FROM {Generated(table)('chunk')}"
    ).fetchone()
    assert found is not None
    return found[0], found[1]


def test_an_index_that_cannot_be_maintained_keeps_no_row_waiting(page: psycopg.Connection) -> None:
    create_stub_pipeline(page, "held", rows=10, index_method="hnsw")
    settle(page)
    page.execute(scalar(page, "SELECT embedline.index_statement('held')").replace("CONCURRENTLY ", ""))
    page.execute(
        f"UPDATE pg_index SET indisvalid = false WHERE indrelid = '{Generated('held').version(1)}'::regclass AND NOT indisunique"
    )
    page.execute(CRON)
    try:
        with psycopg.connect(dsn_of(page)) as reader:
            # The leftover cannot be dropped while this lasts.
            reader.execute(f"SELECT count(*) FROM {Generated('held').version(1)}")
            with working(page), flood(page):
                query = "SELECT last_error LIKE '%%lock timeout%%' FROM embedline.status WHERE pipeline = 'held'"
                wait_until(lambda: scalar(page, query), 30, "it was tried in vain")
                assert seconds_until_found(page, 1000) < 10
                assert seconds_until_found(page, 1001) < 10
    finally:
        page.execute("DROP SCHEMA cron CASCADE")


def test_a_new_pipeline_is_seen_while_all_models_that_were_known_are_busy(page: psycopg.Connection) -> None:
    with stub_provider(8) as slow:
        create_stub_model(page, slow, "slow", concurrency=1)
        slow.behave(latency=8)
        create_stub_pipeline(page, "slowly", "slow", rows=5000)
        page.execute("SELECT embedline.pause_pipeline('page')")
        try:
            with working(page):
                wait_until(lambda: slow.in_flight() > 0, 20, "the slow model is busy")
                create_stub_pipeline(page, "fresh", rows=10)
                wait_until(lambda: data_count(page, "document", "fresh") == 10, 6, "the new pipeline is embedded")
                slow.behave()
        finally:
            slow.behave()


def test_calls_of_embed_pending_come_round_to_every_pipeline(page: psycopg.Connection) -> None:
    for table in ("second", "third"):
        create_stub_pipeline(page, table, rows=0)
    settle(page)
    insert_rows(page, 1001, 21_000, "page")
    insert_rows(page, 1001, 21_000, "second")
    insert_rows(page, 1, 10, "third")
    for _ in range(6):
        page.execute("SELECT embed_pending(300)")
    assert data_count(page, "document", "third") == 10
    assert data_count(page, "document", "second") > 0
    assert data_count(page, "document") > 40


def test_the_backfills_of_two_pipelines_have_their_share_each(page: psycopg.Connection) -> None:
    page.execute("SELECT embedline.configure(name, value) FROM (VALUES ('live_share', 0.5), ('min_rows', 100), ('max_rows', 100))"
                 " AS s (name, value)")  # fmt: skip
    _half_read(page, "one", "two")
    with working(page):
        wait_until(lambda: _embedded(page, "one")[0] + _embedded(page, "two")[0] > 6000, 30, "it works")
        counts = {table: _embedded(page, table) for table in ("one", "two")}
        page.execute("SELECT embedline.pause_pipeline('one'), embedline.pause_pipeline('two')")
    assert all(backfilled > 1000 and live > 1000 for live, backfilled in counts.values()), counts


def test_a_share_that_is_changed_reaches_workers_that_run(page: psycopg.Connection) -> None:
    page.execute(
        "SELECT embedline.configure(name, value) FROM (VALUES ('live_share', 1), ('max_rows', 100)) AS s (name, value)"
    )
    _half_read(page, "one")
    with working(page):
        wait_until(lambda: sum(_embedded(page, "one")) > 1000, 20, "it works")
        page.execute("SELECT embedline.configure('live_share', 0)")
        wait_until(lambda: _embedded(page, "one")[1] > 1000, 20, "the backfill goes on")
        assert _embedded(page, "one")[0] < 30_000
        page.execute("SELECT embedline.pause_pipeline('one')")


def test_a_changed_recipe_is_through_beside_a_flood_and_writes_to_its_own_rows(page: psycopg.Connection) -> None:
    create_stub_pipeline(page, "own", rows=2000)
    settle(page, 60)
    page.execute("SELECT embedline.alter_pipeline('own', content => $$body || ' altered'$$)")
    rewriting = writing(page, "UPDATE own SET body = 'live ' || random() WHERE id <= 400")
    with flood(page), rewriting, working(page, seconds=120):
        wait_until(lambda: versions(page, "state", "own")[1] == "complete", 90, "the recipe is changed")
