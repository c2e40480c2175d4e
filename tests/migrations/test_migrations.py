"""The revisions through the real alembic command line: up, down, up, and what a server lacks."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import psycopg
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import conninfo
from pytest_postgresql.executors import NoopExecutor

import programs
from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from support import MODELS, ROOT, assert_exact, create_pages, create_pipeline, drain, scalar, settle, uri

_CATALOGUE = {
    "pg_class": "SELECT n.nspname || '.' || relname || relkind::text FROM pg_class AS c"
    " JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE n.nspname !~ '^pg_(toast|temp)' AND relpersistence = 'p'",
    "pg_proc": "SELECT p.oid::regprocedure::text FROM pg_proc AS p",
    "pg_type": "SELECT n.nspname || '.' || typname FROM pg_type AS t JOIN pg_namespace AS n ON n.oid = t.typnamespace"
    " WHERE n.nspname !~ '^pg_(toast|temp)'",
    "pg_namespace": "SELECT nspname::text FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp'",
    "pg_trigger": "SELECT tgname::text FROM pg_trigger",
    "pg_extension": "SELECT extname::text FROM pg_extension",
    "pg_language": "SELECT lanname::text FROM pg_language",
    "pg_description": "SELECT coalesce(obj_description(objoid), '') FROM pg_description WHERE objoid > 16383",
    "pg_default_acl": "SELECT defaclrole::regrole::text FROM pg_default_acl",
}
# Everything that two installations must have in common, as text.
_INSTALLED = """
    SELECT 'function ' || p.oid::regprocedure || E'\n' || pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '')
    FROM pg_proc AS p WHERE p.pronamespace IN ('embedline'::regnamespace, 'embedline_data'::regnamespace)
    UNION ALL
    SELECT 'column ' || c.oid::regclass || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' '
        || a.attnotnull || ' ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '') || coalesce(col_description(c.oid, a.attnum), '')
    FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum WHERE c.relnamespace = 'embedline'::regnamespace
    UNION ALL
    SELECT 'relation ' || c.oid::regclass || c.relkind::text || coalesce(c.relacl::text, '') || coalesce(c.reloptions::text, '')
        || coalesce(obj_description(c.oid, 'pg_class'), '') || CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) ELSE '' END
    FROM pg_class AS c WHERE c.relnamespace = 'embedline'::regnamespace
    UNION ALL
    SELECT 'constraint ' || k.conrelid::regclass || k.conname || pg_get_constraintdef(k.oid) FROM pg_constraint AS k
    WHERE k.connamespace = 'embedline'::regnamespace
    UNION ALL
    SELECT 'index ' || pg_get_indexdef(i.indexrelid) FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE c.relnamespace = 'embedline'::regnamespace
"""


def _alembic(dsn: str | None, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = {k: v for k, v in os.environ.items() if k != "EMBEDLINE_DSN"}
    if dsn is not None:
        environment = {**environment, "EMBEDLINE_DSN": dsn}
    done = programs.run("alembic", *arguments, cwd=ROOT, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


def _catalogue(dsn: str) -> dict[str, list[str]]:
    with psycopg.connect(dsn) as connection:
        return {name: sorted(row[0] for row in connection.execute(query)) for name, query in _CATALOGUE.items()}


def _installed(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as connection:
        return sorted(row[0] for row in connection.execute(_INSTALLED))


def test_there_is_a_single_head() -> None:
    assert len(ScriptDirectory.from_config(Config(str(ROOT / "alembic.ini"))).get_heads()) == 1


def test_upgrade_downgrade_upgrade(empty_database_dsn: str) -> None:
    dsn = empty_database_dsn
    with psycopg.connect(dsn, autocommit=True) as connection:
        create_pages(connection, 5)
    before = _catalogue(dsn)
    _alembic(dsn, "upgrade", "head")
    fresh = _installed(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        _register(connection)
        create_pipeline(connection)
        create_pipeline(connection, name="title", content="title", capture="row", index_method="none")
        settle(connection)
        connection.execute(scalar(connection, "SELECT embedline.index_statement('page')"))
        connection.execute("UPDATE page SET body = 'queued'")
    _alembic(dsn, "downgrade", "base")
    after = _catalogue(dsn)
    for name, objects in before.items():
        assert after[name] == objects, f"the downgrade left a trace in {name}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE page SET body = 'still works'")
        connection.execute("INSERT INTO page (id) VALUES (100)")
        connection.execute("DELETE FROM page WHERE id = 1")
        connection.execute("TRUNCATE page")
    _alembic(dsn, "upgrade", "head")
    assert _installed(dsn) == fresh
    with psycopg.connect(dsn, autocommit=True) as connection:
        _register(connection)
        connection.execute("INSERT INTO page (id, title, body) VALUES (1, 'After', 'all of it')")
        create_pipeline(connection)
        settle(connection)
        assert assert_exact(connection) == 1


def _register(connection: psycopg.Connection) -> None:
    connection.execute(
        "SELECT embedline.create_model('static-256', 'sentence-transformers', %s)", (str(MODELS / "static-256"),)
    )


def test_a_fresh_installation_equals_an_upgraded_one(empty_database_dsn: str, database_dsn: str) -> None:
    """Step by step through every revision, against one run to head (the template)."""
    script = ScriptDirectory.from_config(Config(str(ROOT / "alembic.ini")))
    for revision in reversed(list(script.walk_revisions())):
        _alembic(empty_database_dsn, "upgrade", revision.revision)
    assert _installed(empty_database_dsn) == _installed(database_dsn)


def test_upgrading_twice_changes_nothing_and_keeps_the_pipelines(
    database_dsn: str, database: psycopg.Connection
) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    before = _installed(database_dsn)
    _alembic(database_dsn, "upgrade", "head")
    assert _installed(database_dsn) == before
    database.execute("UPDATE page SET body = 'changed' WHERE id = 1")
    assert drain(database) == 1
    assert_exact(database)


def test_deleted_and_hidden_keys_go_down_and_up_with_their_tables(empty_database_dsn: str) -> None:
    _alembic(empty_database_dsn, "upgrade", "head")
    tables = """
        SELECT c.relname || ' ' || coalesce(a.attname || format_type(a.atttypid, a.atttypmod) || a.attnotnull, '')
            || c.relreplident::text || coalesce(array_to_string(c.reloptions, ' '), '') || c.relacl::text
            || obj_description(c.oid, 'pg_class')
            || coalesce(col_description(c.oid, a.attnum), '')
        FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
        WHERE c.relname ~ '^page_(deleted|hidden|lent)$'
        UNION ALL SELECT indexdef FROM pg_indexes WHERE tablename ~ '^page_(hidden|lent)$' ORDER BY 1
    """
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        _register(connection)
        create_pages(connection, 5)
        create_pipeline(connection)
        settle(connection)
        fresh = connection.execute(tables).fetchall()
        connection.execute("DELETE FROM page WHERE id <= 2")
        connection.execute("INSERT INTO page (id, title, body) VALUES (2, 'another', 'row')")
        assert scalar(connection, "SELECT count(*) FROM page_embedding") == 3
    _alembic(empty_database_dsn, "downgrade", "0011")
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        assert scalar(connection, "SELECT count(*) FROM page_embedding") == 3
    _alembic(empty_database_dsn, "upgrade", "head")
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        assert connection.execute(tables).fetchall() == fresh
        settle(connection)
        assert assert_exact(connection) == 4
        connection.execute("DELETE FROM page WHERE id = 3")
        connection.execute("INSERT INTO page (id, title, body) VALUES (3, 'another', 'row')")
        assert scalar(connection, "SELECT count(*) FROM page_embedding") == 3


def test_an_extension_that_was_there_before_stays(empty_database_dsn: str) -> None:
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        connection.execute("CREATE TABLE mine (embedding vector(3))")
    _alembic(empty_database_dsn, "upgrade", "head")
    _alembic(empty_database_dsn, "downgrade", "base")
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO mine VALUES ('[1,2,3]')")


def test_an_extension_that_the_user_came_to_need_stays(empty_database_dsn: str) -> None:
    _alembic(empty_database_dsn, "upgrade", "head")
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE mine (embedding vector(3))")
    _alembic(empty_database_dsn, "downgrade", "base")
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute("INSERT INTO mine VALUES ('[1,2,3]')")


def test_pgvector_in_another_schema_is_used_where_it_is(empty_database_dsn: str) -> None:
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA extensions")
        connection.execute("CREATE EXTENSION vector SCHEMA extensions")
    done = _alembic(empty_database_dsn, "upgrade", "head", check=False)
    if done.returncode != 0:  # refusing is an answer, if it says what to do
        assert "Traceback" not in done.stderr
        assert "vector" in done.stderr
        assert "extensions" in done.stderr


def test_the_revisions_render_as_sql() -> None:
    rendered = _alembic(None, "upgrade", "head", "--sql").stdout
    assert "CREATE SCHEMA embedline_data" in rendered
    assert "INSERT INTO embedline.alembic_version" in rendered
    assert "\\:" not in rendered
    assert "%%" not in rendered


def test_rendered_sql_installs_the_same_catalogue(empty_database_dsn: str, database_dsn: str) -> None:
    rendered = _alembic(None, "upgrade", "head", "--sql").stdout
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        connection.execute(rendered)
    wanted = [line for line in _installed(database_dsn) if line.startswith(("column embedline.model", "constraint"))]
    assert set(wanted) <= set(_installed(empty_database_dsn))


def test_without_a_dsn_the_command_says_what_to_set() -> None:
    done = _alembic(None, "upgrade", "head", check=False)
    assert done.returncode != 0
    assert "EMBEDLINE_DSN" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_role_that_is_no_superuser_is_told_why(
    empty_database_dsn: str, make_role: Callable[..., str], role_passwords: dict[str, str]
) -> None:
    role = make_role()
    parts = conninfo.conninfo_to_dict(empty_database_dsn)
    dsn = uri(str(parts["host"]), str(parts["port"]), role, role_passwords[role], str(parts["dbname"]))
    done = _alembic(dsn, "upgrade", "head", check=False)
    assert done.returncode != 0
    assert "is not a superuser" in done.stderr
    assert "HINT" in done.stderr
    assert "Traceback" not in done.stderr
    assert "alembic_version" not in str(_catalogue(empty_database_dsn)["pg_class"])


def test_a_database_in_another_encoding_is_refused(
    maintenance: psycopg.Connection, template_server: NoopExecutor
) -> None:
    name = f"embedline_latin_{secrets.token_hex(4)}"
    maintenance.execute(
        f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0".encode()
    )
    try:
        server = template_server
        dsn = uri(server.host, server.port, server.user, server.password, name)
        done = _alembic(dsn, "upgrade", "head", check=False)
        assert done.returncode != 0
        assert "the database has encoding LATIN1" in done.stderr
        assert "HINT" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        maintenance.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_a_server_that_does_not_see_the_package_is_told_which_interpreter_it_runs(
    own_cluster: Cluster,
) -> None:
    own_cluster.stop()
    blind = Cluster(own_cluster.data_dir, own_cluster.port, own_cluster.bin_dir, python_path="", cron_database=None)
    blind.start()
    try:
        with psycopg.connect(blind.dsn("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE blind")
        done = _alembic(blind.dsn("blind"), "upgrade", "head", check=False)
        extensions = _catalogue(blind.dsn("blind"))["pg_extension"]
    finally:
        blind.stop()
        own_cluster.start()
    assert done.returncode != 0
    assert "cannot import embedline" in done.stderr
    assert "interpreter 3." in done.stderr
    assert "PYTHONPATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert "plpython3u" not in extensions


def test_the_last_database_takes_the_roles_with_it(own_cluster: Cluster) -> None:
    _alembic(own_cluster.dsn(), "downgrade", "base")
    with psycopg.connect(own_cluster.dsn()) as connection:
        assert scalar(connection, "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'embedline%'") == 0


def test_a_missing_pg_cron_is_a_notice_and_no_error(empty_database_dsn: str) -> None:
    done = _alembic(empty_database_dsn, "upgrade", "head")
    assert "pg_cron" in done.stderr
    assert "run_worker" in done.stderr


def test_the_root_has_no_package_named_alembic() -> None:
    assert not (Path(ROOT) / "alembic" / "__init__.py").exists()


def test_an_upgrade_gives_the_tables_of_existing_pipelines_a_replica_identity(
    database: psycopg.Connection, database_dsn: str
) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    identity = f"SELECT relreplident::text FROM pg_class WHERE oid = '{PAGE('inbox')}'::regclass"
    _alembic(database_dsn, "downgrade", "0011")
    assert scalar(database, identity) == "d"
    _alembic(database_dsn, "upgrade", "head")
    assert scalar(database, identity) == "f"
    database.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    with psycopg.connect(database_dsn, autocommit=True) as session:
        settle(session)
    assert scalar(database, "SELECT count(*) FROM page_embedding") == 5


def test_an_upgrade_finds_the_input_columns_of_existing_pipelines(
    database: psycopg.Connection, database_dsn: str
) -> None:
    database.execute(
        'CREATE TABLE odd (id int PRIMARY KEY, gone text, "a ON b" text, "Q""x(," text, plain text, shown boolean, owner text)'
    )
    database.execute("ALTER TABLE odd DROP COLUMN gone")
    database.execute(
        "SELECT embedline.create_pipeline('odd', 'odd', $$\"a ON b\" || plain || \"Q\"\"x(,\"$$, 'static-256', filter => 'shown',"
        " document_prefix => '\"Q\"\"x(,\"', tenant => 'owner')"
    )
    database.execute('ALTER TABLE odd RENAME COLUMN plain TO "source_row.plain"')
    inputs = "SELECT input_columns FROM embedline.pipeline WHERE name = 'odd'"
    created = scalar(database, inputs)
    assert created == {"content": [3, 4, 5], "filter": [6], "prefix": [4], "tenant_value": [7]}
    _alembic(database_dsn, "downgrade", "0017")
    _alembic(database_dsn, "upgrade", "head")
    assert scalar(database, inputs) == created
