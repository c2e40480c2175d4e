"""Check how well searches find.

A caller gets all at once, a worker takes steps between other work.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, Literal

from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import caller, require_control
from embedline.catalog.values import Pipeline
from embedline.core.processes import prepare_environment
from embedline.errors import EmbedlineError, NotReady
from embedline.observe.quality_due import OF_ROWS, Task, due_tasks, keep_sample
from embedline.observe.quality_measures import MEASURES, Measure, Steps
from embedline.observe.quality_series import KINDS, Kind, Measured, record, record_error
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import QUALITY_LOCK_CLASS
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

# Seconds of one step of a worker, which may have changes to embed meanwhile.
_STEP_SECONDS = 0.05
# Seconds for which a worker does not try again a measure that does not apply, or that another session takes.
_SKIP_SECONDS = 3600.0
_CHECK_KEY, _SKIPPED_KEY = "embedline.quality_check", "embedline.quality_skipped"
_FOREIGN_KEY_VIOLATION = "23503"
_CHECKABLE = """
    SELECT p.name, p.pipeline_id FROM embedline.pipeline AS p
    JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    WHERE p.state = 'active' AND v.state = 'complete' AND ($1 IS NULL OR p.name = $1) ORDER BY p.name
"""
_ACCEPT = """
    WITH last AS (
        SELECT DISTINCT ON (q.kind) q.kind, q.value FROM embedline.quality_check AS q
        WHERE q.pipeline_id = $1 AND q.error IS NULL AND q.kind IN ('canary', 'reach', 'fidelity')
        ORDER BY q.kind, q.measured_at DESC
    ), recalls AS (
        UPDATE embedline.canary SET baseline_recall = last_recall WHERE pipeline_id = $1
    ), probes AS (
        DELETE FROM embedline.drift_probe AS d USING embedline.version AS v
        WHERE v.version_id = d.version_id AND v.pipeline_id = $1
    ), accepted AS (
        UPDATE embedline.quality_check SET is_poor = false WHERE kind <> 'lag' AND is_poor AND check_id IN (
            SELECT DISTINCT ON (q.kind) q.check_id FROM embedline.quality_check AS q
            WHERE q.pipeline_id = $1 AND q.error IS NULL ORDER BY q.kind, q.measured_at DESC)
    )
    INSERT INTO embedline.quality_baseline (pipeline_id, kind, value, accepted_by)
    SELECT $1, l.kind, l.value, $2 FROM last AS l
    ON CONFLICT (pipeline_id, kind) DO UPDATE SET value = excluded.value, set_at = clock_timestamp(),
        accepted_by = excluded.accepted_by
"""

Progress = Literal["more", "done", "idle"]


class Check:
    """A check of one pipeline under way; `rows` are its results."""

    def __init__(self, session: Session, pipeline: Pipeline, kinds: Collection[Kind]) -> None:
        self._session, self._pipeline, self._kinds = session, pipeline, frozenset(kinds)
        self._waiting = [(measure, given) for measure, given in MEASURES if self._kinds.intersection(given)]
        self._steps: Steps | None = None
        self._under_way: frozenset[Kind] = frozenset()
        self._seconds = 0.0
        # Only these tell what a change of many rows did.
        self._sampled = not self._kinds.intersection(OF_ROWS)
        self.rows: list[dict[str, Any]] = []

    @property
    def skipped(self) -> set[Kind]:
        """Return the kinds of which nothing was kept."""
        return set(self._kinds) - {row["kind"] for row in self.rows}

    def advance(self) -> bool:
        """Take one step; return True if there are more.

        A measure that fails is noted in the series, and the others go on.
        """
        started = time.monotonic()
        try:
            with self._session.plpy.subtransaction():
                if not self._sampled:
                    self._sampled = True
                    keep_sample(self._session, self._pipeline)
                if self._steps is None:
                    if not self._waiting:
                        return False
                    self._begin(*self._waiting.pop(0))
                is_over = self._take_step()
        except (self._session.plpy.SPIError, EmbedlineError) as error:
            if sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] == "40":
                raise
            self._note_failure(error)
            is_over = True
        self._seconds += time.monotonic() - started
        if is_over:
            self._steps = None
        return not is_over or bool(self._waiting)

    def _begin(self, measure: Measure, given: tuple[Kind, ...]) -> None:
        self._under_way, self._seconds = self._kinds.intersection(given), 0.0
        self._steps = measure(self._session, self._pipeline, self._under_way)

    def _take_step(self) -> bool:
        assert self._steps is not None
        try:
            next(self._steps)
        except StopIteration as end:
            measured: list[Measured] = end.value
            self.rows += [
                record(self._session, self._pipeline, m, self._seconds) for m in measured if m.kind in self._kinds
            ]
            return True
        return False

    def _note_failure(self, error: Exception) -> None:
        message = str(error).removeprefix("spiexceptions.")
        try:
            with self._session.plpy.subtransaction():
                for kind in sorted(self._under_way):
                    self.rows.append(record_error(self._session, self._pipeline, kind, message, self._seconds))
        except self._session.plpy.SPIError as failed:
            # The pipeline or the version was dropped meanwhile.
            if sqlstate_of(failed) != _FOREIGN_KEY_VIOLATION:
                raise


@entry_point
def check_quality(session: Session, pipeline_name: str | None, only_due: bool | None) -> list[dict[str, Any]]:
    """Measure a pipeline, or all, and keep the results; return them.

    Kinds that do not apply are left out. A pipeline that another session checks now is left out, too.
    """
    prepare_environment()
    if pipeline_name is not None:
        pipeline = load_pipeline(session, pipeline_name)
        if not only_due:
            _require_checkable(session, pipeline)
    rows: list[dict[str, Any]] = []
    for task in list(due_tasks(session, pipeline_name)) if only_due else _all_tasks(session, pipeline_name):
        if not _lock(session, task.pipeline_id):
            session.plpy.notice(f'embedline: another session checks pipeline "{task.pipeline_name}" now')
            continue
        try:
            check = Check(session, load_pipeline(session, task.pipeline_name), task.kinds)
            while check.advance():
                pass
        finally:
            _unlock(session, task.pipeline_id)
        rows += check.rows
    return rows


@entry_point
def quality_step(session: Session, pipeline_name: str | None, is_last: bool | None) -> Progress:
    """Check a part of what is due.

    Returns "more" within a check, "done" at its end, and "idle" if nothing was due.

    A resident worker calls it between other work. At its end `is_last` releases the check under way.
    """
    under_way: tuple[Task, Check] | None = session.cache.get(_CHECK_KEY)
    if is_last:
        if under_way is not None:
            _finish(session, under_way[0])
        return "idle"
    if under_way is None:
        under_way = _next(session, pipeline_name)
        if under_way is None:
            return "idle"
        session.cache[_CHECK_KEY] = under_way
    task, check = under_way
    until = time.monotonic() + _STEP_SECONDS
    try:
        while time.monotonic() < until:
            if not check.advance():
                _skip(session, task, check.skipped)
                _finish(session, task)
                return "done"
    except BaseException:
        _finish(session, task)
        raise
    return "more"


@entry_point
def accept_quality(session: Session, pipeline_name: str) -> None:
    """Make the last measurements the baseline, and the present model the reference."""
    require_control(session, pipeline_name)
    pipeline_id = load_pipeline(session, pipeline_name).pipeline_id
    session.query(_ACCEPT, ["bigint", "name"], pipeline_id, caller(session))


def _require_checkable(session: Session, pipeline: Pipeline) -> None:
    if not session.query(_CHECKABLE, ["text"], pipeline.name):
        raise NotReady(
            f'pipeline "{pipeline.name}" is paused, or its first backfill is not complete',
            hint=f"SELECT state, backfill_percent FROM embedline.status WHERE pipeline = '{pipeline.name}';",
        )


def _all_tasks(session: Session, pipeline_name: str | None) -> list[Task]:
    rows = session.query(_CHECKABLE, ["text"], pipeline_name)
    return [Task(str(row["name"]), int(row["pipeline_id"]), frozenset(KINDS)) for row in rows]


def _next(session: Session, pipeline_name: str | None) -> tuple[Task, Check] | None:
    skipped: dict[tuple[int, Kind], float] = session.cache.setdefault(_SKIPPED_KEY, {})
    for task in due_tasks(session, pipeline_name):
        now = time.monotonic()
        kinds = frozenset(kind for kind in task.kinds if skipped.get((task.pipeline_id, kind), 0.0) <= now)
        if kinds and _lock(session, task.pipeline_id):
            return task, Check(session, load_pipeline(session, task.pipeline_name), kinds)
    return None


def _skip(session: Session, task: Task, kinds: Collection[Kind]) -> None:
    skipped: dict[tuple[int, Kind], float] = session.cache.setdefault(_SKIPPED_KEY, {})
    skipped.update({(task.pipeline_id, kind): time.monotonic() + _SKIP_SECONDS for kind in kinds})


def _finish(session: Session, task: Task) -> None:
    session.cache.pop(_CHECK_KEY, None)
    _unlock(session, task.pipeline_id)


def _lock(session: Session, pipeline_id: int) -> bool:
    return bool(
        session.scalar("SELECT pg_try_advisory_lock($1, $2)", ["integer", "integer"], QUALITY_LOCK_CLASS, pipeline_id)
    )


def _unlock(session: Session, pipeline_id: int) -> None:
    session.query("SELECT pg_advisory_unlock($1, $2)", ["integer", "integer"], QUALITY_LOCK_CLASS, pipeline_id)
