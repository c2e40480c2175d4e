"""List the checks of `embedline doctor`; anyone can add one.

A check takes a Server and yields findings, none if it does not apply. `commands` are run as they stand, so they are
never broken into lines.
"""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

import embedline
from embedline.client.doctor.packages import version_number
from embedline.client.doctor.server import Finding, Server, Verdict

# In a cluster of another encoding template1 has that, too, and so has its locale. So template0, and a locale that takes
# UTF8.
_ENCODING_REMEDY = "CREATE DATABASE mydb ENCODING 'UTF8' LOCALE 'C.UTF-8' TEMPLATE template0;"
# Bytes of shared memory that the smallest parallel index build allocates at once. With less it is built serially.
_SMALLEST_PARALLEL_BUILD = 72 * 1024**2
_SCHEDULED_WORKERS = """
    SELECT count(*) FROM cron.job
    WHERE database = current_database() AND active AND jobname ~ '^embedline worker [0-9]+$'
"""


def postgresql(server: Server) -> Iterator[Finding]:
    """Check that Embedline supports the server's version."""
    number = server.connection.info.server_version
    found = f"{number // 10000}.{number % 10000}"
    if number < 150000:
        yield Finding("PostgreSQL", "error", found, "Embedline needs PostgreSQL 15 to 18.")
    elif number >= 190000:
        yield Finding("PostgreSQL", "warning", found, "Embedline is tested with PostgreSQL 15 to 18.")
    else:
        yield Finding("PostgreSQL", "ok", found)


def encoding(server: Server) -> Iterator[Finding]:
    """Check that the database is in UTF8."""
    found = str(server.scalar("SHOW server_encoding"))
    if found == "UTF8":
        yield Finding("encoding", "ok", found)
        return
    yield Finding(
        "encoding",
        "error",
        f"the database has encoding {found}",
        "Embedline needs a database in UTF8, and a database keeps its encoding: make a new one, and move your data there.",
        (_ENCODING_REMEDY,),
    )


def role(server: Server) -> Iterator[Finding]:
    """Check that the role may read everything."""
    if not server.is_superuser:
        name = server.scalar("SELECT current_user")
        advice = "The server's Python, its shared memory and the jobs' runs are not looked at: connect as a superuser."
        yield Finding("role", "note", f"{name} is not a superuser", advice)


def schema(server: Server) -> Iterator[Finding]:
    """Check that Embedline is installed in this database, in this package's version."""
    if not server.is_installed:
        yield Finding("schema embedline", "note", "not installed in this database", "", ("embedline upgrade",))
        return
    version = str(server.scalar("SELECT value FROM embedline.setting WHERE name = 'version'"))
    if version == embedline.__version__:
        yield Finding("schema embedline", "ok", version)
    else:
        advice = f"This package is {embedline.__version__}."
        yield Finding("schema embedline", "error", version, advice, ("embedline upgrade",))


def pg_cron(server: Server) -> Iterator[Finding]:
    """Check that pg_cron is there, in a mode in which a resident job stops no other."""
    version = server.installed("pg_cron")
    # A parameter that exists only if the library is loaded.
    mode = server.scalar("SELECT current_setting('cron.use_background_workers', true)")
    if version is None:
        yield _no_pg_cron(server, is_loaded=mode is not None)
        return
    found = f"{version}, {'background workers' if mode == 'on' else 'libpq mode'}"
    if mode == "on" and version_number(version) < (1, 5):
        advice = "Before 1.5 a resident job stops all others in this mode. Restart the server after:"
        yield Finding("pg_cron", "error", found, advice, ("ALTER SYSTEM SET cron.use_background_workers = off;",))
    else:
        yield Finding("pg_cron", "ok", found)


def _no_pg_cron(server: Server, *, is_loaded: bool) -> Finding:
    otherwise = "Without it let any scheduler run `embedline worker`, and after a backfill `embedline build-index`."
    if server.offered("pg_cron") is None:
        package_name = f"apt-get install postgresql-{server.major}-cron"
        return Finding("pg_cron", "note", "not on the server", f"Optional. {otherwise}", (package_name,))
    if not is_loaded:
        advice = f"Optional. In postgresql.conf, before a restart and CREATE EXTENSION pg_cron. {otherwise}"
        settings = ("shared_preload_libraries = 'pg_cron'", f"cron.database_name = '{server.database}'")
        return Finding("pg_cron", "note", "not loaded", advice, settings)
    home = str(server.scalar("SELECT current_setting('cron.database_name', true)"))
    if home == server.database:
        advice = "The server runs it for this database."
        return Finding("pg_cron", "warning", "not in this database", advice, ("CREATE EXTENSION pg_cron;",))
    job = sql.SQL("SELECT cron.schedule_in_database('embedline worker 1', '* * * * *', {}, {});").format(
        "CALL embedline.run_worker(slot => 1)", server.database
    )
    return Finding(
        "pg_cron",
        "note",
        f'in database "{home}"',
        "Schedule the workers from there:",
        (job.as_string(server.connection),),
    )


def workers(server: Server) -> Iterator[Finding]:
    """Check that a worker embeds new rows."""
    if server.scalar("SELECT to_regclass('embedline.worker') IS NOT NULL") is not True:
        return
    alive = int(server.scalar("SELECT embedline._workers_alive()"))
    if alive:
        yield Finding("workers", "ok", f"{alive} alive")
    elif server.installed("pg_cron") is None:
        yield Finding("workers", "note", "none alive", "", ("embedline worker",))
    elif scheduled := int(server.scalar(_SCHEDULED_WORKERS)):
        advice = "pg_cron starts them at the turn of the minute. Where it does not, the server's log has the reason."
        yield Finding("workers", "warning", f"{scheduled} scheduled, none alive", advice)
    else:
        yield Finding("workers", "note", "none alive", "", ("SELECT embedline.schedule_workers(1);",))


def shared_memory(server: Server) -> Iterator[Finding]:
    """Check that several processes can build an index."""
    free = server.inside.get("shared_memory")
    if free is None or server.scalar("SHOW dynamic_shared_memory_type") != "posix":
        return
    found = f"/dev/shm has {free // 1024**2:,} MB free"  # noqa: S108  the kernel's, not a file of ours
    if free < _SMALLEST_PARALLEL_BUILD and int(server.scalar("SHOW max_parallel_maintenance_workers")) > 0:
        advice = "Indexes are built by one process: a parallel build takes 72 MB and more. In containers: --shm-size."
        yield Finding("shared memory", "note", found, advice)
    else:
        yield Finding("shared memory", "ok", found)


# Findings of the server that checks here show, too, with more of the surroundings.
_SHOWN_HERE = ("no_worker", "old_pgvector", "version_skew", "workers_missing")
_VERDICTS: dict[str, Verdict] = {"critical": "error", "warning": "warning", "note": "note", "ok": "ok"}
_INSIDE = "SELECT severity, finding, subject, message, remedy FROM embedline.doctor() WHERE finding <> ALL (%s)"


def inside(server: Server) -> Iterator[Finding]:
    """Take over what the server finds about itself, its jobs, indexes and vectors."""
    if server.scalar("SELECT to_regprocedure('embedline.doctor()') IS NOT NULL") is not True:
        return
    for severity, name, subject, message, remedy in server.connection.execute(_INSIDE, [list(_SHOWN_HERE)]).fetchall():
        check = str(name).replace("_", " ") + ("" if subject == "server" else f": {subject}")
        yield Finding(check, _VERDICTS[severity], str(message), "", tuple((remedy or "").splitlines()))
