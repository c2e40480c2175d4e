"""Pause and resume a pipeline, and have it alone for a change."""

from __future__ import annotations

from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import change_versions, hold_source
from embedline.postgres.session import Session


@entry_point
def pause_pipeline(session: Session, name: str) -> None:
    """Stop embedding a pipeline; its changes are captured and wait."""
    _set_state(session, name, "paused")


@entry_point
def resume_pipeline(session: Session, name: str) -> None:
    """Embed a paused pipeline again."""
    _set_state(session, name, "active")


def _set_state(session: Session, name: str, state: str) -> None:
    require_control(session, name)
    session.query("UPDATE embedline.pipeline SET state = $2 WHERE name = $1", ["text", "text"], name, state)


def load_alone(session: Session, name: str, *, holds_source: bool = True) -> Pipeline:
    """Return the pipeline, kept from other changes to the end of the transaction.

    A caller that has to wait before it touches a generated table holds the source only then (`holds_source`). A
    TRUNCATE waits for that, and every writer behind it.
    """
    change_versions(session, load_pipeline(session, name).pipeline_id)
    pipeline = load_pipeline(session, name)
    if holds_source:
        hold_source(session, pipeline.source_oid)
    return pipeline
