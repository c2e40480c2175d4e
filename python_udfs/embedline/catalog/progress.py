"""Report the progress of a long statement to its client and to other sessions.

The client gets notices. Other sessions read locks, because they would see a written row only after the commit. Session
advisory locks are visible at once, need no right, and end with the session. A statement holds two shared ones: the
version it works on, and the step with its share.
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

Task = Literal["evaluate", "preview_version", "compare_chunkings"]
Step = Literal[
    "reading the queries",
    "embedding the queries",
    "ranking the queries",
    "reading all vectors",
    "measuring the index",
    "timing the embedding",
    "embedding a sample",
]

# The second key of a step is task, step, and the finished share in thousandths. The last value means an unknown share.
_STEP_UNIT, _TASK_UNIT = 1 << 10, 1 << 15
_UNKNOWN_SHARE = _STEP_UNIT - 1

# Seconds between two changes of the locks, below the resolution of a progress bar.
_PUBLISH_SECONDS = 0.2
# Seconds of silence before a notice: after a statement or a step began, and within a step.
_FIRST_NOTICE_SECONDS = 2.0
_NOTICE_SECONDS = 10.0
_CACHE_KEY = "embedline.progress"

_LOCK = "SELECT pg_try_advisory_lock_shared($1, $2)"
_UNLOCK = "SELECT pg_advisory_unlock_shared($1, $2)"
_LOCK_TYPES = ("integer", "integer")
# A session that ended with an error keeps its locks until its next statement of this kind. Then it is not active.
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
    """The progress of one statement; `clock` gives seconds."""

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
        """Report that `done` of `total` of a step are done.

        It may be called at any rate, because locks and notices have intervals of their own.
        """
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
        # Take the new lock first, so that a reader always finds one.
        self._hold(STEP_LOCK_CLASS, key)
        for held in before:
            self._held.remove(held)
            self._session.query(_UNLOCK, _LOCK_TYPES, *held)

    def _hold(self, lock_class: int, key: int) -> bool:
        # Refused only if another session holds this very key exclusively. Then nothing is shown, instead of waiting.
        is_held = bool(self._session.scalar(_LOCK, _LOCK_TYPES, lock_class, key))
        if is_held:
            self._held.append((lock_class, key))
        return is_held


def pack(task: Task, step: Step, share: float | None) -> int:
    """Return a task, its step and its finished share as the key of a lock.

    The share is None if it is not known.
    """
    thousandths = _UNKNOWN_SHARE if share is None else round(1000 * min(max(share, 0.0), 1.0))
    return get_args(Task).index(task) * _TASK_UNIT + get_args(Step).index(step) * _STEP_UNIT + thousandths


def unpack(key: int) -> tuple[str, str, float | None] | None:
    """Return task, step and percentage of a lock's key, None for a foreign key."""
    task, rest = divmod(key, _TASK_UNIT)
    step, thousandths = divmod(rest, _STEP_UNIT)
    if task >= len(get_args(Task)) or step >= len(get_args(Step)):
        return None
    return get_args(Task)[task], get_args(Step)[step], None if thousandths > 1000 else thousandths / 10


@contextmanager
def reported(session: Session, task: Task, pipeline: Pipeline) -> Iterator[None]:
    """Report the block's progress to the client and to other sessions."""
    _close(session)
    session.cache[_CACHE_KEY] = Progress(session, task, pipeline)
    try:
        yield
    finally:
        # An error of the block itself must be the one that is raised.
        with contextlib.suppress(Exception):
            _close(session)


def _close(session: Session) -> None:
    # Remove locks that a cancelled statement left behind in this session.
    progress: Progress | None = session.cache.pop(_CACHE_KEY, None)
    if progress is not None:
        progress.close()


def report(session: Session, step: Step, done: int, total: int | None) -> None:
    """Report the progress of the session's statement; does nothing outside `reported`."""
    progress: Progress | None = session.cache.get(_CACHE_KEY)
    if progress is not None:
        progress.report(step, done, total)


@entry_point
def evaluation_progress(session: Session, pipeline_name: str | None) -> list[dict[str, Any]]:
    """Return a row for each statement that runs now.

    Columns: pid, task, pipeline, version, step, percent, seconds.
    """
    rows = session.query(
        _RUNNING, ["bigint", "bigint", "text"], VERSION_LOCK_CLASS, STEP_LOCK_CLASS, pipeline_name
    )  # fmt: skip
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        unpacked = unpack(int(row["step"]))
        if unpacked is not None:
            # For an instant a session holds two steps. The later one counts, and steps are numbered in their order.
            task, step, percent = unpacked
            found[int(row["pid"])] = {**row, "task": task, "step": step, "percent": percent}
    return list(found.values())
