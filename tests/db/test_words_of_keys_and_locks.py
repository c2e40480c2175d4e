"""The right words: for keys that PostgreSQL checks late, transactions without a session, and indexes that are of no use."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import errors, sql

from conftest import Connect
from generated_names import PAGE
from support import assert_exact, create_pages, create_pipeline, drain, scalar, settle

# --- keys


@pytest.mark.parametrize("key", ["PRIMARY KEY DEFERRABLE INITIALLY DEFERRED", "NOT NULL UNIQUE DEFERRABLE"])
def test_a_deferrable_key_is_a_key(database: psycopg.Connection, key: str) -> None:
    database.execute(f"CREATE TABLE page (id integer {key}, title text, body text)".encode())
    database.execute("INSERT INTO page SELECT n, 'Title ' || n, 'Body ' || n FROM generate_series(1, 10) AS n")
    create_pipeline(database)
    settle(database)
    assert assert_exact(database) == 10
    # What only such a key allows: values that are equal until the end of the statement or of the transaction.
    with database.transaction():
        database.execute("SET CONSTRAINTS ALL DEFERRED")
        database.execute("UPDATE page SET id = 2 WHERE title = 'Title 1'")
        database.execute("UPDATE page SET id = 1 WHERE title = 'Title 2'")
        database.execute("INSERT INTO page VALUES (3, 'Title x', 'in two places'), (4, 'Title y', 'for a moment')")
        database.execute("DELETE FROM page WHERE title IN ('Title 3', 'Title y')")
    settle(database)
    assert assert_exact(database) == 10
    assert scalar(database, "SELECT count(*) FROM embedline.verify('page')") == 0
    assert scalar(database, "SELECT state FROM embedline.status") == "active"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("CREATE UNIQUE INDEX near ON page (id)", "unique index near is over columns that may be NULL"),
        ("CREATE UNIQUE INDEX near ON page ((id + 1))", "unique index near is over an expression"),
        (
            "ALTER TABLE page ALTER COLUMN id SET NOT NULL; CREATE UNIQUE INDEX near ON page (id) WHERE id > 0",
            "unique index near holds a part of the rows",
        ),
        (
            "ALTER TABLE page ALTER COLUMN id SET NOT NULL; CREATE UNIQUE INDEX near ON page (id);"
            " UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'near'::regclass",
            "unique index near is not valid",
        ),
    ],
)
def test_a_table_with_nearly_a_key_is_told_why_it_is_none(
    database: psycopg.Connection, statement: str, reason: str
) -> None:
    database.execute("CREATE TABLE page (id integer, title text, body text)")
    database.execute(statement.encode())
    with pytest.raises(errors.InvalidParameterValue, match="has no primary key") as caught:
        create_pipeline(database)
    assert reason in (caught.value.diag.message_detail or "")
    assert (caught.value.diag.message_hint or "").endswith("ADD PRIMARY KEY (...);")


# --- prepared transactions


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    """Return a database with a drained pipeline of 10 rows."""
    create_pages(database, 10)
    create_pipeline(database, index_method="none")
    settle(database)
    return database


@contextlib.contextmanager
def _prepared(connect: Connect, statement: str, gid: str) -> Iterator[None]:
    """Hold what a statement locks in a prepared transaction for the length of a block."""
    session = connect()
    assert int(scalar(session, "SHOW max_prepared_transactions")), "restart the local cluster: make down up"
    session.execute("BEGIN")
    session.execute(statement.encode())
    session.execute(sql.SQL("PREPARE TRANSACTION {}").format(gid))
    session.close()
    try:
        yield
    finally:
        connect().execute(sql.SQL("ROLLBACK PREPARED {}").format(gid))


@pytest.mark.parametrize(
    ("held", "call"),
    [
        ("SELECT count(*) FROM page_embedding", "embedline.refresh_pipeline('page')"),
        ("SELECT count(*) FROM page_embedding", "embedline.cutover('page', 2, 'no matter')"),
        ("UPDATE page SET views = 1", "embedline.create_pipeline('second', 'page', 'title', 'static-256')"),
        (
            "UPDATE page SET views = 1",
            "embedline.alter_source('page', 'ALTER TABLE page ALTER COLUMN views TYPE bigint')",
        ),
        ("SELECT embedline.embed_pending(10)", "embedline.alter_pipeline('page', content => 'title')"),
        ("UPDATE page SET views = 1", "embedline.drop_pipeline('page')"),
    ],
)
def test_a_prepared_transaction_in_the_way_is_named_with_what_ends_it(
    pages: psycopg.Connection, connect: Connect, held: str, call: str
) -> None:
    pages.execute("SELECT embedline.add_embedding_version('page', 'static-256', column_type => 'halfvec')")
    settle(pages)
    pages.execute("UPDATE page SET body = 'waits' WHERE id = 1")
    # Identifiers are those of the whole server.
    gid = f"it's mine {secrets.token_hex(4)}"
    with _prepared(connect, held, gid):
        with pytest.raises(psycopg.Error) as caught:
            pages.execute(f"SET lock_timeout = '300ms'; SELECT {call}".encode())
        assert caught.value.sqlstate in ("55000", "55P03"), caught.value
        hint = caught.value.diag.message_hint or ""
        assert "pg_prepared_xacts" in hint
        assert f"ROLLBACK PREPARED '{gid.replace(chr(39), chr(39) * 2)}';" in hint
        assert "pg_stat_activity" in hint


def test_without_one_the_hint_names_sessions_alone(pages: psycopg.Connection, connect: Connect) -> None:
    holder = connect(autocommit=False)
    holder.execute("UPDATE page SET views = 1")
    with pytest.raises(errors.LockNotAvailable) as caught:
        pages.execute("SET lock_timeout = '200ms'; SELECT embedline.drop_pipeline('page')")
    assert "pg_stat_activity" in (caught.value.diag.message_hint or "")
    assert "prepared" not in (caught.value.diag.message_hint or "").lower()
    holder.rollback()


# --- indexes


def test_all_views_and_functions_call_an_index_the_same(database: psycopg.Connection) -> None:
    create_pages(database, 10)
    create_pipeline(database)
    states = {
        "status": "SELECT index_state FROM embedline.status",
        "versions": "SELECT index_state FROM embedline.versions",
        "index_progress": "SELECT state FROM embedline.index_progress('page')",
    }

    def told() -> dict[str, str]:
        return {name: scalar(database, query) for name, query in states.items()}

    assert told() == {"status": "after backfill", "versions": "after backfill", "index_progress": "missing"}
    drain(database)
    settle(database)
    assert told() == {"status": "waiting", "versions": "waiting", "index_progress": "missing"}
    database.execute(scalar(database, "SELECT embedline.index_statement('page')"))
    assert set(told().values()) == {"valid"}
    database.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{PAGE.index(1)}'::regclass")
    assert set(told().values()) == {"invalid"}
    assert scalar(database, "SELECT embedline.index_statement('page')") is not None
    database.execute("SELECT embedline.add_embedding_version('page', 'static-256', column_type => 'halfvec')")
    settle(database)
    database.execute(scalar(database, "SELECT embedline.index_statement('page', 2)"))
    spoil = f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{PAGE.index(2)}'::regclass"
    for statement, state in ((spoil, "invalid"), (f"DROP INDEX {PAGE.index(2)}", "missing")):
        database.execute(statement.encode())
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="has no valid vector index") as refused:
            database.execute("SELECT embedline.cutover('page', 2, 'no matter')")
        assert refused.value.diag.message_detail == f"It is {state}."
