"""ALTER EXTENSION vector SET SCHEMA under sessions that are open: nothing fails, and nothing is charged to a row."""

from __future__ import annotations

import psycopg
import pytest

from conftest import Connect
from support import assert_exact, create_pages, create_pipeline, drain, scalar, searching, settle, wait_until
from upgrading import add_version, settle_versions
from working import working

_SETTLED = "SELECT pending = 0 AND dead_letters = 0 AND last_error IS NULL FROM embedline.status"


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    """Embedded pages with an index, and a schema to move the extension to."""
    create_pages(database, 50)
    create_pipeline(database, index_method="hnsw")
    settle(database)
    database.execute(str(scalar(database, "SELECT embedline.index_statement('page')")))
    database.execute('CREATE SCHEMA "Else where"')
    return database


def _move(connection: psycopg.Connection, schema: str = '"Else where"') -> None:
    connection.execute(f"ALTER EXTENSION vector SET SCHEMA {schema}".encode())


def test_searches_of_an_open_session_go_on_after_the_extension_was_moved(
    pages: psycopg.Connection, connect: Connect
) -> None:
    session = connect()
    before = searching(session, "page", "rivers", 5)
    _move(pages)
    # Whatever else makes the server plan again, such as an ANALYZE, does it in time.
    session.execute("DISCARD PLANS")
    assert searching(session, "page", "rivers", 5) == before
    assert searching(connect(), "page", "rivers", 5) == before
    query = (
        'SELECT id FROM page_embedding ORDER BY embedding OPERATOR("Else where".<=>)'
        " (SELECT embedline.embed_query('page', 'rivers')) LIMIT 5"
    )
    assert [str(key) for (key,) in session.execute(query)] == [key for key, _, _ in before]
    _move(pages, "public")
    assert searching(session, "page", "rivers", 5) == before


def test_a_transaction_from_before_the_move_goes_on(pages: psycopg.Connection, connect: Connect) -> None:
    session = connect(autocommit=False)
    session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    before = searching(session, "page", "rivers", 5)
    _move(pages)
    session.execute("DISCARD PLANS")
    assert searching(session, "page", "rivers", 5) == before
    session.rollback()


def test_a_running_worker_goes_on_after_the_extension_was_moved(pages: psycopg.Connection) -> None:
    with working(pages) as (worker,):
        pages.execute("UPDATE page SET body = body || ' once' WHERE id <= 10")
        wait_until(lambda: scalar(pages, _SETTLED), what="the worker has embedded")
        for schema in ('"Else where"', "public"):
            _move(pages, schema)
            pages.execute("UPDATE page SET body = body || ' again' WHERE id <= 10")
            wait_until(lambda: scalar(pages, _SETTLED), what="the worker goes on")
        assert worker.is_running
    assert assert_exact(pages) == 50


def test_every_function_of_an_open_session_finds_the_moved_extension(
    pages: psycopg.Connection, connect: Connect
) -> None:
    session = connect()
    pages.execute("UPDATE page SET body = body || ' first' WHERE id = 1")
    assert drain(session) == 1
    assert session.execute("SELECT * FROM embedline.verify('page')").fetchall() is not None
    _move(pages)
    pages.execute("UPDATE page SET body = body || ' then' WHERE id = 1")
    assert drain(session) == 1
    session.execute("SELECT * FROM embedline.verify('page', repair => true)")
    add_version(session, "minilm", index_method="none")
    settle_versions(session)
    create_pipeline(session, "other", "page", "title")
    settle(session)
    session.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(session, "SELECT count(*) FROM page_embedding") == 50
    assert scalar(session, _SETTLED + " WHERE pipeline = 'page'")
