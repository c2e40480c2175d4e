"""pg_cron in this database: whether it is here, and its jobs."""

from __future__ import annotations

from embedline.postgres.session import Session


def has_cron(session: Session) -> bool:
    """Return True if pg_cron is installed in this database."""
    return bool(session.scalar("SELECT to_regclass('cron.job') IS NOT NULL"))


def schedule(session: Session, job: str, times: str, command: str) -> None:
    """Have pg_cron run a command on a schedule; a job of the same name is replaced."""
    session.query("SELECT cron.schedule($1, $2, $3)", ["text", "text", "text"], job, times, command)


def unschedule(session: Session, job: str) -> None:
    """Take away the job of a name, if this database has it."""
    session.query(
        "SELECT cron.unschedule(jobid) FROM cron.job WHERE database = current_database() AND jobname = $1",
        ["text"], job,
    )  # fmt: skip
