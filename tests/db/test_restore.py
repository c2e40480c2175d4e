"""A database that pg_dump has taken to another place goes on where it was: numbers of objects mean nothing there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from generated_names import PAGE
from small_models import register_static
from support import assert_exact, create_pages, create_pipeline, install, scalar, searching, settle
from upgrading import add_version, cut_over, settle_versions

Restore = Callable[[], psycopg.Connection]


@pytest.fixture
def restore(database_dsn: str, empty_database_dsn: str) -> Restore:
    """Dump the database into an empty one and connect to that."""

    def restored() -> psycopg.Connection:
        pg_dump, psql = shutil.which("pg_dump"), shutil.which("psql")
        assert pg_dump is not None
        assert psql is not None
        dump = subprocess.run([pg_dump, "--dbname", database_dsn], check=True, capture_output=True).stdout
        subprocess.run(
            [psql, "--quiet", "--no-psqlrc", "--set", "ON_ERROR_STOP=1", "--dbname", empty_database_dsn],
            input=dump, check=True, capture_output=True,
        )  # fmt: skip
        return psycopg.connect(empty_database_dsn, autocommit=True)

    return restored


@pytest.mark.parametrize("is_partitioned", [False, True])
def test_chunking_anew_goes_on_after_a_restore(
    database: psycopg.Connection, restore: Restore, is_partitioned: bool
) -> None:
    create_pages(database, 300)
    if is_partitioned:
        database.execute(
            "ALTER TABLE page RENAME TO page_1; ALTER TABLE page_1 RENAME CONSTRAINT page_pkey TO page_1_pkey"
        )
        database.execute("CREATE TABLE page (LIKE page_1 INCLUDING ALL) PARTITION BY RANGE (id)")
        database.execute("ALTER TABLE page ATTACH PARTITION page_1 FOR VALUES FROM (1) TO (1000)")
    create_pipeline(database, index_method="none")
    settle(database)
    add_version(database, "static-256", chunking="sentences")
    scalar(database, "SELECT embedline.embed_pending(120)")
    with restore() as restored:
        settle_versions(restored)
        cut_over(restored, 2)
        assert assert_exact(restored) == 300


def test_ranges_of_another_database_are_made_anew(database: psycopg.Connection) -> None:
    create_pages(database, 300)
    create_pipeline(database, index_method="none")
    settle(database)
    add_version(database, "static-256", chunking="sentences")
    scalar(database, "SELECT embedline.embed_pending(120)")
    # As a dump by an earlier release leaves them: the number of nothing, or of another table.
    database.execute("UPDATE embedline.backfill_range SET relation = 'embedline.setting'::regclass")
    settle_versions(database)
    cut_over(database, 2)
    assert assert_exact(database) == 300


def test_a_statement_embeds_with_the_version_that_it_reads_after_a_restore(
    database: psycopg.Connection, restore: Restore
) -> None:
    create_pages(database, 40)
    create_pipeline(database, index_method="none")
    register_static(database, 64)
    add_version(database, "static-64")
    settle_versions(database)
    dimensions = (
        "SELECT vector_dims(embedline.embed_query('page', 'bread')::vector), max(vector_dims(embedding))"
        " FROM page_embedding"
    )
    with restore() as restored, psycopg.connect(restored.info.dsn, password=restored.info.password) as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT 1 FROM embedline.version")
        restored.execute("SET lock_timeout = '5s'")
        cut_over(restored, 2)
        assert old.execute(dimensions).fetchone() == (64, 64)


def test_without_its_function_nothing_says_what_version_serves(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database, index_method="none")
    database.execute(f"DROP FUNCTION {PAGE('serving')}()")
    with pytest.raises(errors.UndefinedObject, match="serving") as caught:
        database.execute("SELECT embedline.embed_query('page', 'bread')")
    assert "refresh_pipeline" in (caught.value.diag.message_hint or "")
    database.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(database, "SELECT vector_dims(embedline.embed_query('page', 'bread')::vector)") == 256


@pytest.fixture
def restored(database: psycopg.Connection, restore: Restore) -> Iterator[psycopg.Connection]:
    """A copy of tables of which the first or the second column was dropped: pg_dump numbers columns anew."""
    database.execute(
        "CREATE TABLE m (old integer, id integer PRIMARY KEY, parent integer, body text);"
        " ALTER TABLE m DROP COLUMN old; INSERT INTO m VALUES (1, 2, 'one'), (2, 1, 'two'), (3, 3, 'three');"
        " CREATE TABLE zz (a integer, x integer, b integer, body text, PRIMARY KEY (a, b));"
        " ALTER TABLE zz DROP COLUMN x; INSERT INTO zz VALUES (1, 1, 'one'), (1, 2, 'two')"
    )
    create_pipeline(database, "m", "m", "body")
    create_pipeline(database, "zz", "zz", "body")
    settle(database)
    with restore() as connection:
        yield connection


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ("ALTER TABLE {0} ADD COLUMN note text", "body"),
        ("ALTER TABLE {0} RENAME COLUMN body TO prose", "prose"),
        ("SELECT embedline.refresh_pipeline('{0}')", "body"),
        ("SELECT embedline.alter_pipeline('{0}', content => 'body || ''!''')", "body"),
    ],
)
def test_a_restored_pipeline_knows_its_columns(restored: psycopg.Connection, change: str, column: str) -> None:
    for table, key in (("m", "id"), ("zz", "b")):
        restored.execute(change.format(table))
        restored.execute(f"INSERT INTO {table} VALUES (7, 7, 'seven')")
        restored.execute(f"UPDATE {table} SET {column} = 'changed' WHERE {key} = 1")
        restored.execute(f"DELETE FROM {table} WHERE {key} = 2")
    settle(restored)
    content = f"{column} || '!'" if "content" in change else column
    assert assert_exact(restored, "m", content=content) == 3
    assert assert_exact(restored, "zz", content=content) == 2
    # The views show what they showed.
    restored.execute("SELECT embedline.refresh_pipeline('m'), embedline.refresh_pipeline('zz')")
    assert scalar(restored, "SELECT array_agg(id ORDER BY id) FROM m_embedding") == [1, 3, 7]
    assert searching(restored, "m", "seven", k=1)[0][0] == "7"


@pytest.fixture
def written(database: psycopg.Connection) -> psycopg.Connection:
    """Forty embedded pages with an index of their words; five wait again."""
    create_pages(database, 40)
    create_pipeline(database, index_method="none", keyword="english")
    settle(database)
    database.execute("UPDATE page SET body = body || ' edited' WHERE id <= 5")
    return database


def run(program: str, *arguments: object) -> None:
    """Run a program of PostgreSQL; fail with what it printed."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{program}: {done.stderr}"


def assert_goes_on(dsn: str) -> None:
    """Assert that a restored database embeds what waited and nothing else."""
    with psycopg.connect(dsn, autocommit=True) as restored:
        assert scalar(restored, "SELECT embedline.embed_pending(1000)") == 5
        restored.execute("INSERT INTO page (id, title, body) VALUES (1000, 'New', 'A page about law')")
        settle(restored)
        assert assert_exact(restored) == 41
        assert restored.execute("SELECT * FROM embedline.verify('page', sample => 3)").fetchall() == []
        assert searching(restored, "page", "law", k=1, mode="hybrid")


@pytest.mark.parametrize(
    ("dump", "restores"),
    [
        (["--format", "custom"], [["--single-transaction"]]),
        (["--format", "directory", "--jobs", "2"], [["--jobs", "2"]]),
        (["--format", "custom"], [["--schema-only"], ["--data-only", "--disable-triggers"]]),
    ],
    ids=["custom", "directory", "schema then data"],
)
def test_a_dump_of_each_form_goes_on(
    written: psycopg.Connection,
    database_dsn: str,
    empty_database_dsn: str,
    tmp_path: Path,
    dump: list[str],
    restores: list[list[str]],
) -> None:
    run("pg_dump", "--dbname", database_dsn, "--file", tmp_path / "dump", *dump)
    for options in restores:
        run("pg_restore", "--dbname", empty_database_dsn, "--exit-on-error", *options, tmp_path / "dump")
    assert_goes_on(empty_database_dsn)


# What the how-to tells to run before data are restored over tables that migrations have filled.
EMPTY_ALL = """
    SELECT 'TRUNCATE ' || string_agg(format('%I.%I', schemaname, tablename), ', ') FROM pg_tables
    WHERE schemaname IN ('embedline', 'embedline_data') OR (schemaname, tablename) = ('public', 'page')
"""


def test_data_go_into_a_schema_that_migrations_made(
    written: psycopg.Connection, database_dsn: str, empty_database_dsn: str, tmp_path: Path
) -> None:
    install(empty_database_dsn)
    with psycopg.connect(empty_database_dsn, autocommit=True) as migrated:
        # A column that came and went, so that the numbers of columns differ.
        migrated.execute(
            "CREATE TABLE page (gone integer, id integer PRIMARY KEY, title text, body text, views integer)"
        )
        migrated.execute("ALTER TABLE page DROP COLUMN gone")
        create_pipeline(migrated, index_method="none", keyword="english")
        migrated.execute(scalar(migrated, EMPTY_ALL))
    run("pg_dump", "--dbname", database_dsn, "--file", tmp_path / "dump", "--format", "custom", "--data-only")
    options = ("--data-only", "--disable-triggers", "--single-transaction", "--exit-on-error")
    run("pg_restore", "--dbname", empty_database_dsn, *options, tmp_path / "dump")
    assert_goes_on(empty_database_dsn)


def test_a_schema_without_its_data_says_so(
    written: psycopg.Connection, database_dsn: str, empty_database_dsn: str, tmp_path: Path
) -> None:
    run("pg_dump", "--dbname", database_dsn, "--file", tmp_path / "dump", "--schema-only")
    run("psql", "--quiet", "--no-psqlrc", "--dbname", empty_database_dsn, "--file", tmp_path / "dump")
    with psycopg.connect(empty_database_dsn, autocommit=True) as restored:
        with pytest.raises(psycopg.Error, match="and their data are not") as refused:
            searching(restored, "page", "law")
        assert "--disable-triggers" in (refused.value.diag.message_hint or "")
        # Capture goes on.
        restored.execute("INSERT INTO page (id, title, body) VALUES (1, 'New', 'A page about law')")
        assert scalar(restored, f"SELECT count(*) FROM {PAGE('inbox')}") == 1
