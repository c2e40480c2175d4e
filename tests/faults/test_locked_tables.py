"""Locks that others hold on the source and on our tables: nothing is lost, nobody else is held up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest

from generated_names import PAGE, qualified
from stub_provider import StubProvider
from support import scalar, settle, take_inbox, wait_until
from working import (
    Worker,
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    dsn_of,
    insert_rows,
    wait_for_chunks,
    wait_for_in_flight,
    work_until_idle,
    working,
)


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on an empty table."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    return stub_database


@pytest.fixture
def other_session(page: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """Somebody else's session, in a transaction from its first statement on."""
    with psycopg.connect(dsn_of(page)) as connection:
        yield connection
        connection.rollback()


@pytest.mark.parametrize("table", ["page_claim", "page_chunk", "page_document"])
def test_a_write_that_gave_up_waiting_for_a_lock_is_done_again_as_a_whole(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection, table: str
) -> None:
    insert_rows(page, 1, 100)
    stub.behave(latency=0.3, remember=True)
    with working(page) as (worker,):
        wait_for_in_flight(stub, 100)
        other_session.execute(f"LOCK TABLE {qualified(table)} IN SHARE MODE")
        wait_until(lambda: worker.waits_for_lock(page), 20, "the worker waits for the lock")
        wait_until(lambda: not worker.waits_for_lock(page), 20, "the worker has given up waiting")
        other_session.rollback()
        settled = "SELECT pending = 0 FROM embedline.status"
        wait_until(lambda: scalar(page, settled), 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 100
    # The answers were at hand: they are not paid for again.
    assert set(stub.texts_seen().values()) == {1}


def test_a_claim_that_cannot_be_given_back_at_once_is_given_back_later(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection
) -> None:
    insert_rows(page, 1, 10)
    take_inbox(page)
    stub.behave(latency=0.3, remember=True)
    page.execute(f"ALTER TABLE {PAGE('chunk')} ADD CONSTRAINT refused CHECK (key_id < 0)")
    with working(page) as (worker,):
        wait_for_in_flight(stub, 10)
        other_session.execute(f"SELECT FROM {PAGE('outbox')} FOR UPDATE")
        wait_until(lambda: worker.waits_for_lock(page), 20, "the worker waits for the lock")
        began = f"SELECT max(xact_start) FROM pg_stat_activity WHERE pid = {worker.pid}"
        first = scalar(page, began)
        wait_until(lambda: scalar(page, began) != first, 20, "the worker has given up waiting")
        other_session.rollback()
        page.execute(f"ALTER TABLE {PAGE('chunk')} DROP CONSTRAINT refused")
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
        assert worker.is_running
    assert assert_all_settled(page, stub.dimensions) == 10


def test_a_lock_on_one_source_does_not_hold_up_another_pipeline(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection
) -> None:
    create_stub_pipeline(page, "other")
    settle(page)
    insert_rows(page, 1, 10)
    # A migration of the application.
    other_session.execute("LOCK TABLE page IN ACCESS EXCLUSIVE MODE")
    with working(page):
        for key in range(1, 11):
            insert_rows(page, key, key, "other")
            wait_for_chunks(page, "other", key)
        other_session.rollback()
        wait_for_chunks(page, "page", 10)
    assert_all_settled(page, stub.dimensions)


def test_an_open_truncate_of_one_source_does_not_hold_up_another_pipeline(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection
) -> None:
    create_stub_pipeline(page, "other")
    insert_rows(page, 1, 10)
    work_until_idle(page)
    other_session.execute("TRUNCATE page")
    with working(page) as (worker,):
        for key in range(1, 11):
            insert_rows(page, key, key, "other")
            wait_for_chunks(page, "other", key)
        assert worker.is_running
        other_session.commit()
    work_until_idle(page)
    assert assert_all_settled(page, stub.dimensions) == 0
    assert assert_all_settled(page, stub.dimensions, "other") == 10


def test_a_truncate_while_a_worker_writes_never_fails(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection
) -> None:
    # Who has locked a document and then waits for the source makes a deadlock with this, and the application would lose.
    insert_rows(page, 1, 100)
    stub.behave(latency=0.3, remember=True)
    other_session.execute("SET deadlock_timeout = '100ms'")
    with working(page):
        wait_for_in_flight(stub, 100)
        other_session.execute("LOCK TABLE page IN ACCESS EXCLUSIVE MODE")
        wait_until(lambda: stub.in_flight() == 0, 20, "the answers are there")
        answered = time.monotonic()
        wait_until(lambda: time.monotonic() - answered > 0.5, what="the worker has tried to write")
        other_session.execute("TRUNCATE page")
        other_session.commit()
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 0


def test_a_worker_never_waits_for_an_uncommitted_delete_of_rows_that_it_has_in_hand(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection
) -> None:
    insert_rows(page, 1, 100)
    work_until_idle(page)
    page.execute("UPDATE page SET body = body || ' edited'")
    stub.behave(latency=0.3, remember=True)
    with working(page) as (worker,):
        wait_for_in_flight(stub, 100)
        other_session.execute("DELETE FROM page WHERE id <= 10")
        waited: list[bool] = []

        def others_are_written() -> bool:
            waited.append(worker.waits_for_lock(page))
            query = f"SELECT count(*) FROM {PAGE('chunk')} WHERE content LIKE '% edited'"
            return bool(scalar(page, query) == 90)

        wait_until(others_are_written, 5, "the other rows are written")
        assert not any(waited), "the worker waited for the application"
        other_session.commit()
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 90


def test_a_worker_never_waits_for_an_uncommitted_delete_of_rows_that_it_gives_up(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection
) -> None:
    insert_rows(page, 1, 20)
    work_until_idle(page)
    page.execute("UPDATE page SET body = body || ' POISON' WHERE id <= 5")
    stub.behave(latency=0.1, poison="POISON")
    with working(page) as (worker,):
        wait_for_in_flight(stub)
        other_session.execute("DELETE FROM page WHERE id = 1")
        waited: list[bool] = []

        def others_are_given_up() -> bool:
            waited.append(worker.waits_for_lock(page))
            return set(dead_letters(page)) >= {2, 3, 4, 5}

        wait_until(others_are_given_up, 5, "the other rows are given up")
        assert not any(waited), "the worker waited for the application"
        other_session.commit()
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 15
    assert set(dead_letters(page)) == {2, 3, 4, 5}


@pytest.mark.parametrize("lock", ["SELECT FROM page WHERE id = 1 FOR UPDATE", "DELETE FROM page WHERE id = 1"])
def test_a_row_that_an_application_locks_is_paid_for_once(
    page: psycopg.Connection, stub: StubProvider, other_session: psycopg.Connection, lock: str
) -> None:
    insert_rows(page, 1, 5)
    other_session.execute(lock.encode())
    with working(page):
        wait_for_chunks(page, "page", 4)
        tries = "SELECT outbox_id, not_before FROM " + PAGE("outbox")
        seen = set[tuple[object, ...]]()
        wait_until(lambda: seen.update(page.execute(tries).fetchall()) or len(seen) > 5, 20, "it was tried again")
        other_session.rollback()
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    work_until_idle(page)
    assert assert_all_settled(page, stub.dimensions) == 5
    assert set(stub.texts_seen().values()) == {1}


def test_chunks_of_a_row_that_changes_in_flight_are_paid_for_once(page: psycopg.Connection, stub: StubProvider) -> None:
    page.execute("SELECT embedline.alter_pipeline('page', chunking => 'fixed', chunk_tokens => 20)")
    settle(page)
    stub.behave(latency=0.3, remember=True)
    with working(page):
        page.execute("INSERT INTO page SELECT 1, string_agg('word ' || n, ' ') FROM generate_series(1, 100) AS n")
        wait_for_in_flight(stub)
        page.execute("UPDATE page SET body = body || ' and an end' WHERE id = 1")
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    seen = stub.texts_seen()
    assert len(seen) > 10
    assert set(seen.values()) == {1}


def test_a_pipeline_dropped_in_flight_does_not_end_the_worker(page: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_pipeline(page, "other")
    settle(page)
    stub.behave(latency=0.3, remember=True)
    insert_rows(page, 1, 50)
    with working(page) as (worker,):
        wait_for_in_flight(stub, 50)
        page.execute("SELECT embedline.drop_pipeline('page')")
        insert_rows(page, 1, 50, "other")
        wait_for_chunks(page, "other", 50)
        assert worker.is_running
    assert assert_all_settled(page, stub.dimensions, "other") == 50
    page.execute("DROP TABLE page")


def test_a_pipeline_paused_in_flight_has_its_rows_written_or_given_back_uncounted(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    insert_rows(page, 1, 50)
    stub.behave(latency=1.0, remember=True)
    with Worker(dsn_of(page)) as worker:
        wait_for_in_flight(stub, 50)
        page.execute("SELECT embedline.pause_pipeline('page')")
        page.execute("SELECT pg_cancel_backend(%s)", (worker.pid,))
        worker.join(20)
    assert scalar(page, f"SELECT count(*) FROM {PAGE('claim')}") == 0
    given_back = f"SELECT array_agg(DISTINCT (attempts, crash_count)::text) FROM {PAGE('outbox')}"
    assert scalar(page, given_back) == ["(0,0)"]
    page.execute("SELECT embedline.resume_pipeline('page')")
    stub.behave(remember=True)
    work_until_idle(page)
    assert assert_all_settled(page, stub.dimensions) == 50


def test_a_row_that_is_deleted_while_its_provider_rejects_it_leaves_no_dead_letter(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    insert_rows(page, 1, 20)
    work_until_idle(page)
    page.execute("UPDATE page SET body = body || ' POISON' WHERE id <= 2")
    stub.behave(latency=0.5, poison="POISON")
    with working(page):
        wait_for_in_flight(stub)
        # It is committed before the answer: the trigger takes away what there is of the row by now.
        page.execute("DELETE FROM page WHERE id = 1")
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    assert dead_letters(page).keys() == {2}
    assert assert_all_settled(page, stub.dimensions) == 18
