"""A database that was dumped and restored: pg_dump numbers columns anew where one was dropped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psycopg
import pytest

from embedline.local.bootstrap import local_cluster
from embedline.local.settings import load_settings
from support import assert_exact, create_pipeline, scalar, searching, settle


def _restore(dump_of: str, into: str) -> None:
    programs = local_cluster(load_settings()).bin_dir
    dump = subprocess.run([programs / "pg_dump", dump_of], check=True, capture_output=True, text=True).stdout
    psql = [programs / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", into]
    subprocess.run(psql, input=dump, check=True, capture_output=True, text=True)


@pytest.fixture
def restored(database: psycopg.Connection, database_dsn: str, empty_database_dsn: str) -> Iterator[psycopg.Connection]:
    """A copy of tables of which the first or the second column was dropped; a key of one and one of two columns."""
    database.execute(
        "CREATE TABLE m (old integer, id integer PRIMARY KEY, parent integer, body text);"
        " ALTER TABLE m DROP COLUMN old; INSERT INTO m VALUES (1, 2, 'one'), (2, 1, 'two'), (3, 3, 'three');"
        " CREATE TABLE zz (a integer, x integer, b integer, body text, PRIMARY KEY (a, b));"
        " ALTER TABLE zz DROP COLUMN x; INSERT INTO zz VALUES (1, 1, 'one'), (1, 2, 'two')"
    )
    create_pipeline(database, "m", "m", "body")
    create_pipeline(database, "zz", "zz", "body")
    settle(database)
    _restore(database_dsn, empty_database_dsn)
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
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
