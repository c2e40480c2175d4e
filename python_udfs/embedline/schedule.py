"""Resident workers as pg_cron jobs: one slot each, started at boot and looked after every minute."""

from __future__ import annotations

import re

from embedline.database import Session, entry_point
from embedline.errors import InvalidParameter

_MAX_WORKERS = 64
# A resident worker ends after this long and pg_cron starts it anew: memory and plans do not grow old.
_WORKER_SECONDS = 1200
_SCHEDULES = ("@reboot", "* * * * *")


def _require_cron(session: Session, count: int) -> None:
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
            hint=f"In \"{home}\" run: SELECT cron.schedule_in_database('embedline worker 1', '* * * * *', "
            f"'CALL embedline.run_worker(slot => 1)', '{database}');",
        )
    raise InvalidParameter(
        "pg_cron is not installed in this database",
        hint="CREATE EXTENSION pg_cron; or let any scheduler, or a session of yours, CALL embedline.run_worker();",
    )


@entry_point
def schedule_workers(session: Session, count: int) -> int:
    """Schedule exactly `count` resident workers; return their number."""
    if not 1 <= count <= _MAX_WORKERS:
        raise InvalidParameter(
            f"count must be between 1 and {_MAX_WORKERS}", hint="SELECT embedline.schedule_workers(1);"
        )
    _require_cron(session, count)
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
    return count


@entry_point
def unschedule_workers(session: Session) -> int:
    """Take the jobs away and ask the resident workers to stop; return how many were asked."""
    if session.scalar("SELECT to_regclass('cron.job') IS NOT NULL"):
        _unschedule(session, above=0)
    return len(
        session.query("UPDATE embedline.worker SET stop_requested = true WHERE slot IS NOT NULL RETURNING worker_id")
    )


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
