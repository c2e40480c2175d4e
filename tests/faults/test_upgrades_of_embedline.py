"""Embedline upgraded beneath an application that writes and workers that are started all the time; and versions that differ."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

import embedline
from conftest import Connect
from support import (
    ROOT,
    alembic_config,
    assert_exact,
    create_pages,
    create_pipeline,
    queued,
    scalar,
    settle,
    wait_until,
)
from working import dsn_of, working

_REVISIONS = [
    script.revision for script in ScriptDirectory.from_config(Config(str(ROOT / "alembic.ini"))).walk_revisions()
]
# The whole history takes four minutes: EMBEDLINE_REVISIONS=all runs it.
_TRIED = _REVISIONS if os.environ.get("EMBEDLINE_REVISIONS") == "all" else [*_REVISIONS[1:-1:7], _REVISIONS[-1]]
_OF_VERSION = "UPDATE embedline.setting SET value = %s WHERE name = 'version'"
ROWS = 60


class _Busy:
    """Something that is done again and again in a session of its own, until the block ends."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rounds = 0
        self.failures: list[psycopg.Error] = []

    def __enter__(self) -> _Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            # A new session each time, as pg_cron starts a worker that has ended.
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                try:
                    self.step(connection)
                except psycopg.Error as error:
                    self.failures.append(error)
            self.rounds += 1

    def step(self, connection: psycopg.Connection) -> None:
        raise NotImplementedError


class _Writer(_Busy):
    """The application: no write of it may fail."""

    def step(self, connection: psycopg.Connection) -> None:
        for _ in range(5):
            self.rounds += 1
            row = self.rounds % ROWS
            connection.execute("UPDATE page SET body = %s WHERE id = %s", (f"round {self.rounds}", row))
            connection.execute("DELETE FROM page WHERE id = %s", (1000 + row,))
            connection.execute(
                "INSERT INTO page (id, title, body) VALUES (%s, 'New', %s)", (1000 + row, f"round {self.rounds}")
            )


class _Worker(_Busy):
    """Workers that are started all the time; those of another version than the schema's end at once, and say why."""

    def step(self, connection: psycopg.Connection) -> None:
        connection.execute("CALL embedline.run_worker(max_seconds => 0.3)")


@pytest.fixture
def page(database: psycopg.Connection) -> Iterator[psycopg.Connection]:
    create_pages(database, ROWS)
    create_pipeline(database, index_method="none")
    settle(database)
    yield database


@pytest.mark.parametrize("revision", _TRIED)
def test_no_change_is_lost_by_an_upgrade_from_any_revision(page: psycopg.Connection, revision: str) -> None:
    dsn, config = dsn_of(page), alembic_config(dsn_of(page))
    command.downgrade(config, revision)
    # What an installation of that time says of itself.
    page.execute(_OF_VERSION, ("0.0.1",))
    page.execute("UPDATE page SET body = 'before the upgrade' WHERE id % 3 = 0")
    page.execute("DELETE FROM page WHERE id % 10 = 1")
    with _Writer(dsn) as writer, _Worker(dsn) as worker:
        wait_until(lambda: writer.rounds > 3 and worker.rounds > 1)
        command.upgrade(config, "head")
        after = writer.rounds
        wait_until(lambda: writer.rounds > after + 10)
    assert writer.failures == []
    assert "EL001" in {error.sqlstate for error in worker.failures}
    settle(page)
    assert assert_exact(page) >= ROWS
    assert page.execute("SELECT * FROM embedline.verify('page', false) WHERE count > 0").fetchall() == []


def test_a_resident_worker_goes_through_a_replay(page: psycopg.Connection) -> None:
    """The functions that it calls are replaced beneath it."""
    with working(page) as (worker,), _Writer(dsn_of(page)) as writer:
        for _ in range(3):
            command.upgrade(alembic_config(dsn_of(page)), "head")
        assert worker.is_running
    assert writer.failures == []
    settle(page)
    assert assert_exact(page) >= ROWS


@pytest.mark.parametrize("version", ["0.0.1", "99.0.0"])
def test_a_package_of_another_version_is_refused_and_capture_goes_on(
    page: psycopg.Connection, connect: Connect, version: str
) -> None:
    page.execute(_OF_VERSION, (version,))
    statements = (
        "SELECT * FROM embedline.search('page', 'rivers')",
        "SELECT embedline.embed_pending()",
        "CALL embedline.run_worker(max_seconds => 1)",
        "SELECT embedline.create_pipeline('other', 'page', 'title', 'static-256')",
        "SELECT * FROM embedline.verify('page')",
    )
    session = connect()
    for statement in statements:
        with pytest.raises(psycopg.Error) as refused:
            session.execute(statement)
        assert refused.value.sqlstate == "EL001"
        assert f"the server runs embedline {embedline.__version__}, this database has {version}" in str(refused.value)
        assert "alembic upgrade head" in str(refused.value.diag.message_hint)
    session.execute("UPDATE page SET body = 'while the versions differ' WHERE id <= 20")
    session.execute("DELETE FROM page WHERE id = 30")
    session.execute("INSERT INTO page (id, title, body) VALUES (500, 'New', 'row')")
    assert queued(page) == 22
    # What is shown needs no Python, so it can be looked at.
    assert scalar(session, "SELECT pending FROM embedline.status") == 22
    assert scalar(session, "SELECT count(*) FROM page_embedding WHERE id = 30") == 0
    page.execute(_OF_VERSION, (embedline.__version__,))
    settle(page)
    assert assert_exact(page) == ROWS
