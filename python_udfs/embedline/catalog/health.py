"""Record the latest error of a pipeline or a version, and clear it later."""

from __future__ import annotations

from collections.abc import Callable

from embedline.catalog.values import Pipeline
from embedline.errors import EmbedlineError
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

MAX_ERROR_CHARACTERS = 500
_NOTE_OF_PIPELINE = """
    UPDATE embedline.pipeline_health SET last_error = $2, last_error_at = clock_timestamp() WHERE pipeline_id IN (
        SELECT pipeline_id FROM embedline.pipeline_health WHERE pipeline_id = $1 FOR NO KEY UPDATE SKIP LOCKED)
"""
_NOTE_OF_VERSION = """
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


def note_error(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show an error of the pipeline in embedline.status."""
    session.query(
        "UPDATE embedline.pipeline_health SET last_error = $2, last_error_at = clock_timestamp() WHERE pipeline_id = $1",
        ["bigint", "text"],
        pipeline.pipeline_id,
        message[:MAX_ERROR_CHARACTERS],
    )


def note_fault(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show why no rows of a pipeline or a version can be claimed.

    The error appears in embedline.status or embedline.versions. Does not wait for another session's lock.
    """
    session.query(
        _NOTE_OF_VERSION if pipeline.is_lane else _NOTE_OF_PIPELINE,
        ["bigint", "text"],
        pipeline.version.version_id if pipeline.is_lane else pipeline.pipeline_id,
        message.removeprefix("spiexceptions.")[:MAX_ERROR_CHARACTERS],
    )


def forget_fault(session: Session, pipeline: Pipeline) -> None:
    """Clear the error of `note_fault`.

    An error that was recorded after `pipeline` was loaded stays.
    """
    session.query(
        _FORGET_OF_VERSION if pipeline.is_lane else _FORGET_OF_PIPELINE,
        ["bigint", "text"],
        pipeline.version.version_id if pipeline.is_lane else pipeline.pipeline_id,
        pipeline.last_error,
    )


def contain(session: Session, pipeline: Pipeline, action: Callable[[], object]) -> bool:
    """Run an action for one pipeline; return True if it has more to do.

    If PostgreSQL or Embedline refuses the action, the pipeline's status and a WARNING report it, and the other
    pipelines go on. Any other exception is a defect and is raised.
    """
    try:
        with session.plpy.subtransaction():
            return bool(action())
    except (session.plpy.SPIError, EmbedlineError) as error:
        # A serialization failure or a deadlock belongs to the transaction, not to the pipeline.
        if sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] == "40":
            raise
        note_error(session, pipeline, str(error))
        session.plpy.warning(f"embedline, pipeline {pipeline.name}: {error}")
        return False


def forget_error(session: Session, pipeline: Pipeline) -> None:
    """Clear the error that was shown when the batch was claimed.

    A later error stays. Does not wait for another session's lock.
    """
    session.query(_FORGET_OF_PIPELINE, ["bigint", "text"], pipeline.pipeline_id, pipeline.last_error)
