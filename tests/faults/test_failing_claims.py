"""What goes wrong before a batch is there: it is shown in the pipeline's status, and no other pipeline waits for it."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import sql

from generated_names import PAGE, qualified
from stub_provider import StubProvider
from support import data_count, scalar, settle, wait_until
from upgrading import add_version
from working import (
    Worker,
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dsn_of,
    insert_rows,
    wait_for_chunks,
    work_until_idle,
    working,
)

_ERROR = "SELECT last_error FROM embedline.status WHERE pipeline = %s"
_REFUSAL = """
    CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN RAISE 'no % of %.%', tg_op, tg_table_schema, tg_table_name; END $$
"""


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """Two pipelines on empty tables; ten rows wait in each."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    create_stub_pipeline(stub_database, "other")
    settle(stub_database)
    insert_rows(stub_database, 1, 10)
    insert_rows(stub_database, 1, 10, "other")
    stub_database.execute(_REFUSAL)
    return stub_database


def _break(connection: psycopg.Connection, table: str, operation: str) -> None:
    """Make an operation on a generated table fail."""
    connection.execute(
        sql.SQL("CREATE TRIGGER refuse BEFORE {} ON embedline_data.{} EXECUTE FUNCTION refuse()").format(
            sql.SQL(operation), sql.Identifier(table)
        )
    )


@pytest.mark.parametrize(
    ("table", "operation"),
    [("page_inbox", "DELETE"), ("page_claim", "INSERT"), ("page_document", "INSERT"), ("page_v1", "INSERT")],
)
def test_a_worker_that_runs_until_idle_shows_what_fails_and_ends(
    page: psycopg.Connection, stub: StubProvider, table: str, operation: str
) -> None:
    _break(page, table, operation)
    work_until_idle(page, seconds=20)
    assert f"no {operation} of {qualified(table)}" in scalar(page, _ERROR, ("page",))
    assert scalar(page, _ERROR, ("other",)) is None
    assert assert_all_settled(page, stub.dimensions, "other") == 10
    page.execute(f"DROP TRIGGER refuse ON {qualified(table)}")
    work_until_idle(page)
    assert assert_all_settled(page, stub.dimensions) == 10
    assert scalar(page, _ERROR, ("page",)) is None


def test_a_resident_worker_goes_on_where_one_pipeline_cannot_be_claimed_of(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    _break(page, "page_inbox", "DELETE")
    with working(page) as (worker,):
        wait_for_chunks(page, "other", 10)
        wait_until(lambda: scalar(page, _ERROR, ("page",)), what="the error is shown")
        insert_rows(page, 11, 20, "other")
        wait_for_chunks(page, "other", 20)
        assert worker.is_running
        page.execute(f"DROP TRIGGER refuse ON {PAGE('inbox')}")
        wait_for_chunks(page, "page", 10, seconds=30)
        wait_until(lambda: scalar(page, _ERROR, ("page",)) is None, what="the error is gone")
    assert assert_all_settled(page, stub.dimensions) == 10


def test_an_error_of_a_claim_is_gone_once_nothing_waits_any_more(page: psycopg.Connection) -> None:
    _break(page, "page_inbox", "DELETE")
    with working(page):
        wait_until(lambda: scalar(page, _ERROR, ("page",)), what="the error is shown")
        page.execute(f"TRUNCATE {PAGE('inbox')}")
        wait_until(lambda: scalar(page, _ERROR, ("page",)) is None, 30, "the error is gone")


@pytest.mark.parametrize(
    ("table", "operation"), [("page_inbox", "DELETE"), ("page_document", "INSERT"), ("page_v1", "INSERT")]
)
def test_one_pipelines_trouble_does_not_end_embed_pending_for_the_others(
    page: psycopg.Connection, stub: StubProvider, table: str, operation: str
) -> None:
    _break(page, table, operation)
    warnings: list[str] = []
    page.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
    assert scalar(page, "SELECT embedline.embed_pending()") == 10
    assert assert_all_settled(page, stub.dimensions, "other") == 10
    assert f"no {operation} of {qualified(table)}" in scalar(page, _ERROR, ("page",))
    assert any("pipeline page" in warning for warning in warnings)
    # Nothing is lost: the claim is undone with what failed.
    assert scalar(page, "SELECT pending FROM embedline.status WHERE pipeline = 'page'") == 10
    page.execute(f"DROP TRIGGER refuse ON {qualified(table)}")
    assert scalar(page, "SELECT embedline.embed_pending()") == 10
    assert assert_all_settled(page, stub.dimensions) == 10


def test_an_error_of_a_versions_claim_is_shown_in_the_version(page: psycopg.Connection, stub: StubProvider) -> None:
    work_until_idle(page)
    page.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON embedline.version_queue FOR EACH ROW"
        " WHEN (NEW.claimed_by IS NOT NULL) EXECUTE FUNCTION refuse()"
    )
    number = add_version(page, "static-256")
    with Worker(dsn_of(page), until_idle=True) as worker:
        worker.join(30)
        assert worker.error is None
    shown = "SELECT last_error FROM embedline.versions WHERE pipeline = 'page' AND version = %s"
    assert "no INSERT of embedline.version_queue" in scalar(page, shown, (number,))
    assert scalar(page, _ERROR, ("page",)) is None
    page.execute("DROP TRIGGER refuse ON embedline.version_queue")
    work_until_idle(page)
    assert scalar(page, shown, (number,)) is None
    assert data_count(page, f"v{number}") == 10


def test_a_launcher_that_cannot_be_woken_ends_no_worker(page: psycopg.Connection) -> None:
    # A table of jobs without the column `active`: the UPDATE that wakes pg_cron's launcher fails.
    page.execute("CREATE SCHEMA cron CREATE TABLE job (jobid bigserial, jobname text, command text, database text)")
    page.execute("CREATE DATABASE short_lived")
    with working(page) as (worker,), psycopg.connect(dsn_of(page)) as asleep:
        wait_for_chunks(page, "other", 10)
        with psycopg.connect(dsn_of(page), autocommit=True) as dropping, ThreadPoolExecutor() as pool:
            # A process that heeds no interrupt keeps DROP DATABASE waiting.
            os.kill(asleep.info.backend_pid, signal.SIGSTOP)
            try:
                dropped = pool.submit(dropping.execute, "DROP DATABASE short_lived")
                barrier = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ProcSignalBarrier'"
                wait_until(lambda: scalar(page, barrier) == 1, what="the session waits")
                time.sleep(3)
                insert_rows(page, 11, 20, "other")
                wait_for_chunks(page, "other", 20)
            finally:
                os.kill(asleep.info.backend_pid, signal.SIGCONT)
            dropped.result()
        assert worker.is_running
    page.execute("DROP SCHEMA cron CASCADE")
