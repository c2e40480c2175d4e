"""Another table in the place of a source: what became of the source, and going over to the table without paying again."""

from __future__ import annotations

import threading

import psycopg
import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from psycopg import errors, sql

from conftest import Connect, MakeRole
from embedline.client.connection import engine
from embedline.client.migrations.operations import MovePipelineOp
from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from support import PAGE, create_pages, create_pipeline, scalar, settle
from working import create_stub_model

__all__ = ["running_stub", "stub"]

# As dbt and gh-ost do: a copy takes the table's name. Of the copy one row is gone, one is new, one is changed.
_COPY = (
    PAGE.replace("TABLE page", "TABLE page_new")
    + "; INSERT INTO page_new SELECT * FROM page WHERE id > 1;"
    + " UPDATE page_new SET body = 'changed' WHERE id = 2; INSERT INTO page_new VALUES (90, 'new', 'row')"
)
_SWAP = f"{_COPY}; ALTER TABLE page RENAME TO page_old; ALTER TABLE page_new RENAME TO page"


@pytest.fixture
def paid(database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """Return a database with a pipeline of 40 rows whose provider counts what it is asked for."""
    create_stub_model(database, stub)
    create_pages(database, 40)
    create_pipeline(database, model="stub")
    settle(database)
    stub.forget()
    return database


def _trouble(connection: psycopg.Connection) -> tuple[str, str, str, str]:
    row = connection.execute("SELECT state, source, last_error, remedy FROM embedline.status").fetchone()
    assert row is not None
    return row


def _assert_moved(connection: psycopg.Connection, stub: StubProvider, texts: int = 2) -> None:
    settle(connection)
    assert stub.counts().get("texts", 0) == texts
    rows = connection.execute("SELECT id, chunk FROM page_embedding WHERE id < 4 OR id > 40 ORDER BY id").fetchall()
    assert [row[0] for row in rows] == [2, 3, 90]
    assert rows[0][1].endswith("changed")
    assert scalar(connection, "SELECT count(*) FROM page_embedding") == 40
    assert connection.execute("SELECT state, last_error, remedy FROM embedline.status").fetchone() == (
        "active",
        None,
        None,
    )
    assert scalar(connection, "SELECT count(*) FROM embedline.verify('page')") == 0


@pytest.mark.parametrize("dropped", [False, True])
def test_a_table_that_took_the_sources_name_is_told_and_gone_over_to(
    paid: psycopg.Connection, stub: StubProvider, dropped: bool
) -> None:
    paid.execute(_SWAP.encode())
    state, source, error, remedy = _trouble(paid)
    assert (state, source) == ("source replaced", "page_old")
    assert "is named public.page_old now, and another table is named" in error
    if dropped:
        paid.execute("DROP TABLE page_old CASCADE")
        state, source, error, remedy = _trouble(paid)
        assert (state, source) == ("source gone", "public.page")
        assert "was dropped, and another table is named" in error
    assert remedy == "SELECT embedline.move_pipeline('page', 'public.page');"
    assert error.endswith(remedy)
    paid.execute(remedy.encode())
    _assert_moved(paid, stub)
    paid.execute("UPDATE page SET body = 'captured' WHERE id = 5; DELETE FROM page WHERE id = 6")
    settle(paid)
    assert stub.counts()["texts"] >= 1
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 39
    if not dropped:
        assert scalar(paid, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'page_old'::regclass") == 0


def test_a_source_that_was_dropped_is_told_with_a_statement_that_runs(paid: psycopg.Connection) -> None:
    paid.execute("DROP TABLE page CASCADE")
    state, source, error, remedy = _trouble(paid)
    assert (state, source, remedy) == ("source gone", "public.page", "SELECT embedline.drop_pipeline('page');")
    assert "was dropped" in error
    for call in ("refresh_pipeline('page')", "alter_pipeline('page', content => 'title')", "verify('page')"):
        with pytest.raises(psycopg.Error) as caught:
            paid.execute(f"SELECT embedline.{call}".encode())
        assert "move_pipeline" in (caught.value.diag.message_hint or ""), call
    paid.execute(remedy.encode())
    assert scalar(paid, "SELECT count(*) FROM embedline.status") == 0
    assert scalar(paid, "SELECT count(*) FROM pg_class WHERE relnamespace = 'embedline_data'::regnamespace") == 0
    # Two functions there belong to no pipeline.
    left = "SELECT proname FROM pg_proc WHERE pronamespace IN (%s::regnamespace, %s::regnamespace) ORDER BY 1"
    assert paid.execute(left, ("embedline_data", "embedline_expression")).fetchall() == [
        ("_hold_postings",),
        ("_row_state",),
    ]


def test_whoever_made_a_pipeline_drops_it_after_its_source(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role, other = make_role("embedline_admin"), make_role("embedline_admin")
    database.execute(sql.SQL("CREATE SCHEMA own AUTHORIZATION {}").format(sql.Identifier(role)))
    admin = connect(role)
    create_pages(admin, 3, table="own.page")
    create_pipeline(admin, source="own.page")
    settle(database)
    admin.execute("DROP TABLE own.page CASCADE")
    with pytest.raises(errors.InsufficientPrivilege):
        connect(other).execute("SELECT embedline.drop_pipeline('page')")
    admin.execute("SELECT embedline.drop_pipeline('page')")
    assert scalar(database, "SELECT count(*) FROM embedline.status") == 0


def test_a_plain_rename_is_no_trouble(paid: psycopg.Connection) -> None:
    paid.execute("ALTER TABLE page RENAME TO article")
    assert paid.execute("SELECT state, remedy FROM embedline.status").fetchone() == ("active", None)
    paid.execute(PAGE)
    assert scalar(paid, "SELECT state FROM embedline.status") == "source replaced"
    paid.execute("SELECT embedline.refresh_pipeline('page')")
    assert paid.execute("SELECT state, source FROM embedline.status").fetchone() == ("active", "article")


def test_a_move_keeps_the_views_with_grants_and_what_is_built_on_them(
    paid: psycopg.Connection, stub: StubProvider, make_role: MakeRole
) -> None:
    role = make_role()
    paid.execute(sql.SQL("GRANT SELECT ON page_embedding TO {}").format(sql.Identifier(role)))
    paid.execute("COMMENT ON VIEW page_embedding IS 'ours'; CREATE VIEW short AS SELECT id, chunk FROM page_embedding")
    paid.execute(_SWAP.encode())
    paid.execute("SELECT embedline.move_pipeline('page', 'page')")
    _assert_moved(paid, stub)
    assert scalar(paid, "SELECT count(*) FROM short") == 40
    assert scalar(paid, "SELECT has_table_privilege(%s, 'page_embedding', 'SELECT')", (role,))
    assert scalar(paid, "SELECT obj_description('page_embedding'::regclass)") == "ours"


def test_what_waits_when_a_pipeline_moves_is_not_lost(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute("UPDATE page SET body = 'waits' WHERE id = 7")
    paid.execute(_SWAP.encode())
    paid.execute("UPDATE page_old SET body = 'of the table that is left' WHERE id = 8")
    paid.execute("SELECT embedline.move_pipeline('page', 'page')")
    _assert_moved(paid, stub, 3)
    assert scalar(paid, "SELECT chunk LIKE '%waits' FROM page_embedding WHERE id = 7")
    assert scalar(paid, "SELECT chunk LIKE 'Title 8%about%' FROM page_embedding WHERE id = 8")


def test_search_goes_on_while_a_pipeline_moves(paid: psycopg.Connection, stub: StubProvider, connect: Connect) -> None:
    paid.execute(_COPY.encode())
    ended, found, failed = threading.Event(), [], []

    def search() -> None:
        session = connect()
        while not ended.is_set():
            try:
                found.append(len(session.execute("SELECT key FROM embedline.search('page', 'rivers', 5)").fetchall()))
                session.execute("SELECT count(*) FROM page_embedding", prepare=False)
            except psycopg.Error as error:
                failed.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    for table in ("page_new", "page", "page_new"):
        before = len(found)
        paid.execute("SELECT embedline.move_pipeline('page', %s::text::regclass)", (table,))
        settle(paid)
        while len(found) < before + 3 and not failed:
            pass
    ended.set()
    thread.join(30)
    assert failed == []
    assert set(found) == {5}


@pytest.mark.parametrize("gone", [False, True])
def test_a_column_renamed_before_is_known_by_its_name_of_now(
    paid: psycopg.Connection, stub: StubProvider, gone: bool
) -> None:
    paid.execute("ALTER TABLE page RENAME COLUMN body TO prose")
    paid.execute("CREATE TABLE page_new (views integer, prose text, title text, id integer PRIMARY KEY)")
    paid.execute("INSERT INTO page_new SELECT views, prose, title, id FROM page")
    if gone:
        paid.execute("DROP TABLE page CASCADE")
    paid.execute("SELECT embedline.move_pipeline('page', 'page_new')")
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    paid.execute("UPDATE page_new SET prose = 'changed' WHERE id = 1")
    settle(paid)
    assert stub.counts()["texts"] == 1
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 40


def test_a_table_of_another_type_of_key_or_column_is_gone_over_to(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute("CREATE TABLE page_new (id bigint PRIMARY KEY, title varchar(200), body varchar, views bigint)")
    paid.execute("INSERT INTO page_new SELECT * FROM page WHERE id > 1")
    paid.execute("SELECT embedline.move_pipeline('page', 'page_new')")
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    paid.execute("INSERT INTO page_new VALUES (5000000000, 'far', 'away', 0)")
    settle(paid)
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 40
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_a_partitioned_table_is_gone_over_to_and_back(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute(
        "CREATE TABLE page_new (LIKE page, PRIMARY KEY (id)) PARTITION BY RANGE (id);"
        "CREATE TABLE low PARTITION OF page_new FOR VALUES FROM (0) TO (20);"
        "CREATE TABLE high PARTITION OF page_new FOR VALUES FROM (20) TO (200); INSERT INTO page_new SELECT * FROM page"
    )
    for table, leaf in (("page_new", "high"), ("page", "page")):
        paid.execute("SELECT embedline.move_pipeline('page', %s::text::regclass)", (table,))
        settle(paid)
        # The table that was left still has the row that is changed in the other one.
        assert stub.counts().get("texts", 0) == (0 if table == "page_new" else 1)
        paid.execute(f"UPDATE {leaf} SET body = 'changed in {leaf}' WHERE id = 30".encode())
        settle(paid)
        assert stub.counts()["texts"] == 1
        assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0
        stub.forget()


def test_a_table_that_cannot_take_the_place_is_refused_with_the_reason(
    paid: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    paid.execute(
        "CREATE TABLE bare (id integer PRIMARY KEY, title text); CREATE TABLE keyless (id integer, title text, body text)"
    )
    with pytest.raises(errors.DependentObjectsStillExist, match='no column "body", which content') as lacking:
        paid.execute("SELECT embedline.move_pipeline('page', 'bare')")
    assert "alter_pipeline" in (lacking.value.diag.message_hint or "")
    with pytest.raises(errors.InvalidParameterValue, match="no primary key"):
        paid.execute("SELECT embedline.move_pipeline('page', 'keyless')")
    with pytest.raises(errors.InvalidParameterValue, match="cannot be a source"):
        paid.execute("SELECT embedline.move_pipeline('page', 'page_embedding')")
    role = make_role("embedline_admin")
    with pytest.raises(errors.InsufficientPrivilege):
        connect(role).execute("SELECT embedline.move_pipeline('page', 'bare')")
    settle(paid)
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 40


def test_the_owner_of_the_table_has_the_pipeline(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role, heir = make_role("embedline_admin"), make_role("embedline_admin")
    database.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(role), sql.Identifier(heir)))
    database.execute(
        sql.SQL("CREATE SCHEMA own; GRANT ALL ON SCHEMA own TO {}, {}").format(*map(sql.Identifier, (role, heir)))
    )
    create_pages(connect(role), 5, table="own.page")
    create_pipeline(connect(role), source="own.page")
    settle(database)
    create_pages(connect(heir), 5, table="own.copy")
    connect(heir).execute("SELECT embedline.move_pipeline('page', 'own.copy')")
    settle(database)
    owners = (
        "SELECT array_agg(DISTINCT relowner::regrole::text) FROM pg_class WHERE relname ~ '^page_embedding'"
        " UNION ALL SELECT array_agg(DISTINCT proowner::regrole::text) FROM pg_proc WHERE proname = 'page_content'"
    )
    assert [[heir], [heir]] == [[name.strip('"') for name in row[0]] for row in database.execute(owners)]
    assert scalar(database, "SELECT count(*) FROM own.page_embedding") == 5
    assert len(connect(heir).execute("SELECT key FROM embedline.search('page', 'rivers', 3)").fetchall()) == 3


def test_a_migration_moves_a_pipeline_and_back(paid: psycopg.Connection, database_dsn: str, stub: StubProvider) -> None:
    paid.execute("CREATE TABLE page_new (LIKE page INCLUDING ALL); INSERT INTO page_new SELECT * FROM page")
    forth = MovePipelineOp("page", "page_new", "page")
    for operation in (forth, forth, forth.reverse()):
        with engine(database_dsn).begin() as connection:
            Operations(MigrationContext.configure(connection)).invoke(operation)
        settle(paid)
        assert scalar(paid, "SELECT source FROM embedline.status") == operation.new_source
    assert stub.counts().get("texts", 0) == 0
