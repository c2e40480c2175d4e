"""Name pg_cron's jobs that build indexes, and remove them."""

from __future__ import annotations

from embedline.postgres.session import Session


def index_job(name: str, number: int, precision: str | None) -> str:
    """Return the name of the job that builds an index of a version."""
    return f"embedline index {name} v{number}" + (f" {precision}" if precision else "")


def forget_index_jobs(session: Session, name: str, number: int | None = None, precision: str | None = None) -> None:
    """Remove the jobs that build indexes of an object about to be dropped.

    The object is a pipeline, a version, or one of its indexes.
    """
    if not session.scalar("SELECT to_regclass('cron.job') IS NOT NULL"):
        return
    prefix = f"embedline index {name} " if number is None else f"{index_job(name, number, precision)} "
    session.query(
        "SELECT cron.unschedule(jobid) FROM cron.job"
        " WHERE database = current_database() AND starts_with(jobname || ' ', $1)",
        ["text"],
        prefix,
    )
