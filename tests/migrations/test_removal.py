"""`embedline downgrade base`: from any state it removes everything, or refuses in one sentence with the statement to run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable

import psycopg
import pytest

import programs
from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from support import ROOT, create_pages, create_pipeline, scalar, settle
from upgrading import add_version, cut_over, settle_versions

# What an installation leaves that belongs to it alone; extensions were there before, in the tests' template.
_TRACES = """
    SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname LIKE 'embedline%'
    UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'event trigger ' || evtname FROM pg_event_trigger WHERE evtname LIKE 'embedline%'
    UNION ALL SELECT 'view ' || c.oid::regclass FROM pg_class AS c WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'publication ' || pubname FROM pg_publication
    UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE proname = 'embed_pending'
"""
Prepare = Callable[[psycopg.Connection], None]


def _downgrade(dsn: str, revision: str = "base") -> subprocess.CompletedProcess[str]:
    return programs.run("embedline", "downgrade", revision, cwd="/", env={**os.environ, "EMBEDLINE_DSN": dsn})


def _assert_gone(dsn: str) -> None:
    done = _downgrade(dsn)
    assert done.returncode == 0, done.stderr
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert connection.execute(_TRACES).fetchall() == []
        connection.execute("INSERT INTO page (id, title, body) VALUES (-1, 'still', 'a table')")
        assert scalar(connection, "SELECT count(*) FROM page WHERE id = -1") == 1


def _assert_refused(dsn: str, *said: str, revision: str = "base") -> str:
    """Assert that the downgrade is refused as a person can read it; return what it said."""
    done = _downgrade(dsn, revision)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert "sqlalche.me" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr
    assert "HINT" in done.stderr
    for words in said:
        assert words in done.stderr
    return done.stderr


def _cut_over(connection: psycopg.Connection, model: str = "static-256", **options: object) -> None:
    add_version(connection, model, **options)
    settle_versions(connection)
    connection.execute(scalar(connection, "SELECT embedline.index_statement('page', 2)"))
    cut_over(connection, 2)


def _another_chunking_alone(connection: psycopg.Connection) -> None:
    _cut_over(connection, chunking="fixed", chunk_tokens=40)
    connection.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")


def _another_model_alone(connection: psycopg.Connection) -> None:
    _cut_over(connection, "minilm")
    connection.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")


def _cut_over_and_back(connection: psycopg.Connection) -> None:
    _cut_over(connection, column_type="halfvec")
    connection.execute("SELECT embedline.rollback('page')")


def _in_the_middle_of_an_upgrade(connection: psycopg.Connection) -> None:
    add_version(connection, "minilm")
    connection.execute("UPDATE page SET body = body || ' edited'")


def _all_that_can_be_set(connection: psycopg.Connection) -> None:
    connection.execute("SELECT embedline.alter_pipeline('page', tenant => 'title')")
    settle(connection)
    add_version(connection, "static-256", column_type="halfvec")
    settle_versions(connection)
    for statement in (
        "SELECT embedline.set_traffic('page', 2, share => 0.5, shadow_share => 0.5)",
        "SELECT embedline.set_tenant_version('page', 'Title 1', 2)",
        "SELECT embedline.add_precision_index('page', 1, 'binary')",
        "SELECT embedline.set_price('static-256', 0.02)",
        "SELECT embedline.set_budget('month', model => 'static-256', money => 50)",
        "SELECT embedline.set_budget('day', pipeline => 'page', tokens => 5000000)",
        "SELECT embedline.set_rate_limit('static-256', requests_per_minute => 3000)",
        "SELECT embedline.configure_backfill('page', 2, 'newest_first', 5)",
        "SELECT * FROM embedline.verify('page')",
        "SELECT embedline.publication('page', with_source => true)",
        "SELECT embedline.pause_pipeline('page')",
        "INSERT INTO page (id, title, body) VALUES (1000, 'empty', U&'\\200B')",
    ):
        connection.execute(statement.encode())


def _sources_of_other_kinds(connection: psycopg.Connection) -> None:
    for statement in (
        'CREATE SCHEMA "My Schema"',
        'CREATE TABLE "My Schema"."Order" ("Key, 1" text, b uuid, "Te xt" text, PRIMARY KEY ("Key, 1", b))',
        "CREATE TABLE parted (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)",
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)",
        "INSERT INTO parted VALUES (1, 'a leaf')",
    ):
        connection.execute(statement.encode())
    create_pipeline(connection, name="odd", source='"My Schema"."Order"', content='"Te xt"')
    create_pipeline(connection, name="parted", source="parted", content="body")
    connection.execute("ALTER TABLE page RENAME COLUMN body TO text; ALTER TABLE page RENAME TO renamed")
    connection.execute('ALTER TABLE parted SET SCHEMA "My Schema"')
    connection.execute("ALTER TABLE renamed RENAME TO page; ALTER TABLE page RENAME COLUMN text TO body")


def _a_view_that_was_dropped(connection: psycopg.Connection) -> None:
    connection.execute("DROP VIEW page_embedding")


def _a_source_that_was_dropped(connection: psycopg.Connection) -> None:
    connection.execute("DROP TABLE page CASCADE")
    create_pages(connection, 1)


def _keys_too_long_for_an_earlier_release(connection: psycopg.Connection) -> None:
    connection.execute(
        "INSERT INTO embedline.dead_letter (pipeline_id, key, stage, error_code, message, attempts)"
        " SELECT pipeline_id, jsonb_build_object('id', (SELECT string_agg(md5(n::text), '') FROM generate_series(1, 300) AS n)),"
        " 'read', 'EL002', 'too long', 1 FROM embedline.pipeline"
    )


@pytest.mark.parametrize(
    "prepare",
    [
        _another_chunking_alone,
        _another_model_alone,
        _cut_over_and_back,
        _in_the_middle_of_an_upgrade,
        _all_that_can_be_set,
        _sources_of_other_kinds,
        _a_view_that_was_dropped,
        _a_source_that_was_dropped,
        _keys_too_long_for_an_earlier_release,
    ],
)
def test_base_removes_everything(database: psycopg.Connection, database_dsn: str, prepare: Prepare) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    prepare(database)
    _assert_gone(database_dsn)


def test_base_is_reached_by_steps(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    for revision in ("0008", "0004"):
        done = _downgrade(database_dsn, revision)
        assert done.returncode == 0, done.stderr
    _assert_gone(database_dsn)


def test_base_is_reached_by_a_relative_revision(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    _another_chunking_alone(database)
    assert _downgrade(database_dsn, "0006").returncode == 0
    assert _downgrade(database_dsn, "-6").returncode == 0
    assert database.execute(_TRACES).fetchall() == []


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW mine AS SELECT chunk FROM page_embedding",
        "CREATE MATERIALIZED VIEW mine AS SELECT pipeline FROM embedline.status",
        f"CREATE FUNCTION mine() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM {PAGE('chunk')}; END",
        "CREATE TABLE mine (pipeline_id bigint REFERENCES embedline.pipeline)",
    ],
)
def test_what_depends_on_ours_is_named_and_kept(
    database: psycopg.Connection, database_dsn: str, statement: str
) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    database.execute(statement.encode())
    said = _assert_refused(database_dsn, "mine")
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 1
    # The HINT is the statement to run.
    command = re.search(r"HINT: (.*;)", said)
    assert command is not None, said
    database.execute(command.group(1).encode())
    _assert_gone(database_dsn)


def test_a_table_in_use_is_named(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    with psycopg.connect(database_dsn) as reader:
        reader.execute("SELECT * FROM page")
        _assert_refused(database_dsn, "pg_stat_activity")
    assert scalar(database, "SELECT count(*) FROM embedline.pipeline") == 1
    _assert_gone(database_dsn)


def test_an_earlier_release_is_refused_in_one_sentence(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    add_version(database, "minilm")
    _assert_refused(database_dsn, 'pipeline "page" has versions', revision="0005")
    environment = {**os.environ, "EMBEDLINE_DSN": database_dsn}
    done = programs.run("alembic", "downgrade", "0005", cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("HINT: ")


def test_the_rendered_script_removes_everything(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    _another_chunking_alone(database)
    rendered = programs.run("alembic", "downgrade", "head:base", "--sql", cwd=ROOT)
    assert rendered.returncode == 0, rendered.stderr
    database.execute(rendered.stdout.encode())
    assert database.execute(_TRACES).fetchall() == []


def test_a_server_without_the_package_is_cleaned_all_the_same(own_cluster: Cluster) -> None:
    """Nothing of the removal runs in the server's Python: the package may be gone, or broken."""
    dsn = own_cluster.dsn()
    with psycopg.connect(dsn, autocommit=True) as connection:
        create_pages(connection, 5)
        create_pipeline(connection)
        settle(connection)
    own_cluster.stop()
    blind = Cluster(own_cluster.data_dir, own_cluster.port, own_cluster.bin_dir, python_path="", cron_database=None)
    blind.start()
    try:
        _assert_gone(dsn)
    finally:
        blind.stop()
        own_cluster.start()
