"""The database that goes from test to test is as new each time, or replaced."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from pytest_postgresql.executors import NoopExecutor

from conftest import cloned_database
from recycling import RecycledDatabase
from support import create_pages, create_pipeline, scalar, settle


@pytest.fixture(scope="module")
def recycled(template_server: NoopExecutor) -> Iterator[RecycledDatabase]:
    """A database of this module's own."""
    database = RecycledDatabase(lambda: cloned_database(template_server, template_server.template_dbname))
    yield database
    database.close()


def test_a_pipeline_and_what_a_test_made_besides_are_gone_without_a_new_clone(recycled: RecycledDatabase) -> None:
    with recycled.lend([]) as dsn:
        clones = recycled.clones
        session = recycled.session(dsn)
        assert session is not None
        pid = session.info.backend_pid
        create_pages(session, 5)
        create_pipeline(session)
        settle(session)
        for statement in (
            "CREATE SCHEMA other",
            "CREATE TABLE other.kept (id integer)",
            "CREATE FUNCTION mine() RETURNS integer LANGUAGE sql RETURN 1",
            "CREATE TYPE mood AS ENUM ('sad')",
            "CREATE PUBLICATION everything FOR ALL TABLES",
            "SET work_mem = '5MB'",
            "SELECT pg_advisory_lock(77)",
            "SELECT embedline.configure('max_xmin_age', 7)",
            "DO LANGUAGE plpython3u 'GD[''mine''] = 1'",
            "CREATE TEMPORARY TABLE passing (id integer)",
        ):
            session.execute(statement.encode())
        session.autocommit = False
        session.execute("INSERT INTO other.kept VALUES (1)")
    with recycled.lend([]) as again:
        assert (again, recycled.clones) == (dsn, clones)
        session = recycled.session(again)
        assert session is not None
        assert session.info.backend_pid == pid, "the session is warm"
        assert session.autocommit
        tables = "SELECT array_agg(relname::text) FROM pg_class WHERE relname = ANY('{page,kept,passing,page_outbox}')"
        assert scalar(session, tables) is None
        assert scalar(session, "SELECT to_regprocedure('mine()')") is None
        assert scalar(session, "SHOW work_mem") != "5MB"
        assert scalar(session, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = %s", (pid,)) == 0
        assert (
            scalar(session, "SELECT count(*) FROM embedline.setting WHERE name = 'max_xmin_age' AND value = '7'") == 0
        )
        session.execute("DO LANGUAGE plpython3u $$assert not GD, list(GD)$$")
        create_pages(session, 5)
        create_pipeline(session)
        assert scalar(session, "SELECT min(pipeline_id) FROM embedline.pipeline") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE embedline.model SET timeout_seconds = 17",
        "DELETE FROM embedline.model WHERE name = 'minilm'",
        "INSERT INTO embedline.setting VALUES ('max_xmin_age', '7')",
    ],
)
def test_rows_of_the_template_are_as_they_were_after_each_test(recycled: RecycledDatabase, statement: str) -> None:
    rows = "SELECT (SELECT md5(string_agg(m::text, '' ORDER BY name)) FROM embedline.model AS m), count(*) FROM embedline.setting"
    with recycled.lend([]) as dsn, psycopg.connect(dsn) as session:
        before = session.execute(rows).fetchone()
    # Rows that were put back are taken for the template's by the test after that.
    for _ in range(2):
        with recycled.lend([]) as again, psycopg.connect(again, autocommit=True) as session:
            assert again == dsn
            assert session.execute(rows).fetchone() == before
            session.execute(statement.encode())
            assert session.execute(rows).fetchone() != before


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER FUNCTION embedline.pause_pipeline(text) RENAME TO pause",
        "GRANT SELECT ON embedline.setting TO PUBLIC",
        "ALTER TABLE embedline.dead_letter ADD COLUMN more text",
        "CREATE EXTENSION IF NOT EXISTS hstore",
        "ALTER EVENT TRIGGER embedline_follow_source DISABLE",
        "COMMENT ON TABLE embedline.setting IS 'another'",
        "DROP VIEW embedline.usage",
    ],
)
def test_a_database_that_cannot_be_restored_is_replaced(recycled: RecycledDatabase, statement: str) -> None:
    with recycled.lend([]) as dsn:
        session = recycled.session(dsn)
        assert session is not None
        session.execute(statement.encode())
    with recycled.lend([]) as other:
        assert other != dsn


def test_a_session_that_a_test_closed_is_replaced(recycled: RecycledDatabase) -> None:
    with recycled.lend([]) as dsn:
        session = recycled.session(dsn)
        assert session is not None
        session.close()
    with recycled.lend([]) as again:
        session = recycled.session(again)
        assert session is not None
        assert scalar(session, "SELECT 1") == 1
