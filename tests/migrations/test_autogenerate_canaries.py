"""Canary tables, which people make by hand, beside `alembic revision --autogenerate` and `alembic check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pytest_postgresql.executors import NoopExecutor

from application import PIPELINE, Application
from conftest import MakeRole, cloned_database, dbname_of
from support import create_pipeline, scalar, settle

_NOTHING = "No new upgrade operations detected"
# As docs/how-to/upgrade-a-model.md has it.
_CANARIES = "CREATE TABLE {} (query text, key text, grade numeric DEFAULT 1)"
_DECLARED = """
sa.Table(
    "article_canary", metadata,
    sa.Column("query", sa.Text), sa.Column("key", sa.Text), sa.Column("grade", sa.Numeric, server_default="1"),
    sa.Column("asked_by", sa.Text),
)
"""


@pytest.fixture(scope="module")
def first_application(template_server: NoopExecutor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    """An application with a pipeline over its table: each test begins with a copy of it and of its database."""
    with cloned_database(template_server, template_server.template_dbname) as dsn:
        app = Application(tmp_path_factory.mktemp("first"), dsn)
        app.autogenerate("article")
        app.alembic("upgrade", "head")
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO article SELECT n, 'Title ' || n, 'Body ' || n FROM generate_series(1, 20) AS n"
            )
            create_pipeline(connection, "article", "article", "title", index_method="none")
            settle(connection)
        yield app


@pytest.fixture
def database_dsn(
    first_application: Application, template_server: NoopExecutor, role_passwords: dict[str, str]
) -> Iterator[str]:
    """URI of a clone of the application's database."""
    with cloned_database(template_server, dbname_of(first_application.dsn)) as dsn:
        yield dsn


@pytest.fixture
def application(first_application: Application, tmp_path: Path, database_dsn: str) -> Application:
    """The application on the test's own database."""
    return first_application.copy(tmp_path, database_dsn)


def _create_canaries(database: psycopg.Connection, table: str) -> None:
    database.execute(_CANARIES.format(table).encode())
    database.execute(f"INSERT INTO {table} (query, key) SELECT title, id::text FROM article".encode())


@pytest.mark.parametrize("table", ["article_canary", "canary", "article_canaries"])
def test_a_canary_table_as_documented_is_left_alone_before_its_first_gate(
    application: Application, database: psycopg.Connection, table: str
) -> None:
    _create_canaries(database, table)
    database.execute(f"CREATE INDEX ON {table} (query)".encode())
    assert _NOTHING in application.alembic("check")


@pytest.mark.parametrize("table", ["question", '"Our questions"', "asked.question"])
def test_a_table_that_a_gate_has_used_is_left_alone_whatever_its_name(
    application: Application, database: psycopg.Connection, table: str
) -> None:
    database.execute("CREATE SCHEMA asked")
    _create_canaries(database, table)
    database.execute(f"ALTER TABLE {table} ADD asked_at date".encode())
    assert "remove_table" in application.alembic("check", fails=True)
    database.execute("SELECT embedline.evaluate('article', 1, %s::regclass)", (table,))
    assert _NOTHING in application.alembic("check")


def test_a_table_that_the_declaration_names_is_left_alone(
    application: Application, database: psycopg.Connection
) -> None:
    _create_canaries(database, "question")
    declared = PIPELINE.replace("title || ': ' || body", "title")
    application.declare(declared + '[pipelines.article.upgrade]\ncanaries = "Question"\n')
    assert _NOTHING in application.alembic("check")


def test_a_table_that_a_cutover_to_come_names_is_left_alone(
    application: Application, database: psycopg.Connection
) -> None:
    _create_canaries(database, "question")
    application.run("embedline", "upgrade-model", "article", "--model", "minilm", "--canaries", "public.question")
    application.alembic("stamp", "head")
    assert _NOTHING in application.alembic("check")


def test_a_role_without_rights_on_embedline_is_proposed_no_drop_either(
    application: Application, database: psycopg.Connection, make_role: MakeRole
) -> None:
    _create_canaries(database, "article_canary")
    role = make_role()
    database.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}".encode())
    application.act_as(role)
    assert _NOTHING in application.alembic("check")


def test_the_tables_of_the_demo_are_left_alone(application: Application, database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE manual (page text PRIMARY KEY, title text, body text)")
    assert "remove_table" in application.alembic("check", fails=True)
    database.execute("COMMENT ON TABLE manual IS 'Embedline demo: pages of the PostgreSQL manual'")
    assert _NOTHING in application.alembic("check")


def test_a_canary_table_that_the_metadata_declares_is_still_compared(
    application: Application, database: psycopg.Connection
) -> None:
    _create_canaries(database, "article_canary")
    database.execute("CREATE INDEX article_canary_query_idx ON article_canary (query)")
    models = application.folder / "models.py"
    models.write_text(models.read_text(encoding="utf-8") + _DECLARED, encoding="utf-8")
    (revision,) = application.autogenerate("who asked")
    assert "op.add_column('article_canary', sa.Column('asked_by'" in revision
    assert "op.drop_index(op.f('article_canary_query_idx')" in revision
    assert "drop_table" not in revision.partition("def downgrade")[0]
    application.alembic("upgrade", "head")
    assert scalar(database, "SELECT count(asked_by) FROM article_canary") == 0
    assert _NOTHING in application.alembic("check")


def test_other_tables_without_a_declaration_are_still_proposed_to_be_dropped(
    application: Application, database: psycopg.Connection
) -> None:
    _create_canaries(database, "article_canary")
    database.execute("CREATE TABLE leftover (query text, key text)")
    # By its name alone, a table is none of ours.
    database.execute("CREATE TABLE bird_canary (id integer, song text)")
    found = application.alembic("check", fails=True)
    assert "leftover" in found
    assert "bird_canary" in found
    assert "article_canary" not in found.partition("FAILED")[2]
