"""Verify and repair all pipelines each night, and clean up.

Old dead letters are purged, and the ledger is rolled up.
"""

from __future__ import annotations

import contextlib
from enum import StrEnum

from embedline.catalog.load import load_pipeline
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import NIGHTLY_LOCK
from embedline.postgres.session import Plpy, Session, SessionCache
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.queue.dead_letters import purge
from embedline.spending import ledger
from embedline.verify.verify import note_failure, verify_pipeline
from embedline.worker import batch_history

# Chunks of each pipeline that the model embeds again: one or two requests, for a pipeline of any size.
_SAMPLE = 20
_KEPT_DAYS = 90
_PURGES = (
    "DELETE FROM embedline.verification WHERE verified_at < now() - make_interval(days => $1)",
    "DELETE FROM embedline.shadow_read WHERE read_at < now() - make_interval(days => $1)",
    "DELETE FROM embedline.batch_hour WHERE hour < now() - make_interval(days => $1)",
)


class NightlyStep(StrEnum):
    """A step of the nightly run; its value travels through embedline._nightly_step."""

    VERIFY = "verify"
    # What follows a verification that failed, which is rolled back.
    RECORD_FAILURE = "failed"
    QUALITY = "quality"
    PURGE = "purge"


@entry_point
def nightly_step(session: Session, step: str, pipeline_name: str | None, repair: bool, message: str | None) -> None:
    """Do one step of the nightly run, a transaction of its own.

    Only run_nightly calls it.
    """
    try:
        this = NightlyStep(step)
    except ValueError:
        raise InvalidParameter(f'the nightly run has no step "{step}"') from None
    if this is NightlyStep.PURGE:
        _purge(session)
    elif pipeline_name is None:
        raise InvalidParameter(f'step "{step}" of the nightly run is for one pipeline, which must be named')
    elif this is NightlyStep.VERIFY:
        _verify_and_repair(session, pipeline_name, repair)
    elif this is NightlyStep.QUALITY:
        session.query("SELECT count(*) FROM embedline.check_quality($1, only_due => true)", ["text"], pipeline_name)
    else:
        note_failure(session, pipeline_name, message or "")


def _verify_and_repair(session: Session, name: str, repair: bool) -> None:
    pipeline = load_pipeline(session, name)
    # A pipeline may be paused because its provider must not be asked.
    verify_pipeline(session, pipeline, repair, _SAMPLE if pipeline.state == "active" else 0)


def _purge(session: Session) -> None:
    purge(session, None)
    for statement in _PURGES:
        session.query(statement, ["integer"], _KEPT_DAYS)
    session.query("SELECT embedline._purge_quality(), embedline._purge_query_samples(), embedline._purge_loans()")
    batch_history.move_old(session)
    ledger.roll_up(session)


def run_nightly(plpy: Plpy, cache: SessionCache, repair: bool) -> None:
    """Run the steps, with a commit after each pipeline.

    An error of one pipeline neither stops nor undoes another. Steps run as the SECURITY DEFINER function
    embedline._nightly_step. A procedure that commits can be neither SECURITY DEFINER nor have a pinned search_path.
    """
    locked = plpy.execute(f"SELECT pg_catalog.pg_try_advisory_lock({NIGHTLY_LOCK}) AS locked")
    if not locked[0]["locked"]:
        plpy.notice("embedline: another session runs a nightly run already")
        return
    try:
        rows = plpy.execute("SELECT p.name FROM embedline.pipeline AS p ORDER BY p.pipeline_id")
        names = [str(row["name"]) for row in rows]
        plpy.commit()
        for name in names:
            _verify(plpy, name, repair)
            _check_quality(plpy, name, repair)
        _step(plpy, NightlyStep.PURGE, None, repair, None)
        plpy.commit()
    finally:
        with contextlib.suppress(Exception):
            plpy.rollback()
        plpy.execute(f"SELECT pg_catalog.pg_advisory_unlock({NIGHTLY_LOCK})")
        plpy.commit()


def _verify(plpy: Plpy, name: str, repair: bool) -> None:
    try:
        _step(plpy, NightlyStep.VERIFY, name, repair, None)
        plpy.commit()
    except Exception as error:
        if sqlstate_of(error) in ENDING:
            raise
        plpy.rollback()
        _step(plpy, NightlyStep.RECORD_FAILURE, name, repair, str(error))
        plpy.commit()
        plpy.warning(f"embedline: pipeline {name} could not be verified: {error}")


def _check_quality(plpy: Plpy, name: str, repair: bool) -> None:
    try:
        _step(plpy, NightlyStep.QUALITY, name, repair, None)
        plpy.commit()
    except Exception as error:
        if sqlstate_of(error) in ENDING:
            raise
        plpy.rollback()
        plpy.warning(f"embedline: the quality of pipeline {name} could not be checked: {error}")


def _step(plpy: Plpy, step: NightlyStep, name: str | None, repair: bool, message: str | None) -> None:
    plan = plpy.prepare("SELECT embedline._nightly_step($1, $2, $3, $4)", ["text", "text", "boolean", "text"])
    plpy.execute(plan, [step, name, repair, message])
