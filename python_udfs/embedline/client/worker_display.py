"""Show the progress of `embedline worker`, and its results at the end.

The results are the work done and the rows that could not be embedded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from embedline.client.build_index import Execute
from embedline.client.live_display import Line
from embedline.core.sql_text import quote_literal

_PIPELINES = """
    SELECT s.pipeline, s.pending, s.backfill_percent::float8, s.backfill_complete, s.last_error, s.dead_letters,
        s.backfill_total - s.backfill_done, c.reltuples::float8, c.relpages,
        pg_relation_size(c.oid) / current_setting('block_size')::integer, c.oid::regclass::text
    FROM embedline.status AS s JOIN embedline.pipeline AS p ON p.name = s.pipeline JOIN pg_class AS c ON c.oid = p.source
    WHERE s.state NOT IN ('paused', 'source gone') AND (s.pipeline = {name} OR {name} IS NULL) ORDER BY s.pipeline
"""
_VERSIONS = """
    SELECT v.pipeline, v.version, v.missing - v.dead_letters, v.dead_letters - v.accepted, v.last_error, v.state
    FROM embedline.versions AS v JOIN embedline.status AS s USING (pipeline)
    WHERE NOT v.serving AND s.state NOT IN ('paused', 'source gone') AND (v.pipeline = {name} OR {name} IS NULL) ORDER BY 1, 2
"""
_READABLE = "SELECT has_table_privilege({table}, 'SELECT')"
_CIRCUITS = """
    SELECT m.name, c.last_error FROM embedline.circuit AS c JOIN embedline.model AS m USING (model_id)
    WHERE c.open_until > clock_timestamp() ORDER BY 1
"""
# The last notice of embedline.run_worker.
_EMBEDDED = re.compile(r"embedline worker: (([\d,]+) rows? embedded.*)")


@dataclass(frozen=True)
class _Size:
    """The source in blocks, rows and pages.

    `blocks` are those that the backfill has not read; `tuples` and `pages` are of its last ANALYZE.
    """

    blocks: int
    tuples: float
    pages: int
    pages_now: int


@dataclass(frozen=True)
class Task:
    """The remaining work of a pipeline, or of a version that is filled.

    `left` is None if it is not known.
    """

    name: str
    unit: str
    left: int | None
    is_estimate: bool
    percent: float | None
    last_error: str | None
    dead_letters: int
    remedy: str

    @property
    def is_done(self) -> bool:
        """Return True if nothing waits."""
        return self.left == 0


class WorkerDisplay:
    """Follow the queues from a second session."""

    def __init__(self, pipeline: str | None) -> None:
        self._name = "NULL" if pipeline is None else quote_literal(pipeline).strip()
        self._began = time.monotonic()
        self._first: dict[str, int] = {}
        # The planner's rows of each source that was never analysed, None if they are not known either.
        self._planned: dict[str, float | None] = {}
        # The worker's own count, in words, and its rows.
        self._embedded, self._rows_embedded = "no row embedded", 0

    def hear(self, notice: str) -> bool:
        """Record the worker's last notice; return True if this was it."""
        found = _EMBEDDED.search(notice)
        if found:
            self._embedded, self._rows_embedded = found.group(1), int(found.group(2).replace(",", ""))
        return found is not None

    def look(self, execute: Execute) -> list[Line]:
        """Return a line for each pipeline and version with remaining work."""
        return [self._line(task) for task in self.tasks(execute) if not task.is_done or task.name in self._first]

    def tasks(self, execute: Execute) -> list[Task]:
        """Return the remaining work now."""
        return [*self._pipelines(execute), *self._versions(execute)]

    def _pipelines(self, execute: Execute) -> list[Task]:
        found = []
        for name, pending, percent, is_complete, error, dead, *counts, source in execute(
            _PIPELINES.format(name=self._name)
        ):
            unread: float | None = (
                0.0 if is_complete else self._unread(execute, source, 1 - percent / 100, _Size(*counts))
            )
            # The last rows are counted when the backfill is closed.
            left = None if unread is None else max(int(pending + unread), 0 if is_complete else 1)
            remedy = f"SELECT embedline.requeue({quote_literal(name)});"
            found.append(Task(name, "rows", left, not is_complete, float(percent), error, int(dead), remedy))
        return found

    def _unread(self, execute: Execute, source: str, share: float, size: _Size) -> float | None:
        """Return about how many rows the backfill has not read, None if unknown.

        They are in the blocks that it has not read.
        """
        if size.tuples >= 0 and size.pages > 0:
            return float(size.blocks) * size.tuples / size.pages
        rows = size.tuples if size.tuples >= 0 else self._rows(execute, source)
        if rows is None:
            return None
        # A partitioned table has no pages of its own.
        return rows * (min(size.blocks / size.pages_now, 1.0) if size.pages_now else share)

    def _rows(self, execute: Execute, source: str) -> float | None:
        if source not in self._planned:
            try:
                plan = execute(f"EXPLAIN (FORMAT json) SELECT FROM {source}")[0][0]
                self._planned[source] = float(plan[0]["Plan"]["Plan Rows"])
            except Exception:
                # A worker's role need not be allowed to read the source.
                self._planned[source] = None
        return self._planned[source]

    def _versions(self, execute: Execute) -> list[Task]:
        found = []
        for name, number, missing, dead, error, state in execute(_VERSIONS.format(name=self._name)):
            left = max(int(missing), 0 if state == "complete" else 1)
            remedy = f"SELECT embedline.requeue_version({quote_literal(name)}, {number});"
            found.append(Task(f"{name} v{number}", "chunks", left, False, None, error, max(int(dead), 0), remedy))
        return found

    def _line(self, task: Task) -> Line:
        error = f"; {task.last_error}" if task.last_error else ""
        if task.left is None:
            share = None if task.percent is None else task.percent / 100
            return Line(task.name, f"{task.percent or 0:.0f} % of the source is read{error}", share)
        first = self._first[task.name] = max(self._first.get(task.name, task.left), task.left)
        done, about = first - task.left, "about " if task.is_estimate else ""
        parts = [f"{done:,} {task.unit} done, {about}{task.left:,} left"]
        seconds = time.monotonic() - self._began
        if done > 0 and task.left and seconds > 0:
            rate = done / seconds
            parts += [f"{rate:,.1f}/s" if rate < 10 else f"{rate:,.0f}/s", f"{duration(task.left / rate)} to go"]
        return Line(task.name, ", ".join(parts) + error, done / first if first else 1.0)

    def summary(self, tasks: Sequence[Task]) -> str:
        """Return the work done, in one line."""
        seconds = time.monotonic() - self._began
        rate = f" ({self._rows_embedded / seconds:,.0f} rows/s)" if self._rows_embedded and seconds > 0 else ""
        waiting = [task for task in tasks if not task.is_done]
        end = "nothing is left to embed" if not waiting else f"not done: {', '.join(task.name for task in waiting)}"
        return f"{self._embedded} in {duration(seconds)}{rate}; {end}"


def troubles(execute: Execute, tasks: Sequence[Task]) -> list[str]:
    """Return the failures, each with the statement to run."""
    found = []
    for task in tasks:
        if task.dead_letters:
            table = "version_dead_letter" if task.unit == "chunks" else "dead_letter"
            found.append(
                f"{task.name}: {_counted(task.dead_letters, task.unit)} could not be embedded\n"
                f"HINT: SELECT * FROM embedline.{table}; says why. Once that is mended: {task.remedy}"
            )
        if not task.is_done:
            left = "rows" if task.left is None else _counted(task.left, task.unit)
            about = "about " if task.is_estimate and task.left is not None else ""
            reason = f"; last error: {task.last_error}" if task.last_error else ""
            found.append(
                f"{task.name}: not done, left: {about}{left}{reason}\n"
                "HINT: SELECT pipeline, pending, last_error FROM embedline.status; shows what they wait for."
            )
    if execute(_READABLE.format(table="'embedline.circuit'"))[0][0]:
        found += [
            f'model "{model}" is left alone for now, since its provider fails: {error}\n'
            "HINT: SELECT * FROM embedline.circuit; says until when."
            f" SELECT embedline.resume_model({quote_literal(model)}); ends the wait. Then run the worker again."
            for model, error in execute(_CIRCUITS)
        ]
    return found


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


def duration(seconds: float) -> str:
    """Return seconds as a person says them, such as 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
