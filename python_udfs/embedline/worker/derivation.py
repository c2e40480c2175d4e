"""Keep derived vectors: the worker's part."""

from __future__ import annotations

import time

from embedline.catalog.derived import Derived, active_derived
from embedline.catalog.health import MAX_ERROR_CHARACTERS
from embedline.catalog.load import load_pipeline, load_versions
from embedline.catalog.values import Pipeline
from embedline.documents import derived as means
from embedline.documents.read import can_hold_source
from embedline.errors import EmbedlineError
from embedline.pipelines import derived as objects
from embedline.postgres.locks import DERIVED_LOCK_CLASS, retry_locked
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, LOCK_NOT_AVAILABLE, sqlstate_of

# Seconds after which a worker that always finds rows to embed computes derived vectors, too.
_OVERDUE_SECONDS = 0.5
# Seconds in which derived vectors that failed are left alone, and those whose tables were locked.
_FAILED_SECONDS, _LOCKED_SECONDS = 30.0, 0.5
# Errors that pass: a lock timeout, a deadlock, a serialization failure.
_PASSING = (LOCK_NOT_AVAILABLE, "40P01", "40001")
_IS_WAITING = """
    SELECT EXISTS (SELECT FROM {dirty}) OR EXISTS (SELECT FROM {items}) OR EXISTS (
        SELECT FROM embedline.version AS v JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
        WHERE v.pipeline_id = $1 AND (v.state = 'complete' OR v.version_id = p.serving_version_id)
            AND to_regclass(format('embedline_data.%I', $2::text || '_derived_of_v' || v.number)) IS NULL)
"""
_RECORD = """
    UPDATE embedline.derived SET last_error = $2, last_error_at = clock_timestamp() WHERE derived_id IN (
        SELECT derived_id FROM embedline.derived WHERE derived_id = $1 FOR NO KEY UPDATE SKIP LOCKED)
"""
_FORGET = """
    UPDATE embedline.derived SET last_error = NULL, last_error_at = NULL WHERE derived_id IN (
        SELECT derived_id FROM embedline.derived WHERE derived_id = $1 AND last_error IS NOT NULL
        FOR NO KEY UPDATE SKIP LOCKED)
"""


class Derivation:
    """The derived vectors that one worker keeps."""

    def __init__(self, session: Session, pipeline_name: str | None) -> None:
        self._session, self._pipeline_name = session, pipeline_name
        self._stepped_at = time.monotonic()
        # Derived vectors that are left alone, until then.
        self._asleep: dict[int, float] = {}

    def is_overdue(self, now: float) -> bool:
        """Return True if derived vectors cannot wait for an idle worker."""
        return now >= self._stepped_at + _OVERDUE_SECONDS

    def step(self) -> bool:
        """Compute one piece of what waits; return True if anything was done.

        A transaction should have one step: the rows that it locks are in one order within a step only.
        """
        self._stepped_at = time.monotonic()
        for derived in active_derived(self._session, self._pipeline_name):
            if self._asleep.get(derived.derived_id, 0.0) <= self._stepped_at and self._try(derived):
                return True
        return False

    def _try(self, derived: Derived) -> bool:
        try:
            with self._session.plpy.subtransaction():
                done = is_waiting(self._session, derived) and advance(self._session, derived)
                if done and derived.last_error is not None:
                    self._session.query(_FORGET, ["bigint"], derived.derived_id)
                return done
        except (self._session.plpy.SPIError, EmbedlineError) as error:
            state = sqlstate_of(error)
            if state in ENDING:
                raise
            seconds = _LOCKED_SECONDS if state in _PASSING else _FAILED_SECONDS
            self._asleep[derived.derived_id] = time.monotonic() + seconds
            if state not in _PASSING:
                message = str(error).removeprefix("spiexceptions.")[:MAX_ERROR_CHARACTERS]
                self._session.query(_RECORD, ["bigint", "text"], derived.derived_id, message)
                self._session.plpy.warning(f"embedline, derived vectors {derived.name}: {error}")
            return False


def derive_all(session: Session, pipeline_name: str | None) -> None:
    """Compute all that waits, unless workers do so now.

    All of it is in the caller's transaction.

    Under a stricter isolation another session's events could not be told from none.
    """
    if session.scalar("SELECT current_setting('transaction_isolation')") != "read committed":
        return
    for derived in active_derived(session, pipeline_name):
        if not is_waiting(session, derived) or not lock_alone(session, derived):
            continue
        derivation = Derivation(session, None)
        while derivation._try(derived):
            pass


def is_waiting(session: Session, derived: Derived) -> bool:
    """Return True if anything is queued, or a version has no derived vectors."""
    sql = _IS_WAITING.format(dirty=derived.generated("dirty"), items=derived.generated("items"))
    return bool(session.scalar(sql, ["bigint", "text"], derived.pipeline_id, derived.name))


def advance(session: Session, derived: Derived) -> bool:
    """Do one piece of what waits; return False if it cannot be done now.

    Locks the source and the events as readers do, before any table of ours. A TRUNCATE takes them in this order, too.
    """
    pipeline = load_pipeline(session, derived.pipeline)
    if not (_lock(session, derived, shared=True) and can_hold_source(session, pipeline)):
        return False
    events = session.scalar("SELECT $1::oid::regclass::text", ["bigint"], derived.events_oid)
    session.execute(f"LOCK TABLE {events} IN ACCESS SHARE MODE NOWAIT")
    objects.follow_owner(session, derived)
    added = objects.versions_to_add(session, derived)
    for version in added:
        add_version(session, derived, version)
    if added:
        return True
    has_moved = means.move_items(session, derived)
    subjects = means.take_subjects(session, derived)
    if subjects is None:
        objects.rewrite_note_functions(session, derived)
        means.queue_all(session, derived)
        return True
    if subjects:
        means.recompute(session, derived, filled_versions(session, derived), subjects)
    return has_moved or bool(subjects)


def filled_versions(session: Session, derived: Derived) -> list[Pipeline]:
    """Return the versions of the pipeline that have derived vectors."""
    return [
        version
        for version in load_versions(session, derived.pipeline)
        if objects.has_version(session, derived, version.version.number)
    ]


def add_version(session: Session, derived: Derived, version: Pipeline) -> None:
    """Give a version its derived vectors: create them, and queue all subjects."""
    retry_locked(session, lambda: objects.add_version(session, derived, version), "the version's vectors", 2.0)
    session.query(f"INSERT INTO {derived.generated('dirty')} (subjects) VALUES (NULL)")


def lock_alone(session: Session, derived: Derived) -> bool:
    """Lock derived vectors; return False if another session computes them.

    The lock lasts to the end of the transaction.

    Two transactions of several steps could wait for each other.
    """
    return _lock(session, derived, shared=False)


def _lock(session: Session, derived: Derived, *, shared: bool) -> bool:
    function = "pg_try_advisory_xact_lock_shared" if shared else "pg_try_advisory_xact_lock"
    return bool(
        session.scalar(f"SELECT {function}($1, $2)", ["integer", "integer"], DERIVED_LOCK_CLASS, derived.derived_id)
    )
