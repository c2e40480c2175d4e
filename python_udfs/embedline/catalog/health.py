"""Record the latest error of a pipeline or a version, and clear it later."""

from __future__ import annotations

from collections.abc import Callable

from embedline.catalog.values import Pipeline
from embedline.errors import EmbedlineError
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

MAX_ERROR_CHARACTERS = 500
# Begins the errors of batch endpoints.
_OF_BATCHES = "batch endpoint: "
_RECORD_OF_PIPELINE = """
    UPDATE embedline.pipeline_health SET last_error = $2, last_error_at = clock_timestamp() WHERE pipeline_id IN (
        SELECT pipeline_id FROM embedline.pipeline_health WHERE pipeline_id = $1 FOR NO KEY UPDATE SKIP LOCKED)
"""
_RECORD_OF_VERSION = """
    UPDATE embedline.version SET last_error = $2 WHERE version_id IN (
        SELECT version_id FROM embedline.version WHERE version_id = $1 FOR NO KEY UPDATE SKIP LOCKED)
"""
_FORGET_OF_PIPELINE = """
    UPDATE embedline.pipeline_health SET last_error = NULL, last_error_at = NULL WHERE pipeline_id IN (
        SELECT pipeline_id FROM embedline.pipeline_health WHERE pipeline_id = $1 AND last_error = $2
        FOR NO KEY UPDATE SKIP LOCKED)
"""
_FORGET_OF_VERSION = """
    UPDATE embedline.version SET last_error = NULL WHERE version_id IN (
        SELECT version_id FROM embedline.version WHERE version_id = $1 AND last_error = $2
        FOR NO KEY UPDATE SKIP LOCKED)
"""


def record_error(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show an error of the pipeline in embedline.status."""
    session.query(
        "UPDATE embedline.pipeline_health SET last_error = $2, last_error_at = clock_timestamp() WHERE pipeline_id = $1",
        ["bigint", "text"],
        pipeline.pipeline_id,
        message[:MAX_ERROR_CHARACTERS],
    )


def record_fault(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show why no rows of a pipeline can be claimed.

    The error appears in embedline.status. Does not wait for another session's lock.
    """
    _record_fault(session, _RECORD_OF_PIPELINE, pipeline.pipeline_id, message)


def forget_error(session: Session, pipeline: Pipeline) -> None:
    """Clear the error that the pipeline had when it was loaded.

    A later error stays. Does not wait for another session's lock.
    """
    session.query(_FORGET_OF_PIPELINE, ["bigint", "text"], pipeline.pipeline_id, pipeline.last_error)


def record_version_error(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show an error of the version in embedline.versions."""
    session.query(
        "UPDATE embedline.version SET last_error = $2 WHERE version_id = $1",
        ["bigint", "text"],
        pipeline.version.version_id,
        message[:MAX_ERROR_CHARACTERS],
    )


def record_version_fault(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show why no chunks of a version can be claimed.

    The error appears in embedline.versions. Does not wait for another session's lock.
    """
    _record_fault(session, _RECORD_OF_VERSION, pipeline.version.version_id, message)


def forget_version_error(session: Session, pipeline: Pipeline) -> None:
    """Clear the error that the version had when it was loaded.

    A later error stays. Does not wait for another session's lock.
    """
    session.query(_FORGET_OF_VERSION, ["bigint", "text"], pipeline.version.version_id, pipeline.last_error)


def record_batch_error(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show an error of the provider's batch endpoint with the version's errors."""
    record = record_fault if pipeline.is_serving else record_version_fault
    record(session, pipeline, f"{_OF_BATCHES}{message}")


def forget_batch_error(session: Session, pipeline: Pipeline) -> None:
    """Clear an error of the batch endpoint; others stay."""
    table, column, number = (
        ("pipeline_health", "pipeline_id", pipeline.pipeline_id)
        if pipeline.is_serving
        else ("version", "version_id", pipeline.version.version_id)
    )
    session.query(
        f"UPDATE embedline.{table} SET last_error = NULL WHERE {column} IN (SELECT {column} FROM embedline.{table}"
        f" WHERE {column} = $1 AND starts_with(last_error, '{_OF_BATCHES}') FOR NO KEY UPDATE SKIP LOCKED)",
        ["bigint"],
        number,
    )


def _record_fault(session: Session, statement: str, number: int, message: str) -> None:
    session.query(statement, ["bigint", "text"], number, message.removeprefix("spiexceptions.")[:MAX_ERROR_CHARACTERS])


def isolate_failure(session: Session, pipeline: Pipeline, action: Callable[[], object]) -> bool:
    """Run an action for one pipeline; return True if it has more to do.

    If the database or we refuse it, the pipeline's status and a WARNING say so, and the others go on. Any other exception
    is a fault in the code, which nothing hides.
    """
    try:
        with session.plpy.subtransaction():
            return bool(action())
    except (session.plpy.SPIError, EmbedlineError) as error:
        # A serialization failure or a deadlock belongs to the transaction, not to the pipeline.
        if sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] == "40":
            raise
        record_error(session, pipeline, str(error))
        session.plpy.warning(f"embedline, pipeline {pipeline.name}: {error}")
        return False
