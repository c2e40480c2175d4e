"""Check the server before the revisions, and replay the functions after them.

`alembic upgrade head` does both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

import embedline
from embedline.errors import EmbedlineError

logger = logging.getLogger("embedline")

MINIMUM_POSTGRESQL = 150000
MINIMUM_PGVECTOR = (0, 8, 0)
# In a cluster of another encoding template1 has that, too, and so has its locale. So template0, and a locale that takes
# UTF8.
ENCODING_REMEDY = "CREATE DATABASE mydb ENCODING 'UTF8' LOCALE 'C.UTF-8' TEMPLATE template0;"
# Packages that the server's Python imports sooner or later.
REQUIRED_MODULES = "import embedline, ftfy, markdown_it, numpy, semantic_text_splitter, tokenizers"
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
    # Type vector is named without its schema, because pgvector may be in any.
    run_script(
        connection,
        "SELECT set_config('search_path', 'pg_catalog, ' || quote_ident(n.nspname), true) FROM pg_extension AS e"
        " JOIN pg_namespace AS n ON n.oid = e.extnamespace WHERE e.extname = 'vector'",
    )
    for path in object_files():
        run_script(connection, path.read_text(encoding="utf-8"))
    version = embedline.__version__.replace("'", "")
    run_script(
        connection,
        f"INSERT INTO embedline.setting (name, value) VALUES ('version', '{version}')"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
    )
    run_script(connection, "SELECT embedline._regenerate_pipelines()")


def check_server(connection: Connection) -> None:
    """Raise UnsuitableServer for a missing part, with the way to get it.

    Warns about parts that are only useful.
    """
    number = int(_scalar(connection, "SHOW server_version_num"))
    if number < MINIMUM_POSTGRESQL:
        raise UnsuitableServer(
            f"PostgreSQL {_scalar(connection, 'SHOW server_version')} is too old",
            hint="Embedline needs PostgreSQL 15 to 18.",
        )
    check_role(connection)
    encoding = _scalar(connection, "SHOW server_encoding")
    if encoding != "UTF8":
        raise UnsuitableServer(
            f"the database has encoding {encoding}",
            detail="Texts are repaired, cut and hashed as Unicode; in another encoding not each can be stored.",
            hint=ENCODING_REMEDY,
        )
    _check_extensions(connection, number // 10000)
    _check_package(connection)
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


def _check_extensions(connection: Connection, major: int) -> None:
    if _scalar(connection, "SELECT 1 FROM pg_available_extensions WHERE name = 'plpython3u'") is None:
        raise UnsuitableServer(
            "plpython3u is not available on the server",
            hint=f"On Debian: apt-get install postgresql-plpython3-{major}.",
        )
    installed = _scalar(connection, "SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    version = installed or _scalar(
        connection, "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'"
    )
    if version is None:
        raise UnsuitableServer(
            "pgvector is not available on the server",
            hint=f"On Debian 13 or with PGDG: apt-get install postgresql-{major}-pgvector; else build pgvector 0.8.0 or newer.",
        )
    if tuple(int(part) for part in str(version).split(".")[:3]) < MINIMUM_PGVECTOR:
        hint = "ALTER EXTENSION vector UPDATE;" if installed else "Install pgvector 0.8.0 or newer."
        raise UnsuitableServer(f"pgvector {version} is too old: iterative scans came with 0.8.0", hint=hint)


def _check_package(connection: Connection) -> None:
    """Import the package in the server's interpreter.

    The transaction leaves nothing behind.
    """
    probe = (
        f"DO LANGUAGE plpython3u $python$\nimport sys\ntry:\n    {REQUIRED_MODULES}\nexcept ImportError as error:\n"
        "    plpy.error(f'{error}', detail=f'interpreter {sys.version.split()[0]} of {sys.prefix}; path {sys.path}')\n"
        "GD['embedline.installed'] = embedline.__version__\n"
        f"if embedline.__version__ != '{embedline.__version__}':\n"
        "    plpy.error(f'the server sees embedline {embedline.__version__}', detail=str(embedline.__file__))\n$python$"
    )
    savepoint = connection.begin_nested()
    try:
        run_script(connection, "CREATE EXTENSION IF NOT EXISTS plpython3u")
        run_script(connection, probe)
    except DBAPIError as error:
        diagnostic = getattr(error.orig, "diag", None)
        raise UnsuitableServer(
            f"the server's Python cannot import embedline: {getattr(diagnostic, 'message_primary', error.orig)}",
            detail=getattr(diagnostic, "message_detail", None),
            hint="Install the package for that interpreter, or start the server with PYTHONPATH naming its site-packages.",
        ) from None
    finally:
        savepoint.rollback()
