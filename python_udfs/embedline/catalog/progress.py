"""How far a long statement is: notices for its client, and locks that other sessions can read while it runs.

A row that a statement writes is seen by others only after its commit. Session advisory locks are seen at once, need no
right, and end with the session. A statement holds two shared ones: the version it works on, and the step with its share.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from embedline.catalog.values import Pipeline
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import STEP_LOCK_CLASS, VERSION_LOCK_CLASS
from embedline.postgres.session import Session

Task = Literal["evaluate", "preview_version"]
Step = Literal[
    "reading the queries",
    "embedding the queries",
    "ranking the queries",
    "reading all vectors",
    "measuring the index",
    "timing the embedding",
    "embedding a sample",
]

# The second key of a step: task, step, and the share that is done in thousandths; the last value: not known.
_STEP_UNIT, _TASK_UNIT = 1 << 10, 1 << 15
_UNKNOWN_SHARE = _STEP_UNIT - 1

# Seconds between two changes of the locks: below what a progress bar shows.
_PUBLISH_SECONDS = 0.2
# Seconds without a sign before a notice: of a statement or a step that has just begun, and within a step.
_FIRST_NOTICE_SECONDS = 2.0
_NOTICE_SECONDS = 10.0
_CACHE_KEY = "embedline.progress"

_LOCK = "SELECT pg_try_advisory_lock_shared($1, $2)"
_UNLOCK = "SELECT pg_advisory_unlock_shared($1, $2)"
_LOCK_TYPES = ("integer", "integer")
# A session that ended by an error keeps its locks until its next statement of this kind; it is not active then.
_RUNNING = """
    SELECT a.pid, p.name AS pipeline, v.number AS version, s.objid::bigint AS step,
        extract(epoch FROM clock_timestamp() - a.query_start)::double precision AS seconds
    FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid AND a.state = 'active'
    JOIN embedline.version AS v ON v.version_id = l.objid::bigint JOIN embedline.pipeline AS p USING (pipeline_id)
    JOIN pg_locks AS s ON s.pid = l.pid AND s.locktype = 'advisory' AND s.classid = $2::bigint::oid AND s.objsubid = 2
        AND s.database = l.database
    WHERE l.locktype = 'advisory' AND l.classid = $1::bigint::oid AND l.objsubid = 2
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (p.name = $3 OR $3 IS NULL)
    ORDER BY p.name, v.number, a.pid, s.objid
"""


class Progress:
    """What a statement says of itself. `clock` gives seconds."""

    def __init__(
        self, session: Session, task: Task, pipeline: Pipeline, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._session, self._task, self._clock = session, task, clock
        self._label = f'{task}, version {pipeline.version.number} of pipeline "{pipeline.name}"'
        self._version_id = pipeline.version.version_id
        self._began = self._noticed_at = clock()
        self._published_at: float | None = None
        self._step: Step | None = None
        self._held: list[tuple[int, int]] = []

    def report(self, step: Step, done: int, total: int | None) -> None:
        """Say that `done` of `total` of a step are done; may be called as often as one likes."""
        now, is_new = self._clock(), step != self._step
        self._step = step
        if is_new or self._published_at is None or now - self._published_at >= _PUBLISH_SECONDS:
            self._published_at = now
            self._publish(step, done, total)
        if now - self._noticed_at >= (
            _FIRST_NOTICE_SECONDS if is_new or self._noticed_at == self._began else _NOTICE_SECONDS
        ):
            self._noticed_at = now
            share = f", {done:,} of {total:,}" if total else f", {done:,}" if done else ""
            self._session.plpy.notice(f"{self._label}: {step}{share}, {now - self._began:.0f} s")

    def close(self) -> None:
        """Release the locks."""
        while self._held:
            self._session.query(_UNLOCK, _LOCK_TYPES, *self._held.pop())

    def _publish(self, step: Step, done: int, total: int | None) -> None:
        before = self._held[1:]
        if not self._held and not self._hold(VERSION_LOCK_CLASS, self._version_id):
            return
        key = pack(self._task, step, done / total if total else None)
        if before == [(STEP_LOCK_CLASS, key)]:
            return
        # The new one first: a reader never finds none.
        self._hold(STEP_LOCK_CLASS, key)
        for held in before:
            self._held.remove(held)
            self._session.query(_UNLOCK, _LOCK_TYPES, *held)

    def _hold(self, lock_class: int, key: int) -> bool:
        # Refused only if another session holds this very key exclusively: it is not waited for, and nothing is shown.
        is_held = bool(self._session.scalar(_LOCK, _LOCK_TYPES, lock_class, key))
        if is_held:
            self._held.append((lock_class, key))
        return is_held


def pack(task: Task, step: Step, share: float | None) -> int:
    """Return a task, its step and the share that is done (None: not known) as the key of a lock."""
    thousandths = _UNKNOWN_SHARE if share is None else round(1000 * min(max(share, 0.0), 1.0))
    return get_args(Task).index(task) * _TASK_UNIT + get_args(Step).index(step) * _STEP_UNIT + thousandths


def unpack(key: int) -> tuple[str, str, float | None] | None:
    """Return task, step and percentage of a lock's key; None where it is not one of ours."""
    task, rest = divmod(key, _TASK_UNIT)
    step, thousandths = divmod(rest, _STEP_UNIT)
    if task >= len(get_args(Task)) or step >= len(get_args(Step)):
        return None
    return get_args(Task)[task], get_args(Step)[step], None if thousandths > 1000 else thousandths / 10


@contextmanager
def reported(session: Session, task: Task, pipeline: Pipeline) -> Iterator[None]:
    """For the length of a block, tell client and other sessions what `report` says."""
    _close(session)
    session.cache[_CACHE_KEY] = Progress(session, task, pipeline)
    try:
        yield
    finally:
        # The block's own error is the one to tell of.
        with contextlib.suppress(Exception):
            _close(session)


def _close(session: Session) -> None:
    # What a cancel in the middle of the end left behind in this session goes first.
    progress: Progress | None = session.cache.pop(_CACHE_KEY, None)
    if progress is not None:
        progress.close()


def report(session: Session, step: Step, done: int, total: int | None) -> None:
    """Say how far the session's reported statement is; does nothing outside `reported`."""
    progress: Progress | None = session.cache.get(_CACHE_KEY)
    if progress is not None:
        progress.report(step, done, total)


@entry_point
def evaluation_progress(session: Session, pipeline_name: str | None) -> list[dict[str, Any]]:
    """Return a row for each statement that runs now: pid, task, pipeline, version, step, percent, seconds."""
    rows = session.query(
        _RUNNING, ["bigint", "bigint", "text"], VERSION_LOCK_CLASS, STEP_LOCK_CLASS, pipeline_name
    )  # fmt: skip
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        unpacked = unpack(int(row["step"]))
        if unpacked is not None:
            # For an instant a session holds two steps: the later one counts, and steps are numbered in their order.
            task, step, percent = unpacked
            found[int(row["pid"])] = {**row, "task": task, "step": step, "percent": percent}
    return list(found.values())
