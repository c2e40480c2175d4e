"""Changes of a source that PostgreSQL refuses while views show its columns: one statement takes the views away and back."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from psycopg import errors, sql

from conftest import Connect, MakeRole
from embedline.client.connection import engine
from embedline.client.migrations.operations import AlterSourceOp
from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from support import create_pages, create_pipeline, scalar, settle
from working import create_stub_model

__all__ = ["running_stub", "stub"]

# All that one can say of a view, of the views in the test's schema.
_SAID = """
    SELECT c.relname, c.relkind::text, c.relowner::regrole::text, c.relacl::text, c.reloptions::text, c.relispopulated,
        obj_description(c.oid), pg_get_viewdef(c.oid),
        array(SELECT a.attname || coalesce(a.attacl::text, '') || coalesce(col_description(c.oid, a.attnum), '')
            || coalesce(pg_get_expr(d.adbin, d.adrelid), '') FROM pg_attribute AS a
            LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
            WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum),
        array(SELECT pg_get_indexdef(i.indexrelid) || coalesce(obj_description(i.indexrelid), '') FROM pg_index AS i
            WHERE i.indrelid = c.oid ORDER BY 1),
        array(SELECT pg_get_triggerdef(t.oid) FROM pg_trigger AS t WHERE t.tgrelid = c.oid ORDER BY 1),
        array(SELECT pg_get_ruledef(r.oid) FROM pg_rewrite AS r
            WHERE r.ev_class = c.oid AND r.rulename <> '_RETURN' ORDER BY 1)
    FROM pg_class AS c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('v', 'm') ORDER BY 1
"""


def _said(connection: psycopg.Connection) -> list[tuple[Any, ...]]:
    return connection.execute(_SAID.encode()).fetchall()


def _type(connection: psycopg.Connection, relation: str, column: str) -> str:
    query = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = %s"
    return str(scalar(connection, query, (relation, column)))


@pytest.fixture
def paid(database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """Return a database with a pipeline of 40 rows whose provider counts what it is asked for."""
    create_stub_model(database, stub)
    create_pages(database, 40)
    create_pipeline(database, model="stub")
    settle(database)
    stub.forget()
    return database


def _build_on(connection: psycopg.Connection, role: str) -> None:
    grantee = sql.Identifier(role)
    connection.execute(
        "CREATE VIEW short WITH (security_barrier = true) AS SELECT id, views, chunk FROM page_embedding;"
        'CREATE VIEW "on Top" AS SELECT s.id, p.title FROM short AS s JOIN page_embedding_v1 AS p USING (id);'
        "CREATE MATERIALIZED VIEW kept AS SELECT id, chunk, views + 1 AS more FROM short;"
        "CREATE UNIQUE INDEX kept_id_idx ON kept (id); CREATE INDEX kept_more_idx ON kept ((more * 2)) WHERE more > 0;"
        "CREATE MATERIALIZED VIEW bare AS SELECT id FROM kept WITH NO DATA;"
        "COMMENT ON VIEW page_embedding IS 'what we search'; COMMENT ON COLUMN page_embedding.chunk IS 'the ''words''';"
        "COMMENT ON VIEW short IS 'a % short one'; COMMENT ON COLUMN short.id IS 'key'; COMMENT ON INDEX kept_id_idx IS 'ix';"
        "COMMENT ON MATERIALIZED VIEW kept IS 'stored';"
        "ALTER VIEW short ALTER COLUMN views SET DEFAULT 7;"
        "CREATE RULE silent AS ON DELETE TO short DO INSTEAD NOTHING;"
        "CREATE TRIGGER instead INSTEAD OF UPDATE ON page_embedding FOR EACH ROW"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    )
    for statement in (
        "GRANT SELECT ON page_embedding TO {} WITH GRANT OPTION",
        "GRANT SELECT (id, chunk) ON short TO {}, public",
        "GRANT SELECT ON kept TO {}",
        "GRANT SELECT ON short, page_embedding_v1 TO {}",
        'ALTER VIEW "on Top" OWNER TO {}',
    ):
        connection.execute(sql.SQL(statement).format(grantee))


_CHANGES = {
    "a shown column": ("ALTER TABLE page ALTER COLUMN views TYPE bigint", "views", "bigint", 0),
    "an input column": ("ALTER TABLE page ALTER COLUMN body TYPE varchar(4000)", "body", "character varying(4000)", 0),
    "the key": ("ALTER TABLE page ALTER COLUMN id TYPE bigint", "id", "bigint", 0),
    "the key to text": ("ALTER TABLE page ALTER COLUMN id TYPE text USING 'page ' || id", "id", "text", 0),
    "all at once": (
        "ALTER TABLE page ALTER COLUMN id TYPE bigint, ALTER COLUMN title TYPE varchar, ALTER COLUMN views TYPE bigint",
        "views",
        "bigint",
        0,
    ),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_a_columns_type_changes_and_all_that_was_said_of_the_views_stays(
    paid: psycopg.Connection, stub: StubProvider, make_role: MakeRole, change: str
) -> None:
    statement, column, wanted, texts = _CHANGES[change]
    _build_on(paid, make_role())
    # A view whose column changes prints another definition.
    said = [(*row[:7], *row[8:]) for row in _said(paid)]
    with pytest.raises(errors.FeatureNotSupported):
        paid.execute(statement.encode())
    paid.execute("SELECT embedline.alter_source('page', %s)", (statement,))
    assert [(*row[:7], *row[8:]) for row in _said(paid)] == said
    for relation in ("page", "page_embedding", "page_embedding_v1"):
        assert _type(paid, relation, column) == wanted
    assert scalar(paid, "SELECT count(*) FROM kept") == 40
    settle(paid)
    assert stub.counts().get("texts", 0) == texts
    assert scalar(paid, 'SELECT count(*) FROM "on Top"') == 40
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0
    stub.forget()
    paid.execute(
        "UPDATE page SET body = 'captured' WHERE title = 'Title 5'; UPDATE page SET views = 3 WHERE title = 'Title 6'"
    )
    paid.execute("DELETE FROM page WHERE title = 'Title 7'")
    settle(paid)
    assert stub.counts()["texts"] == 1
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 39
    assert paid.execute("SELECT state, last_error FROM embedline.status").fetchone() == ("active", None)


def test_a_shown_column_is_dropped_and_the_views_stay(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute(
        "CREATE VIEW titles AS SELECT id, title FROM page_embedding; CREATE VIEW seen AS SELECT views FROM page_embedding"
    )
    drop = "ALTER TABLE page DROP COLUMN views"
    with pytest.raises(errors.DependentObjectsStillExist, match="cannot be put back") as refused:
        paid.execute("SELECT embedline.alter_source('page', %s)", (drop,))
    assert 'view "public"."seen"' in str(refused.value)
    assert "DROP VIEW" in (refused.value.diag.message_hint or "")
    assert scalar(paid, "SELECT count(*) FROM seen") == 40
    paid.execute("DROP VIEW seen")
    paid.execute("SELECT embedline.alter_source('page', %s)", (drop,))
    assert scalar(paid, "SELECT count(*) FROM titles") == 40
    with pytest.raises(
        errors.DependentObjectsStillExist, match='no column "body", which content of pipeline "page" reads'
    ):
        paid.execute("SELECT embedline.alter_source('page', 'ALTER TABLE page DROP COLUMN body')")
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    paid.execute("UPDATE page SET body = 'captured' WHERE id = 1")
    settle(paid)
    assert stub.counts()["texts"] == 1


def test_the_column_of_an_old_key_is_dropped_after_a_swap(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute("CREATE VIEW titles AS SELECT id, title FROM page_embedding")
    paid.execute(
        "SELECT embedline.alter_source('page', $$ALTER TABLE page ADD COLUMN new_id bigint; UPDATE page SET new_id = id;"
        " ALTER TABLE page DROP CONSTRAINT page_pkey; ALTER TABLE page RENAME COLUMN id TO old_id;"
        " ALTER TABLE page RENAME COLUMN new_id TO id; ALTER TABLE page ADD PRIMARY KEY (id)$$)"
    )
    with pytest.raises(errors.DependentObjectsStillExist, match="titles"):
        paid.execute("SELECT embedline.alter_source('page', 'ALTER TABLE page DROP COLUMN old_id')")
    paid.execute("DROP VIEW titles; SELECT embedline.alter_source('page', 'ALTER TABLE page DROP COLUMN old_id')")
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_rows_that_the_statement_changes_are_embedded(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute(
        "SELECT embedline.alter_source('page', $$ALTER TABLE page ALTER COLUMN body TYPE varchar;"
        " UPDATE page SET body = 'changed' WHERE id = 1; DELETE FROM page WHERE id = 2;"
        " INSERT INTO page VALUES (90, 'new', 'row')$$)"
    )
    settle(paid)
    assert stub.counts()["texts"] == 2
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 40
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_a_renamed_column_keeps_its_name_in_the_views(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute("CREATE VIEW texts AS SELECT id, body, views FROM page_embedding")
    paid.execute("ALTER TABLE page RENAME COLUMN body TO prose")
    paid.execute("ALTER TABLE page ADD COLUMN body text DEFAULT 'another'")
    paid.execute(
        "SELECT embedline.alter_source('page',"
        " 'ALTER TABLE page ALTER COLUMN prose TYPE varchar, ALTER COLUMN views TYPE bigint')"
    )
    assert scalar(paid, "SELECT body LIKE 'Body number 1 %' FROM texts WHERE id = 1")
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    paid.execute("UPDATE page SET prose = 'captured' WHERE id = 1; UPDATE page SET body = 'not read' WHERE id = 2")
    settle(paid)
    assert stub.counts()["texts"] == 1


def test_pipelines_that_share_a_source_and_a_view_are_altered_together(
    paid: psycopg.Connection, stub: StubProvider
) -> None:
    create_pipeline(paid, name="titles", content="title", model="stub", filter="views = 0")
    settle(paid)
    paid.execute(
        "CREATE VIEW both_of_them AS SELECT p.id FROM page_embedding AS p JOIN titles_embedding AS t USING (id)"
    )
    stub.forget()
    paid.execute("SELECT embedline.alter_source('page', 'ALTER TABLE page ALTER COLUMN views TYPE bigint')")
    assert scalar(paid, "SELECT count(*) FROM both_of_them") == 40
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('titles')") == 0


def test_a_statement_that_fails_changes_nothing(paid: psycopg.Connection) -> None:
    said = _said(paid)
    for statement, error in (
        ("ALTER TABLE page ALTER COLUMN views TYPE uuid", errors.DatatypeMismatch),
        ("ALTER TABLE page DROP CONSTRAINT page_pkey; ALTER TABLE page DROP COLUMN id", errors.InvalidParameterValue),
        ("DROP TABLE page", errors.UndefinedObject),
        ("this is no SQL", errors.SyntaxError),
    ):
        with pytest.raises(error):
            paid.execute("SELECT embedline.alter_source('page', %s)", (statement,))
        assert _said(paid) == said
    with paid.transaction():
        paid.execute(
            "DO $$BEGIN PERFORM embedline.alter_source('page', 'no SQL'); EXCEPTION WHEN OTHERS THEN NULL; END$$"
        )
        paid.execute("ALTER TABLE page RENAME COLUMN id TO number")
        paid.execute("INSERT INTO page (number, title, body) VALUES (90, 'followed', 'all the same')")
    settle(paid)
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 41


_OBSTACLES = {
    "function found()": "CREATE FUNCTION found() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM page_embedding; END",
    "function of(page_embedding)": "CREATE FUNCTION of(page_embedding) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
    "column hit of table hits": "CREATE TABLE hits (hit page_embedding)",
    "view passing": "CREATE TEMP VIEW passing AS SELECT id FROM page_embedding",
    "policy": "CREATE TABLE guarded (id integer); CREATE POLICY seen ON guarded USING (id IN (SELECT id FROM page_embedding))",
    "rule": "CREATE TABLE ruled (id integer); CREATE RULE r AS ON INSERT TO ruled DO ALSO SELECT id FROM page_embedding",
}


@pytest.mark.parametrize("obstacle", _OBSTACLES)
def test_what_cannot_be_put_back_is_named(paid: psycopg.Connection, obstacle: str) -> None:
    paid.execute(_OBSTACLES[obstacle].encode())
    said = _said(paid)
    with pytest.raises(errors.DependentObjectsStillExist, match="cannot be put back depend on") as refused:
        paid.execute("SELECT embedline.alter_source('page', 'ALTER TABLE page ALTER COLUMN views TYPE bigint')")
    named = {"policy": "table guarded", "rule": "table ruled"}.get(obstacle, obstacle)
    detail = (refused.value.diag.message_detail or "").replace("public.", "")
    assert named in detail or obstacle in detail
    assert _said(paid) == said


def test_the_statement_runs_with_its_callers_rights(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    owner, other = make_role("embedline_admin"), make_role("embedline_admin")
    database.execute(sql.SQL("CREATE SCHEMA own AUTHORIZATION {}").format(sql.Identifier(owner)))
    admin = connect(owner)
    create_pages(admin, 3, table="own.page")
    create_pipeline(admin, source="own.page")
    settle(database)
    database.execute("CREATE TABLE secret (word text)")
    for statement in (
        "ALTER TABLE public.secret ADD COLUMN x integer",
        "TABLE public.secret",
        "SET ROLE postgres; TABLE public.secret",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            admin.execute("SELECT embedline.alter_source('own.page', %s)", (statement,))
    with pytest.raises(errors.InsufficientPrivilege):
        connect(other).execute("SELECT embedline.alter_source('own.page', 'SELECT 1')")
    # A function of the owner's that runs as its owner, called by a superuser: what it hands over runs as its owner, too.
    admin.execute(
        "CREATE FUNCTION own.trap(statement text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS"
        " $$ BEGIN PERFORM embedline.alter_source('own.page', statement); END $$"
    )
    with pytest.raises(errors.InsufficientPrivilege):
        database.execute("SELECT own.trap('TABLE public.secret')")
    admin.execute(
        "SET search_path = own; SELECT embedline.alter_source('page', 'ALTER TABLE page ALTER COLUMN views TYPE bigint')"
    )
    assert _type(database, "own.page_embedding", "views") == "bigint"
    # The halves alone: one does nothing without the other, and neither without the source's owner.
    for call in ("_take_away('own.page')", "_put_back('own.page'::regclass::oid::bigint)"):
        with pytest.raises((errors.InsufficientPrivilege, errors.ObjectNotInPrerequisiteState)):
            connect(other).execute(f"SELECT embedline.{call}".encode())


def test_a_table_without_a_pipeline_is_told(database: psycopg.Connection) -> None:
    create_pages(database, 1)
    with pytest.raises(errors.UndefinedObject, match="no pipeline watches"):
        database.execute("SELECT embedline.alter_source('page', 'ALTER TABLE page ALTER COLUMN views TYPE bigint')")


def test_a_migration_alters_a_source_and_back(paid: psycopg.Connection, database_dsn: str, stub: StubProvider) -> None:
    paid.execute("CREATE VIEW short AS SELECT id, views FROM page_embedding")
    forth = AlterSourceOp(
        "page", "ALTER TABLE page ALTER COLUMN views TYPE bigint", "ALTER TABLE page ALTER COLUMN views TYPE integer"
    )
    for operation, wanted in ((forth, "bigint"), (forth.reverse(), "integer")):
        with engine(database_dsn).begin() as connection:
            Operations(MigrationContext.configure(connection)).invoke(operation)
        assert _type(paid, "short", "views") == wanted
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    paid.execute("DROP VIEW short; SELECT embedline.drop_pipeline('page')")
    with engine(database_dsn).begin() as connection:
        Operations(MigrationContext.configure(connection)).invoke(forth)
    assert _type(paid, "page", "views") == "bigint"
