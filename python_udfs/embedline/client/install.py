"""Check the server before the revisions, and replay the functions after them.

`alembic upgrade head` does both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Connection

import embedline
from embedline.client.doctor.examine import REQUIREMENTS, run_checks
from embedline.client.doctor.server import Server
from embedline.errors import EmbedlineError

logger = logging.getLogger("embedline")

# Folders in the order of their replay, because a view calls functions, and grants name both.
OBJECT_FOLDERS = ("functions", "procedures", "triggers", "views", "security")


# True if pg_cron is here, or the first revision will create it because the server runs it for this database.
_CRON_WILL_BE_HERE = """
    SELECT to_regclass('cron.job') IS NOT NULL
        OR coalesce(current_setting('cron.database_name', true) = current_database(), false)
        AND EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_cron')
"""


class UnsuitableServer(EmbedlineError):
    """The server lacks something that Embedline needs."""

    sqlstate = "EL030"


def sql_root() -> Path:
    """Return the folder of SQL objects.

    In a wheel it is beside the package, in a checkout at the top.
    """
    packaged = Path(str(resources.files("embedline"))) / "_sql"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[3] / "sql"


# A superuser runs the revisions. An operator or a function of another role's, in a schema of the superuser's search_path, might
# fit its operands better than PostgreSQL's own.
OWN_NAMES = "SET LOCAL search_path = pg_catalog, pg_temp"
# CREATE SCHEMA IF NOT EXISTS and CREATE OR REPLACE leave what is there to its owner, who could change it later.
NO_OWNERS_BESIDES = """
DO $do$
DECLARE
    place text;
    holder name;
BEGIN
    SELECT o.place, r.rolname INTO place, holder
    FROM (
        SELECT 'schema ' || n.nspname AS place, n.nspowner AS owner FROM pg_namespace AS n
        WHERE n.nspname IN ('embedline', 'embedline_data', 'embedline_expression', 'embedline_search')
        UNION ALL
        SELECT 'function ' || p.oid::regprocedure::text, p.proowner FROM pg_proc AS p
        WHERE p.oid = to_regprocedure('public.embed_pending(integer, text)')
            OR p.pronamespace = to_regnamespace('embedline')
    ) AS o INNER JOIN pg_roles AS r ON r.oid = o.owner
    WHERE NOT r.rolsuper ORDER BY o.place LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'embedline: % belongs to role "%", who is no superuser', place, holder
            USING HINT = 'If Embedline made it, give it to a superuser with ALTER ... OWNER TO; otherwise drop or rename it.';
    END IF;
END
$do$"""
# After a deadlock. An application locks a source first, then what its triggers and views read. So this order waits for
# applications, which then wait for the upgrade, and none for each other.
LOCK_SOURCES = """
DO $do$
DECLARE
    source text;
BEGIN
    FOR source IN
        SELECT c.oid::regclass::text FROM embedline.pipeline AS p INNER JOIN pg_class AS c ON c.oid = p.source::oid
        ORDER BY c.oid
    LOOP
        EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', source);
    END LOOP;
END
$do$"""
_WITH_VECTOR = (
    "SELECT pg_catalog.set_config('search_path', 'pg_catalog, ' || pg_catalog.quote_ident(n.nspname) || ', pg_temp', true)"
    " FROM pg_catalog.pg_extension AS e JOIN pg_catalog.pg_namespace AS n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
)


def object_files() -> Iterator[Path]:
    """Yield the files of all replayed objects in the order in which they are run."""
    for folder in OBJECT_FOLDERS:
        yield from sorted((sql_root() / folder).glob("*.sql"))


def run_script(connection: Connection, sql: str) -> None:
    """Run SQL text as it stands; ":" and "%" have no meaning for the driver."""
    connection.exec_driver_sql(sql, execution_options={"no_parameters": True})


def replay(connection: Connection) -> None:
    """Replace every function, procedure, view and grant by this package's text."""
    # Bodies may name objects that a later file creates.
    run_script(connection, "SET LOCAL check_function_bodies = off")
    for path in object_files():
        # Signatures name type vector without its schema, because pgvector may be in any. Bodies have a path of their own.
        run_script(connection, _WITH_VECTOR if path.parent.name == "functions" else OWN_NAMES)
        run_script(connection, path.read_text(encoding="utf-8"))
    run_script(connection, OWN_NAMES)
    version = embedline.__version__.replace("'", "")
    run_script(
        connection,
        f"INSERT INTO embedline.setting (name, value) VALUES ('version', '{version}')"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )
    run_script(connection, "SELECT embedline._regenerate_pipelines()")


def check_server(connection: Connection) -> None:
    """Raise UnsuitableServer for the first missing part, with the way to get it.

    The checks are those of `embedline doctor`. Warns about a part that is only useful.
    """
    check_role(connection)
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    for finding in run_checks(Server(driver), REQUIREMENTS):
        if finding.verdict == "error":
            hint = " ".join(part for part in (finding.advice, *finding.commands) if part)
            raise UnsuitableServer(f"{finding.check}: {finding.found}", hint=hint or None)
    if _scalar(connection, _CRON_WILL_BE_HERE) is not True:
        logger.warning(
            "NOTICE: pg_cron is not in this database: embedline.schedule_workers and the automatic index build need it. "
            "Without it, let any scheduler CALL embedline.run_worker(), and run what embedline.index_statement returns."
        )


def check_role(connection: Connection) -> None:
    """Raise UnsuitableServer unless the role is a superuser."""
    if _scalar(connection, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is not True:
        raise UnsuitableServer(
            f'role "{_scalar(connection, "SELECT current_user")}" is not a superuser',
            detail="plpython3u is an untrusted language: only a superuser may create functions in it.",
            hint="Connect as a superuser of a self-hosted server. Managed services do not offer plpython3u.",
        )


def _scalar(connection: Connection, sql: str) -> Any:
    return connection.exec_driver_sql(sql).scalar()
