"""Work as pg_cron jobs: resident workers, started at boot and looked after every minute, the nightly run, index builds."""

from __future__ import annotations

import re

from embedline.database import Session, entry_point
from embedline.errors import InvalidParameter

_MAX_WORKERS = 64
# A resident worker ends after this long and pg_cron starts it anew: memory and plans do not grow old.
_WORKER_SECONDS = 1200
_SCHEDULES = ("@reboot", "* * * * *")
_NIGHTLY_JOB = "embedline nightly"
_NIGHTLY_AT = "03:30"
_OWN_JOB = "SELECT jobid FROM cron.job WHERE database = current_database() AND jobname = $1"


def _require_cron(session: Session, job: str, schedule: str, command: str) -> None:
    """Raise unless jobs can be scheduled here; the HINT says how to schedule such a job elsewhere."""
    if session.scalar("SELECT to_regclass('cron.job') IS NOT NULL"):
        mode = session.scalar("SELECT current_setting('cron.use_background_workers', true)")
        version = session.scalar("SELECT extversion FROM pg_extension WHERE extname = 'pg_cron'")
        if mode == "on" and tuple(map(int, re.findall(r"\d+", str(version))[:2])) < (1, 5):
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
    raise InvalidParameter(
        "pg_cron is not installed in this database",
        hint=f"CREATE EXTENSION pg_cron; or let any scheduler, or a session of yours, {command};",
    )


@entry_point
def schedule_workers(session: Session, count: int) -> int:
    """Schedule exactly `count` resident workers, and the nightly run where there is none yet; return `count`."""
    if not 1 <= count <= _MAX_WORKERS:
        raise InvalidParameter(
            f"count must be between 1 and {_MAX_WORKERS}", hint="SELECT embedline.schedule_workers(1);"
        )
    _require_cron(session, "embedline worker 1", "* * * * *", "CALL embedline.run_worker(slot => 1)")
    _unschedule(session, above=count)
    for slot in range(1, count + 1):
        for schedule in _SCHEDULES:
            name = f"embedline worker {slot}" + (" at start" if schedule == "@reboot" else "")
            session.query(
                "SELECT cron.schedule($1, $2, $3)",
                ["text", "text", "text"],
                name,
                schedule,
                f"CALL embedline.run_worker(max_seconds => {_WORKER_SECONDS}, slot => {slot})",
            )
    if not session.query(_OWN_JOB, ["text"], _NIGHTLY_JOB):
        _schedule_nightly(session, _NIGHTLY_AT, repair=True)
    return count


@entry_point
def unschedule_workers(session: Session) -> int:
    """Take the jobs away, the nightly one too, and ask the resident workers to stop; return how many were asked."""
    if session.scalar("SELECT to_regclass('cron.job') IS NOT NULL"):
        _unschedule(session, above=0)
        _unschedule_nightly(session)
    return len(
        session.query("UPDATE embedline.worker SET stop_requested = true WHERE slot IS NOT NULL RETURNING worker_id")
    )


def index_job(name: str, number: int, precision: str | None) -> str:
    """Return the name of the job that builds an index of a version."""
    return f"embedline index {name} v{number}" + (f" {precision}" if precision else "")


def forget_index_jobs(session: Session, name: str, number: int | None = None, precision: str | None = None) -> None:
    """Take away the jobs that build indexes of what is about to be dropped: a pipeline, a version, or one of its indexes."""
    if not session.scalar("SELECT to_regclass('cron.job') IS NOT NULL"):
        return
    prefix = f"embedline index {name} " if number is None else f"{index_job(name, number, precision)} "
    session.query(
        "SELECT cron.unschedule(jobid) FROM cron.job"
        " WHERE database = current_database() AND starts_with(jobname || ' ', $1)",
        ["text"],
        prefix,
    )


@entry_point
def schedule_nightly(session: Session, at: str | None, repair: bool) -> None:
    """Schedule the nightly run at a time of day (HH:MM, in pg_cron's time zone) instead of when it was; None: never."""
    if at is None:
        if session.scalar("SELECT to_regclass('cron.job') IS NOT NULL"):
            _unschedule_nightly(session)
        return
    _require_cron(session, _NIGHTLY_JOB, _daily(at), _nightly_command(repair))
    _schedule_nightly(session, at, repair)


def _schedule_nightly(session: Session, at: str, repair: bool) -> None:
    session.query(
        "SELECT cron.schedule($1, $2, $3)",
        ["text", "text", "text"],
        _NIGHTLY_JOB,
        _daily(at),
        _nightly_command(repair),
    )


def _unschedule_nightly(session: Session) -> None:
    session.query(f"SELECT cron.unschedule(j.jobid) FROM ({_OWN_JOB}) AS j", ["text"], _NIGHTLY_JOB)


def _daily(at: str) -> str:
    hour, minute = at.split(":")[:2]
    return f"{int(minute)} {int(hour) % 24} * * *"


def _nightly_command(repair: bool) -> str:
    return f"CALL embedline.run_nightly(repair => {'true' if repair else 'false'})"


def let_launcher_breathe(session: Session) -> None:
    """Wake pg_cron's launcher where another session waits for it.

    In libpq mode the launcher of pg_cron 1.4 heeds no interrupt while a job is running, and a resident worker always is:
    DROP DATABASE, which waits until every process has taken note, would hang until the worker's end (measured: over
    16 s and going on; 1 s with this). A change in cron.job makes the launcher read its jobs anew, and take note.
    """
    if session.scalar("SELECT to_regclass('cron.job') IS NOT NULL") and session.scalar(
        "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'ProcSignalBarrier' LIMIT 1"
    ):
        session.execute(
            "UPDATE cron.job SET active = active WHERE jobid = ("
            "SELECT min(jobid) FROM cron.job WHERE database = current_database() AND jobname LIKE 'embedline worker %')"
        )


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
