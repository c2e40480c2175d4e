"""Signals: a worker asks one table for all pipelines, and nothing that waits is overlooked."""

from __future__ import annotations

import psycopg
import pytest

from generated_names import PAGE
from stub_provider import StubProvider
from support import scalar, settle, wait_until
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

TABLES = ("page", "other", "third")
_SIGNALS = "SELECT count(*) FROM embedline.signal WHERE due_at < 'infinity'"
_SCANS = """
    SELECT sum(seq_scan) FROM pg_stat_all_tables
    WHERE schemaname = 'embedline_data' AND relname ~ '_(inbox|outbox|claim|document)$'
"""


@pytest.fixture
def pages(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """Three pipelines on empty tables."""
    create_stub_model(stub_database, stub)
    for table in TABLES:
        create_stub_pipeline(stub_database, table)
    settle(stub_database)
    return stub_database


def _wait_for_reports(connection: psycopg.Connection, count: int) -> None:
    """Wait until a worker has reported so many times more: it polls several times between two."""
    report = "SELECT max(reported_at) FROM embedline.worker"
    for _ in range(count):
        before = scalar(connection, report)
        wait_until(lambda before=before: scalar(connection, report) != before, 20, "the worker reports")


def test_an_idle_worker_looks_into_the_tables_of_no_pipeline(pages: psycopg.Connection) -> None:
    with working(pages):
        insert_rows(pages, 1, 10)
        wait_for_chunks(pages, "page", 10)
        wait_until(lambda: scalar(pages, _SIGNALS) == 0, what="the signals are taken away")
        # Statistics come a second late.
        _wait_for_reports(pages, 4)
        before = scalar(pages, _SCANS)
        _wait_for_reports(pages, 4)
        assert scalar(pages, _SCANS) == before


def test_a_worker_finds_what_waits_though_a_crash_has_emptied_the_signals(
    pages: psycopg.Connection, stub: StubProvider
) -> None:
    for table in TABLES:
        insert_rows(pages, 1, 10, table)
    pages.execute("TRUNCATE embedline.signal")
    work_until_idle(pages)
    for table in TABLES:
        assert assert_all_settled(pages, stub.dimensions, table) == 10


def test_one_transaction_leaves_one_signal_for_a_pipeline_however_much_it_writes(pages: psycopg.Connection) -> None:
    with pages.transaction():
        for key in range(1, 51):
            insert_rows(pages, key, key)
    assert scalar(pages, _SIGNALS) == 1


def test_a_write_after_a_savepoint_that_was_rolled_back_is_found(pages: psycopg.Connection) -> None:
    with working(pages):
        with pages.transaction():
            pages.execute("SAVEPOINT before")
            insert_rows(pages, 1, 5)
            pages.execute("ROLLBACK TO before")
            insert_rows(pages, 6, 10)
        wait_for_chunks(pages, "page", 5, seconds=10)


def test_writes_to_several_pipelines_in_one_transaction_are_found(pages: psycopg.Connection) -> None:
    with working(pages):
        with pages.transaction():
            for key in range(1, 4):
                for table in TABLES:
                    insert_rows(pages, key, key, table)
        for table in TABLES:
            wait_for_chunks(pages, table, 3, seconds=10)


def test_a_row_that_waits_for_its_next_try_is_found_when_it_is_due(
    pages: psycopg.Connection, stub: StubProvider
) -> None:
    with working(pages):
        stub.behave(fault_share=1.0, faults=["500"])
        insert_rows(pages, 1, 5)
        retried = f"SELECT count(*) FROM {PAGE('outbox')} WHERE attempts > 0"
        wait_until(lambda: scalar(pages, retried) == 5, what="the rows were tried")
        stub.behave()
        wait_for_chunks(pages, "page", 5, seconds=30)
        wait_until(lambda: scalar(pages, _SIGNALS) == 0, what="the signals are taken away")


def test_embed_pending_takes_the_signals_away_of_what_it_has_embedded(pages: psycopg.Connection) -> None:
    insert_rows(pages, 1, 10)
    insert_rows(pages, 11, 20)
    assert scalar(pages, _SIGNALS) == 2
    assert scalar(pages, "SELECT embedline.embed_pending()") == 20
    assert scalar(pages, _SIGNALS) == 0


def test_signals_of_a_paused_pipeline_are_folded_and_count_once_it_goes_on(
    pages: psycopg.Connection, stub: StubProvider
) -> None:
    pages.execute("SELECT embedline.pause_pipeline('page')")
    for key in range(1, 602):
        insert_rows(pages, key, key)
    assert scalar(pages, _SIGNALS) == 601
    with Worker(dsn_of(pages)):
        wait_until(lambda: scalar(pages, _SIGNALS) == 1, what="the signals are folded")
        pages.execute("SELECT embedline.resume_pipeline('page')")
        wait_for_chunks(pages, "page", 601)
    assert assert_all_settled(pages, stub.dimensions) == 601


@pytest.mark.faults
def test_what_a_worker_left_that_was_killed_is_found_by_one_that_is_idle(
    pages: psycopg.Connection, stub: StubProvider
) -> None:
    stub.behave(latency=30)
    insert_rows(pages, 1, 10)
    with Worker(dsn_of(pages)) as first:
        claimed = f"SELECT count(*) FROM {PAGE('claim')}"
        wait_until(lambda: scalar(pages, claimed) == 1, what="the rows are claimed")
        with working(pages):
            wait_until(lambda: scalar(pages, "SELECT count(*) FROM embedline.worker") == 2, what="both are there")
            _wait_for_reports(pages, 3)
            stub.behave()
            pages.execute("SELECT pg_terminate_backend(%s)", (first.pid,))
            wait_for_chunks(pages, "page", 10)
