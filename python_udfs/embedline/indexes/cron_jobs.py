"""Remove pg_cron's jobs that build indexes."""

from __future__ import annotations

from embedline.core import names
from embedline.postgres.cron import has_cron
from embedline.postgres.session import Session


def forget_index_jobs(session: Session, name: str, number: int | None = None, precision: str | None = None) -> None:
    """Remove the jobs that build indexes of an object about to be dropped.

    The object is a pipeline, a version, or one of its indexes.
    """
    if not has_cron(session):
        return
    prefix = names.index_jobs(name) if number is None else f"{names.index_job(name, number, precision)} "
    session.query(
        "SELECT cron.unschedule(jobid) FROM cron.job"
        " WHERE database = current_database() AND starts_with(jobname || ' ', $1)",
        ["text"],
        prefix,
    )
