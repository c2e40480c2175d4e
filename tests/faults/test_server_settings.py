"""Settings of a database that end statements and sessions while workers drain it; applications that lock each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors, sql

from killing import IN_FLIGHT, REQUEST, ROWS, assert_nothing_lost
from stub_provider import StubProvider
from support import queued, settle, wait_until
from working import Worker, create_stub_model, create_stub_pipeline, dsn_of, insert_rows, working

# Texts that a worker may have paid for when it ends: in flight, and answered in the moment before.
_OF_A_WORKER = 2 * IN_FLIGHT * REQUEST


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline whose rows are live changes that wait."""
    create_stub_model(stub_database, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    insert_rows(stub_database, 1, ROWS)
    stub.behave(latency=0.2, remember=True)
    return stub_database


@contextlib.contextmanager
def _database_setting(connection: psycopg.Connection, name: str, value: str) -> Iterator[None]:
    """Set a parameter for all new sessions of the database."""
    database = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("ALTER DATABASE {} SET {} = {}").format(database, sql.Identifier(name), value))
    try:
        yield
    finally:
        connection.execute(sql.SQL("ALTER DATABASE {} RESET {}").format(database, sql.Identifier(name)))


def test_statement_timeout_ends_workers_which_pay_for_what_was_in_flight_at_most(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    ended = 0
    with _database_setting(page, "statement_timeout", "900ms"):
        for _ in range(5):
            with Worker(dsn_of(page)) as worker:
                worker.join(20)
            # Each CALL is one statement.
            assert isinstance(worker.error, errors.QueryCanceled)
            ended += 1
            if queued(page) == 0:
                break
    assert_nothing_lost(page, stub, ROWS, ended * _OF_A_WORKER)


def test_idle_in_transaction_session_timeout_ends_no_worker(page: psycopg.Connection, stub: StubProvider) -> None:
    with _database_setting(page, "idle_in_transaction_session_timeout", "20ms"), working(page, 2):
        wait_until(lambda: queued(page) == 0, 30, "nothing waits")
    assert_nothing_lost(page, stub, ROWS, 0)


def test_serializable_as_default_fails_no_worker(page: psycopg.Connection, stub: StubProvider) -> None:
    with _database_setting(page, "default_transaction_isolation", "serializable"), working(page, 2):
        for number in range(20):
            page.execute("UPDATE page SET body = body || ' ' || %s WHERE id %% 20 = %s", (number, number))
        wait_until(lambda: queued(page) == 0, 30, "nothing waits")
    assert_nothing_lost(page, stub, ROWS, 0)


def test_a_read_only_database_refuses_workers_and_loses_nothing(page: psycopg.Connection, stub: StubProvider) -> None:
    with _database_setting(page, "default_transaction_read_only", "on"), Worker(dsn_of(page)) as worker:
        worker.join(20)
    assert isinstance(worker.error, errors.ReadOnlySqlTransaction)
    assert stub.texts_seen() == {}
    assert queued(page) == ROWS
    assert_nothing_lost(page, stub, ROWS, 0)


def test_applications_that_deadlock_or_give_up_waiting_leave_nothing_behind(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    failed: list[type[BaseException]] = []

    def change(first: int, second: int, met: threading.Barrier) -> None:
        with psycopg.connect(dsn_of(page), options="-c deadlock_timeout=50ms") as session:
            try:
                session.execute("UPDATE page SET body = body || ' a' WHERE id = %s", (first,))
                met.wait(20)
                session.execute("UPDATE page SET body = body || ' b', id = id WHERE id = %s", (second,))
            except errors.DeadlockDetected as error:
                failed.append(type(error))
                session.rollback()

    with working(page, 2):
        for number in range(1, 11):
            met = threading.Barrier(2)
            keys = ((number, number + 100), (number + 100, number))
            threads = [threading.Thread(target=change, args=(*pair, met)) for pair in keys]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        with psycopg.connect(dsn_of(page)) as holder, psycopg.connect(dsn_of(page)) as waiting:
            holder.execute("UPDATE page SET body = body || ' held' WHERE id = 300")
            waiting.execute("SET lock_timeout = '50ms'")
            waiting.execute("INSERT INTO page VALUES (0, 'never')")
            with pytest.raises(errors.LockNotAvailable):
                waiting.execute("DELETE FROM page WHERE id = 300")
            waiting.rollback()
            holder.commit()
        wait_until(lambda: queued(page) == 0, 30, "nothing waits")
    assert failed == [errors.DeadlockDetected] * 10
    assert_nothing_lost(page, stub, ROWS, 0)
