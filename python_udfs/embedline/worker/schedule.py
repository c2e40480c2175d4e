"""pg_cron jobs: resident workers, the nightly run, index builds.

Workers are started at boot, and each minute if one has ended.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedline.core.sql_text import quote_literal
from embedline.errors import InvalidParameter
from embedline.postgres import cron
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

_MAX_WORKERS = 64
# A resident worker ends after this long and pg_cron starts another: memory and plans do not grow old.
_WORKER_SECONDS = 1200
_SCHEDULES = ("@reboot", "* * * * *")
_NIGHTLY_JOB = "embedline nightly"
_NIGHTLY_AT = "03:30"
# The first of pg_hba.conf's lines by which the role comes in over TCP from this very machine: what pg_cron meets at "localhost".
_HBA_METHOD = """
    SELECT h.auth_method FROM pg_hba_file_rules AS h
    WHERE h.error IS NULL AND h.type IN ('host', 'hostssl', 'hostnossl')
        AND h.address IN ('127.0.0.1', '::1', '0.0.0.0', '::', 'all', 'localhost', 'samehost', 'samenet', '127.0.0.0')
        AND h.database && ARRAY['all', current_database()::text] AND h.user_name && ARRAY['all', current_user::text]
    ORDER BY h.line_number LIMIT 1
"""
_PASSWORD_METHODS = ("scram-sha-256", "md5", "password")
# The last run of each job that has ended, or goes on, and whether any of ours was let in after it. "server restarted" is what
# pg_cron writes of runs that a restart ended. A run that could not connect has no time: its number tells what came later. The
# jobs "at start" are left out: they run once in the server's life, for the same causes as those of each minute.
_LAST_RUNS = """
    WITH ours AS (
        SELECT j.jobid, j.jobname, j.nodename, j.nodeport, j.schedule FROM cron.job AS j
        WHERE j.database = current_database() AND starts_with(j.jobname, 'embedline ')
    )
    SELECT o.jobname AS job, o.nodename AS host, o.nodeport AS port,
        d.status, d.return_message AS message,
        EXISTS (
            SELECT FROM cron.job_run_details AS r JOIN ours USING (jobid)
            WHERE r.runid > d.runid AND r.status IN ('running', 'succeeded')
        ) AS is_past
    FROM ours AS o
    LEFT JOIN LATERAL (
        SELECT r.runid, r.status, r.return_message FROM cron.job_run_details AS r
        WHERE r.jobid = o.jobid AND r.status NOT IN ('starting', 'connecting', 'sending')
        ORDER BY r.runid DESC LIMIT 1
    ) AS d ON true
    WHERE o.schedule <> '@reboot'
    ORDER BY o.jobname
"""
_MOVED = """
    SELECT j.jobid, j.jobname::text AS name, j.schedule, j.command FROM cron.job AS j
    WHERE j.database = current_database() AND starts_with(j.jobname, 'embedline ')
        AND (j.nodename, j.nodeport) IS DISTINCT FROM (current_setting('cron.host'), current_setting('port')::integer)
"""
_OWN_JOB = "SELECT jobid FROM cron.job WHERE database = current_database() AND jobname = $1"


@dataclass(frozen=True)
class Trouble:
    """Jobs that do not run, why, and the statements to run."""

    jobs: str
    trouble: str
    remedy: str


def _require_cron(session: Session, job: str, schedule: str, command: str) -> None:
    """Raise unless jobs can be scheduled here.

    The HINT says how to schedule such a job elsewhere.
    """
    if cron.has_cron(session):
        version = session.scalar("SELECT extversion FROM pg_extension WHERE extname = 'pg_cron'")
        if _uses_background_workers(session) and _version(version) < (1, 5):
            raise InvalidParameter(
                f"pg_cron {version} with cron.use_background_workers = on stops all jobs while one stays resident",
                hint="ALTER SYSTEM SET cron.use_background_workers = off; then restart the server, or use pg_cron 1.5.",
            )
        return
    home = session.scalar("SELECT current_setting('cron.database_name', true)")
    database = session.scalar("SELECT current_database()")
    if home and home != database:
        raise InvalidParameter(
            f'pg_cron lives in database "{home}", not here',
            hint=f"In \"{home}\" run: SELECT cron.schedule_in_database('{job}', '{schedule}', '{command}', '{database}');",
        )
    is_loaded = session.scalar("SELECT current_setting('cron.use_background_workers', true) IS NOT NULL")
    way = (
        "CREATE EXTENSION pg_cron;"
        if is_loaded
        else f"Set shared_preload_libraries = 'pg_cron' and cron.database_name = {quote_literal(str(database)).strip()},"
        " restart the server, CREATE EXTENSION pg_cron;"
    )
    raise InvalidParameter(
        "pg_cron is not installed in this database",
        hint=f"{way} or let any scheduler, or a session of yours, {command};",
    )


@entry_point
def schedule_workers(session: Session, count: int) -> int:
    """Schedule exactly `count` resident workers; return `count`.

    The nightly run is scheduled, too, if it is not yet.
    """
    if not 1 <= count <= _MAX_WORKERS:
        raise InvalidParameter(
            f"count must be between 1 and {_MAX_WORKERS}", hint="SELECT embedline.schedule_workers(1);"
        )
    _require_cron(session, "embedline worker 1", "* * * * *", "CALL embedline.run_worker(slot => 1)")
    _require_room(session, count)
    _unschedule(session, above=count)
    for slot in range(1, count + 1):
        for schedule in _SCHEDULES:
            name = f"embedline worker {slot}" + (" at start" if schedule == "@reboot" else "")
            command = f"CALL embedline.run_worker(max_seconds => {_WORKER_SECONDS}, slot => {slot})"
            cron.schedule(session, name, schedule, command)
    if not session.query(_OWN_JOB, ["text"], _NIGHTLY_JOB):
        _schedule_nightly(session, _NIGHTLY_AT, repair=True)
    _refresh_addresses(session)
    for trouble in _troubles(session):
        session.plpy.warning(f"{trouble.jobs}: {trouble.trouble}", hint=trouble.remedy)
    return count


def _require_room(session: Session, count: int) -> None:
    """Raise if pg_cron runs fewer jobs at a time than these workers and one more.

    The others would never begin.
    """
    limit = session.scalar("SELECT current_setting('cron.max_running_jobs', true)")
    if limit is None or count < int(limit):
        return
    statements = [f"ALTER SYSTEM SET cron.max_running_jobs = {count + 1};", _restart(session)]
    if _uses_background_workers(session):
        # Beside the workers of parallel queries and of replication.
        wanted = int(session.scalar("SELECT current_setting('max_worker_processes')")) - int(limit) + count + 1
        statements.insert(0, f"ALTER SYSTEM SET max_worker_processes = {wanted};")
    raise InvalidParameter(
        f"pg_cron runs {limit} jobs at a time, and {count} workers stay resident beside the others",
        hint="\n".join(statements),
    )


def _uses_background_workers(session: Session) -> bool:
    return bool(session.scalar("SELECT current_setting('cron.use_background_workers', true)") == "on")


def _refresh_addresses(session: Session) -> None:
    """Have all of our jobs connect to where the server is now.

    Pg_cron keeps the host and port of a job's first scheduling. They are scheduled as new ones, so that what the old ones
    ran into is not held against them.
    """
    for row in session.query(_MOVED):
        session.query("SELECT cron.unschedule($1::bigint)", ["bigint"], row["jobid"])
        cron.schedule(session, row["name"], row["schedule"], row["command"])


@entry_point
def job_troubles(session: Session) -> list[tuple[str, str, str]]:
    """Return the jobs of this database that do not run, why, and the remedy."""
    if not session.scalar("SELECT to_regclass('cron.job_run_details') IS NOT NULL"):
        return []
    return [(trouble.jobs, trouble.trouble, trouble.remedy) for trouble in _troubles(session)]


def _troubles(session: Session) -> list[Trouble]:
    """Return what is wrong with our jobs, each cause once with all jobs that it stops."""
    host = str(session.scalar("SELECT current_setting('cron.host', true)") or "")
    port = int(session.scalar("SELECT current_setting('port')"))
    found: dict[tuple[str, str], list[str]] = {}
    for row in session.query(_LAST_RUNS):
        cause = _cause(session, row, host, port)
        if cause is not None:
            found.setdefault(cause, []).append(str(row["job"]))
    return [Trouble(", ".join(jobs), trouble, remedy) for (trouble, remedy), jobs in found.items()]


def _cause(session: Session, row: dict[str, Any], host: str, port: int) -> tuple[str, str] | None:
    """Return why a job does not run and what to run, or None."""
    message = str(row["message"] or "").strip()
    is_over_libpq = not _uses_background_workers(session)
    if is_over_libpq and (str(row["host"]), int(row["port"])) != (host, port):
        return f"connects to {row['host']}:{row['port']}, and pg_cron's address is {host}:{port} now", _reschedule(
            session
        )
    if row["status"] == "failed" and message != "server restarted":
        if message == "connection failed" or message.startswith("could not start background process"):
            if row["is_past"]:
                return None
            remedy = _connection_remedy(session, host) if message == "connection failed" else _process_remedy(session)
        else:
            remedy = (
                "SELECT d.* FROM cron.job_run_details AS d JOIN cron.job AS j USING (jobid)"
                f" WHERE j.jobname = {quote_literal(str(row['job'])).strip()} ORDER BY d.runid DESC LIMIT 5;"
            )
        return f"the last run ended in: {message}", remedy
    if row["status"] is None and is_over_libpq and _lacks_password(session, host):
        trouble = f"connects to {host}, where pg_hba.conf asks for a password that pg_cron does not have"
        return trouble, _connection_remedy(session, host)
    return None


def _reschedule(session: Session) -> str:
    scheduled = session.scalar(
        "SELECT count(*) FROM cron.job WHERE database = current_database() AND jobname ~ '^embedline worker [0-9]+$'"
    )
    return f"SELECT embedline.schedule_workers({max(int(scheduled), 1)});"


def _lacks_password(session: Session, host: str) -> bool:
    if host.startswith("/") or session.scalar(_HBA_METHOD) not in _PASSWORD_METHODS:
        return False
    # Of the server's OS user, as whom pg_cron connects and this code runs.
    return not Path(os.environ.get("PGPASSFILE") or Path.home() / ".pgpass").exists()


def _connection_remedy(session: Session, host: str) -> str:
    """Return the statements that let pg_cron in.

    The server's OS user needs no password on the Unix socket; background workers need no connection.
    """
    directories = str(session.scalar("SELECT current_setting('unix_socket_directories')"))
    socket = directories.split(",")[0].strip().strip('"')
    version = session.scalar("SELECT extversion FROM pg_extension WHERE extname = 'pg_cron'")
    if not host.startswith("/") and socket:
        setting = f"ALTER SYSTEM SET cron.host = {quote_literal(socket).strip()};"
    elif _version(version) >= (1, 5):
        setting = "ALTER SYSTEM SET cron.use_background_workers = on;"
    else:
        role = session.scalar("SELECT quote_ident(current_user)")
        return (
            f"Let the server's OS user in as role {role} in pg_hba.conf (cron.host is {host});"
            " the server's log says why it was refused."
        )
    return "\n".join((setting, _restart(session), _reschedule(session)))


def _process_remedy(session: Session) -> str:
    wanted = 2 * int(session.scalar("SELECT current_setting('max_worker_processes')"))
    return f"ALTER SYSTEM SET max_worker_processes = {wanted};\n{_restart(session)}"


def _restart(session: Session) -> str:
    """Return an SQL comment about the restart that is needed.

    It names the command if Debian's tools made the cluster.
    """
    parts = Path(str(session.scalar("SELECT current_setting('config_file')"))).parts
    way = f": pg_ctlcluster {parts[3]} {parts[4]} restart" if parts[:3] == ("/", "etc", "postgresql") else ""
    return f"-- restart the server{way}"


def _version(text: object) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", str(text))[:2]))


@entry_point
def unschedule_workers(session: Session) -> int:
    """Take the jobs away, the nightly one too, and ask the resident workers to stop.

    Return how many were asked.
    """
    if cron.has_cron(session):
        _unschedule(session, above=0)
        _unschedule_nightly(session)
    return len(
        session.query("UPDATE embedline.worker SET stop_requested = true WHERE slot IS NOT NULL RETURNING worker_id")
    )


@entry_point
def schedule_nightly(session: Session, at: str | None, repair: bool) -> None:
    """Schedule the nightly run at a time of day, instead of when it was.

    The time is HH:MM in pg_cron's time zone; None means never.
    """
    if at is None:
        if cron.has_cron(session):
            _unschedule_nightly(session)
        return
    _require_cron(session, _NIGHTLY_JOB, _daily(at), _nightly_command(repair))
    _schedule_nightly(session, at, repair)


def _schedule_nightly(session: Session, at: str, repair: bool) -> None:
    cron.schedule(session, _NIGHTLY_JOB, _daily(at), _nightly_command(repair))


def _unschedule_nightly(session: Session) -> None:
    cron.unschedule(session, _NIGHTLY_JOB)


def _daily(at: str) -> str:
    hour, minute = at.split(":")[:2]
    return f"{int(minute)} {int(hour) % 24} * * *"


def _nightly_command(repair: bool) -> str:
    return f"CALL embedline.run_nightly(repair => {'true' if repair else 'false'})"


def wake_launcher(session: Session) -> None:
    """Wake pg_cron's launcher where another session waits for it.

    In libpq mode the launcher of pg_cron 1.4 heeds no interrupt while a job is running, and a resident worker always
    is. DROP DATABASE waits until every process has taken note, so it would hang until the worker's end. Measured:
    over 16 s and going on; 1 s with this. A change in cron.job makes the launcher read its jobs again, and take note.
    A failure ends no worker: it is a service to that other session.
    """
    if not cron.has_cron(session) or not session.scalar(
        "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'ProcSignalBarrier' LIMIT 1"
    ):
        return
    try:
        with session.plpy.subtransaction():
            session.execute(
                "UPDATE cron.job SET active = active WHERE jobid = ("
                "SELECT min(jobid) FROM cron.job"
                " WHERE database = current_database() AND jobname LIKE 'embedline worker %')"
            )
    except session.plpy.SPIError as error:
        if sqlstate_of(error) in ENDING:
            raise
        session.plpy.warning(f"embedline worker: pg_cron's launcher could not be woken: {error}")


def _unschedule(session: Session, above: int) -> None:
    session.query(
        """
        SELECT cron.unschedule(jobid) FROM cron.job
        WHERE database = current_database() AND jobname ~ '^embedline worker [0-9]+( at start)?$'
            AND split_part(jobname, ' ', 3)::integer > $1
        """,
        ["integer"],
        above,
    )
    session.query("UPDATE embedline.worker SET stop_requested = true WHERE slot > $1", ["integer"], above)
