"""Applications, workers, cutovers and rollbacks beside each other: both versions end exact, and no application notices."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors

from conftest import Connect
from small_models import register_static
from support import assert_exact, create_pages, create_pipeline, scalar, settle, wait_until
from upgrading import add_version, cut_over, settle_versions, versions
from working import working

WRITERS, TRANSACTIONS = 4, 250
# An application that waits for longer has noticed.
PATIENCE = "1s"


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    """Pipeline page over 200 rows of which each writer has its own, embedded by static-256; static-64 is registered."""
    create_pages(database, 200)
    create_pipeline(database, index_method="none")
    register_static(database, 64)
    settle(database)
    return database


class Writer(threading.Thread):
    """An application with keys of its own: whatever it waits for, or fails with, is our doing."""

    def __init__(self, connect: Connect, number: int, *, truncates: bool = False) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self.longest = 0.0
        self._rng = random.Random(number)
        self._number = number
        self._truncates = truncates
        self._connection = connect(autocommit=False, options=f"-c lock_timeout={PATIENCE}")
        if number % 2:
            self._connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ

    def run(self) -> None:
        try:
            for _ in range(TRANSACTIONS):
                for _ in range(self._rng.randrange(1, 4)):
                    self._write()
                self._connection.rollback() if self._rng.random() < 0.1 else self._connection.commit()
            self._connection.close()
        except BaseException as error:
            self.error = error

    def _write(self) -> None:
        if self._rng.random() < 0.15:
            with contextlib.suppress(psycopg.Rollback), self._connection.transaction():
                self._statement()
                raise psycopg.Rollback
        self._statement()

    def _statement(self) -> None:
        key = self._rng.randrange(60) * WRITERS + self._number
        text = f"Text {self._rng.random()}. " * self._rng.randrange(1, 4)
        kind = self._rng.random()
        started = time.monotonic()
        if kind < 0.4:
            self._execute("UPDATE page SET body = body || %s WHERE id = %s", f" {text}", key)
        elif kind < 0.6:
            self._execute("DELETE FROM page WHERE id = %s", key)
        elif kind < 0.85:
            insert = "INSERT INTO page VALUES (%s, 'again', %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body"
            self._execute(insert, key, text)
        elif kind < 0.98 or not self._truncates:
            # To a key that is free, and its own too.
            free = "NOT EXISTS (SELECT FROM page WHERE id = %s)"
            moved = key + 1000 * WRITERS
            self._execute(f"UPDATE page SET id = %s WHERE id = %s AND {free}", moved, key, moved)
        else:
            self._execute("TRUNCATE page")
        self.longest = max(self.longest, time.monotonic() - started)

    def _execute(self, statement: str, *values: object) -> None:
        self._connection.execute(statement, values or None)


@contextlib.contextmanager
def _swapping(connect: Connect) -> Iterator[list[int]]:
    """Cut over to version 2 and back until the block ends; the list fills with the numbers that served."""
    served: list[int] = []
    failed: list[BaseException] = []
    ended = threading.Event()
    connection = connect()

    def swap() -> None:
        try:
            while not ended.is_set():
                # Behind, or in use: it says so, and is run again.
                with contextlib.suppress(errors.ObjectNotInPrerequisiteState):
                    if versions(connection, "serving")[2]:
                        served.append(int(scalar(connection, "SELECT embedline.rollback('page')")))
                    else:
                        cut_over(connection, 2)
                        served.append(2)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    yield served
    ended.set()
    thread.join(60)
    assert not thread.is_alive()
    assert not failed, failed


def _deadlocks(connection: psycopg.Connection) -> int:
    return int(scalar(connection, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))


@pytest.mark.parametrize("chunking", [None, "sentences"])
@pytest.mark.parametrize("truncates", [False, True])
def test_both_versions_are_exact_after_mixed_transactions_cutovers_and_rollbacks(
    connect: Connect, pages: psycopg.Connection, chunking: str | None, truncates: bool
) -> None:
    add_version(pages, "static-64", **({"chunking": chunking} if chunking else {}))
    settle_versions(pages)
    writers = [Writer(connect, number, truncates=truncates and number == 0) for number in range(WRITERS)]
    with working(pages, 2), _swapping(connect) as served:
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
            assert not writer.is_alive()
        wait_until(lambda: len(served) >= 4, 30, "versions were swapped beside the writers")
    assert [writer.error for writer in writers] == [None] * WRITERS
    settle_versions(pages)
    assert {1, 2} <= set(served)
    assert _deadlocks(pages) == 0
    for number in (1, 2):
        assert_exact(pages, version=number)
    if served[-1] == 1:
        cut_over(pages, 2)
    for number in (2, 1):
        assert versions(pages, "serving")[number]
        assert assert_exact(pages) > 0
        if number == 2:
            pages.execute("SELECT embedline.rollback('page')")


def test_a_truncate_waits_for_no_cutover_that_waits_for_somebody_else(
    connect: Connect, pages: psycopg.Connection
) -> None:
    """A transaction that began before the version was complete would see it empty: the cutover waits for its end."""
    add_version(pages, "static-64")
    older = connect(autocommit=False)
    older.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    older.execute("SELECT 1 FROM embedline.setting")
    settle_versions(pages)
    refused: list[BaseException] = []

    def cut() -> None:
        try:
            cut_over(connect(), 2)
        except errors.ObjectNotInPrerequisiteState as error:
            refused.append(error)

    thread = threading.Thread(target=cut, daemon=True)
    thread.start()
    waits = (
        "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE '%embedline.cutover(%' AND wait_event = 'PgSleep'"
    )
    wait_until(lambda: scalar(pages, waits), 20, "the cutover waits for the older transaction")
    application = connect(options="-c lock_timeout=500ms")
    application.execute("TRUNCATE page")
    assert thread.is_alive()
    thread.join(20)
    assert "began before version 2 was complete" in str(refused)
    older.rollback()
