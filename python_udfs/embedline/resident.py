"""The resident worker: what it has in work, and its steps, each of which is one short transaction."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal

from embedline import backfill, claiming, documents, indexing, pressure, reach, schedule, version_queue
from embedline.batch import Batch, Unit
from embedline.catalog import Pipeline, load_active_pipelines, load_all_pipelines, load_lanes
from embedline.claiming import Claimant
from embedline.database import LOCK_NOT_AVAILABLE, UNDEFINED_TABLE, Session, quote_literal, sqlstate_of
from embedline.dead_letters import contain
from embedline.embedders import EmbeddingBlock
from embedline.engine import Engine
from embedline.pacing import Pace
from embedline.query_embedding import keep_warm
from embedline.settings import load_settings
from embedline.work import work_of

Step = Literal["begin", "claim", "is_waiting", "report", "read", "submit", "write", "abandon", "end"]

# What all batches in work may take; one more is claimed only below this.
_MEMORY = 96 * 1024 * 1024
# A model host embeds one slice after the other.
_LOCAL_DEPTH = 1
_MAINTENANCE_SECONDS = 5.0
_REPORT_SECONDS = 1.0
_WRITE_LOCK_TIMEOUT = "2s"
# Nothing is lost where these steps wait for no one: they are done again. Below deadlock_timeout, so that in a deadlock it
# is never the application that fails.
_LOCK_TIMEOUT = "200ms"
# What could not be done is tried again after so long, twice as long each time.
_PUT_OFF_SECONDS = (0.2, 10.0)
# Seconds that an idle worker measures an index before it looks for changes again.
_MEASURE_SECONDS = 0.05
_END = object()
# A batch may hold its claim this long while a rate limit lets it through little by little.
_PATIENCE_SECONDS = 60.0


class ResidentWorker:
    """State of a resident worker between its steps."""

    def __init__(self, session: Session, worker_id: int, pipeline_name: str | None) -> None:
        self.worker_id = worker_id
        self.pipeline_name = pipeline_name
        self.settings = load_settings(session)
        self.engine = Engine(session, worker_id, _PATIENCE_SECONDS)
        self.claimant = Claimant(session, worker_id, self.settings.live_share)
        self.batches: list[Batch] = []
        self.current: Batch | None = None
        self.is_ending = False
        self._paces: dict[int, Pace] = {}
        self._pipelines: list[Pipeline] = []
        # When idle, and at the latest.
        self._maintain_at, self._overdue_at = 0.0, time.monotonic() + _MAINTENANCE_SECONDS
        # The measurement of an index that is under way, and the versions that this worker has measured.
        self._measuring: tuple[reach.Measurement, Iterator[None]] | None = None
        self._seen_versions: set[int] = set()
        self._report_at = 0.0
        # Rows written of each pipeline since its tables were last analysed here.
        self._written = Counter[int]()
        # Of pipelines that fail: until when they are left alone; the last pause and the sum of all.
        self._asleep: dict[int, float] = {}
        self._pauses: dict[int, tuple[float, float]] = {}
        self._before: list[tuple[Batch, list[Unit], dict[int, int | None]]] = []
        self._held_back_by: str | None = None
        self._embedded = Counter[bool]()
        self._claim_seconds = 0.0
        self._embed_seconds = 0.0
        self._write_seconds = 0.0

    def use(self, session: Session) -> None:
        """Work in this call's session: plans and caches are shared, the Session belongs to the call."""
        self.engine.session = self.claimant.session = session

    @property
    def futures(self) -> list[Future[EmbeddingBlock]]:
        """Requests in flight, of all batches."""
        return [future for batch in self.batches for future in batch.futures]

    @property
    def has_room(self) -> bool:
        """Whether another batch may be claimed."""
        if self.claimant.is_isolating and self.batches:
            return False
        if time.monotonic() >= self._overdue_at:
            return True
        return not self._pipelines or bool(self._with_room(self._pipelines))

    @property
    def has_answers(self) -> bool:
        """Whether a write would find something to do."""
        now = time.monotonic()
        return any(self._has_work(batch, now) for batch in self.batches)

    def _has_work(self, batch: Batch, now: float) -> bool:
        return batch.write_at <= now and (
            not batch.units
            or any(unit.is_answered for unit in batch.units)
            or (bool(batch.ungranted) and (self.is_ending or batch.grant_at <= now))
        )

    def claim(self) -> str:
        """Claim the next batch; say "work", "again", "idle" or "stop"."""
        self.claimant.asking = None
        self._limit_lock_waits(_LOCK_TIMEOUT)
        if self.report() == "stop":
            return "stop"
        started = time.monotonic()
        self._load_pipelines()
        if started >= self._overdue_at:
            # There has always been something to claim, or no room. Under steady writes a backfill must end, too. What fails
            # at this is not tried again before the next claim.
            self._overdue_at = started + _MAINTENANCE_SECONDS
            self._close_backfills()
            self._maintain(started)
            return "again"
        self.current = self.claimant.claim(
            self._with_room(self._pipelines), lambda pipeline: self._pace(pipeline).rows, is_idle=not self.batches
        )
        if self.current is not None:
            self._claim_seconds = time.monotonic() - started
            self.batches.append(self.current)
            return "work"
        if self.claimant.has_removed or self._close_backfills():
            return "again"
        if started >= self._maintain_at:
            self._maintain(started)
        return "again" if self._measure() else "idle"

    def _close_backfills(self) -> bool:
        return any([self._close_backfill(pipeline) for pipeline in self._pipelines])

    def _maintain(self, now: float) -> None:
        self._maintain_at = self._overdue_at = now + _MAINTENANCE_SECONDS
        for pipeline in self._pipelines:
            self.claimant.asking = pipeline
            indexing.maintain_contained(self.engine.session, pipeline)
        keep_warm(self.engine.session, {pipeline.version.model.config.provider for pipeline in self._pipelines})

    def _measure(self) -> bool:
        """Take some steps of measuring an index that was not measured yet; return True if there are more.

        A change that comes meanwhile waits for one piece of the work, not for all of it.
        """
        if self._measuring is None:
            pipeline = next(filter(self._is_unmeasured, self._pipelines), None)
            if pipeline is None:
                return False
            self._seen_versions.add(pipeline.version.version_id)
            measurement = reach.Measurement(self.engine.session, pipeline)
            self._measuring = (measurement, measurement.steps())
        measurement, steps = self._measuring
        measurement.session = self.engine.session
        self.claimant.asking = measurement.pipeline
        if not contain(self.engine.session, measurement.pipeline, lambda: _advanced(steps)):
            self._measuring = None
        return self._measuring is not None

    def _is_unmeasured(self, pipeline: Pipeline) -> bool:
        version = pipeline.version
        is_new = version.reach is None or version.reach.ef_search is None
        return version.has_index and is_new and version.version_id not in self._seen_versions

    def _load_pipelines(self) -> None:
        session = self.engine.session
        self._pipelines = [
            *load_active_pipelines(session, self.pipeline_name),
            *load_lanes(session, self.pipeline_name),
        ]

    def _close_backfill(self, pipeline: Pipeline) -> bool:
        if pipeline.version.state != "backfilling" or pipeline.is_hidden or self._is_asleep(pipeline):
            return False
        self.claimant.asking = pipeline
        session = self.engine.session
        if pipeline.is_lane:
            return version_queue.close(session, pipeline)
        return documents.can_hold_source(session, pipeline) and backfill.close_backfill(session, pipeline)

    def _is_asleep(self, pipeline: Pipeline) -> bool:
        return self._asleep.get(pipeline.lane_id, 0.0) > time.monotonic()

    def step(self, step: Step) -> str:
        """Do one step of a batch."""
        self._limit_lock_waits(_WRITE_LOCK_TIMEOUT if step in ("write", "abandon") else _LOCK_TIMEOUT)
        if step == "abandon":
            self.abandon_current()
        elif step == "write":
            return "written" if self._write() else "waiting"
        elif self.current is not None:
            if not self._can_write(self.current.pipeline):
                return "busy"
            getattr(self.engine, step)(self.current)
        return "done"

    def _can_write(self, pipeline: Pipeline) -> bool:
        # A version's lane does not touch the source; it meets a TRUNCATE at the chunks, where the truncating statement
        # comes last.
        return documents.can_hold_source(self.engine.session, pipeline)

    def _limit_lock_waits(self, timeout: str) -> None:
        self.engine.session.execute(f"SET LOCAL lock_timeout = {quote_literal(timeout)}")

    def chunk(self, breathe: Callable[[], None]) -> None:
        """Chunk the batch that was just read; no transaction is open."""
        if self.current is not None:
            self.engine.chunk(self.current, breathe)

    def start(self) -> None:
        """Send what the transaction that was just committed has granted."""
        self._before = []
        if self.current is not None:
            self.engine.start(self.current)

    def wrote(self, seconds: float) -> None:
        """Take note of how long a write took with its commit, and of a batch that is through."""
        batch = self.current
        if batch is None:
            return
        batch.longest_write = max(batch.longest_write, seconds)
        self._pauses.pop(batch.pipeline.lane_id, None)
        if batch.units:
            return
        self.batches.remove(batch)
        self.current = None
        self._written[batch.pipeline.lane_id] += batch.embedded_count
        self._embedded[batch.pipeline.is_lane] += batch.embedded_count
        self._write_seconds = batch.longest_write
        if batch.answered_at:
            self._embed_seconds = batch.answered_at - batch.claimed_at
            self._pace(batch.pipeline).measured(len(batch.rows), self._embed_seconds, batch.longest_write)

    def is_waiting(self) -> bool:
        """Whether rows are queued that will be embedded without anybody's doing: not those that a budget holds back.

        Nor those that nobody may read.
        """
        session = self.engine.session
        able = [p for p in self._pipelines if p.lane_id not in self.claimant.out_of_money | self.claimant.hidden]
        ours = [p.name for p in able if not p.is_lane]
        lanes = [p.version.version_id for p in able if p.is_lane]
        self._limit_lock_waits(_LOCK_TIMEOUT)
        try:
            found = session.scalar(
                "SELECT EXISTS (SELECT FROM embedline.version_queue WHERE version_id = ANY ($2)) OR ("
                "SELECT bool_or(pending > 0 OR backfill_done < backfill_total) FROM embedline.status"
                " WHERE state <> 'paused' AND pipeline = ANY ($1))",
                ["text[]", "bigint[]"],
                ours,
                lanes,
            )
        except Exception as error:
            # Somebody has locked a table of it; then there will be something to look at.
            if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
                raise
            return True
        return bool(found)

    def undo(self) -> None:
        """Forget what a step did here whose transaction was rolled back; the answers are kept, for they are paid for."""
        for batch, units, tokens_used in self._before:
            batch.units, batch.tokens_used = units, tokens_used
            for request in batch.requests:
                if request.future is None:
                    request.is_granted, request.reservation_id = False, None
        self._before = []

    def put_off_write(self) -> bool:
        """Write the batch in work later; False where that has been tried for long enough."""
        batch = self.current
        if batch is None or batch not in self.batches:
            return False
        pause, total = self._next_pause(batch.pipeline)
        batch.write_at = time.monotonic() + pause
        return total < _PATIENCE_SECONDS

    def put_off(self, pipeline: Pipeline) -> None:
        """Claim nothing of a pipeline for a while: something about it fails, and the others must not wait for it."""
        pause, _ = self._next_pause(pipeline)
        self._asleep[pipeline.lane_id] = time.monotonic() + pause

    def _next_pause(self, pipeline: Pipeline) -> tuple[float, float]:
        """Return the seconds to wait after another failure of a pipeline in a row, and all seconds waited with them."""
        shortest, longest = _PUT_OFF_SECONDS
        last, total = self._pauses.get(pipeline.lane_id, (0.0, 0.0))
        pause = min(max(2 * last, shortest), longest)
        self._pauses[pipeline.lane_id] = pause, total + pause
        return pause, total + pause

    def abandon_current(self) -> None:
        """Give back the claim of the batch that failed, uncounted."""
        batch = self.current
        if batch is None:
            return
        claiming.release_batch(self.engine.session, batch, self.worker_id)
        self.forget_current()

    def forget_current(self) -> None:
        """Go on without the batch that failed, and leave its pipeline alone for a while."""
        batch = self.current
        if batch is None:
            return
        self.put_off(batch.pipeline)
        if batch in self.batches:
            self.batches.remove(batch)
            self._embedded[batch.pipeline.is_lane] += batch.embedded_count
        for future in batch.futures:
            future.cancel()
        self.current = None
        if not self.batches:
            self.claimant.end_isolation()

    def release_all(self) -> None:
        """Give every claim of this worker back, uncounted. What cannot be had now is taken over later, as a dead worker's."""
        self._limit_lock_waits(_WRITE_LOCK_TIMEOUT)
        for pipeline in load_all_pipelines(self.engine.session):
            try:
                claiming.release_all(self.engine.session, pipeline, self.worker_id)
            except Exception as error:
                if sqlstate_of(error) not in (LOCK_NOT_AVAILABLE, UNDEFINED_TABLE):
                    raise
        version_queue.release(self.engine.session, self.worker_id)
        for future in self.futures:
            future.cancel()
        self.batches, self.current = [], None
        self.claimant.end_isolation()

    def note_error(self, message: str) -> None:
        """Show an error of the batch in work in embedline.status."""
        if self.current is not None:
            work_of(self.current).note_error(self.engine.session, self.current, message)

    def _write(self) -> bool:
        now = time.monotonic()
        self._before = [(batch, list(batch.units), dict(batch.tokens_used)) for batch in self.batches]
        for batch in self.batches:
            if not self._has_work(batch, now):
                continue
            self.current = batch
            if not self._can_write(batch.pipeline):
                batch.write_at = now + _PUT_OFF_SECONDS[0]
                continue
            wrote = False
            if batch.ungranted and self.is_ending:
                self.engine.give_back_waiting(batch, "the worker ended while a rate limit held the row back")
                wrote = True
            if batch.ungranted and batch.grant_at <= now:
                self.engine.grant(batch)
                wrote = True
            wrote = self.engine.write_ready(batch) or wrote
            if not batch.units:
                self.engine.finish(batch)
                if batch.is_suspect:
                    self.claimant.end_isolation()
                return True
            if wrote:
                return True
        return False

    def _with_room(self, pipelines: list[Pipeline]) -> list[Pipeline]:
        """Return the pipelines whose model is not busy with what it has: a slow provider holds nobody else up."""
        if sum(batch.memory for batch in self.batches) >= _MEMORY:
            return []
        waiting, batches = Counter[int](), Counter[int]()
        for batch in self.batches:
            model_id = batch.pipeline.version.model.model_id
            batches[model_id] += 1
            waiting[model_id] += max(
                sum(not request.is_answered for request in batch.requests), 1 if batch is self.current else 0
            )

        def has_room(pipeline: Pipeline) -> bool:
            model = pipeline.version.model
            # As many requests again wait behind those in work: the provider never runs dry while the next batch is read.
            return waiting[model.model_id] < 2 * _depth(pipeline) and batches[model.model_id] <= _depth(pipeline)

        return [pipeline for pipeline in pipelines if has_room(pipeline) and not self._is_asleep(pipeline)]

    def _pace(self, pipeline: Pipeline) -> Pace:
        return self._paces.setdefault(pipeline.lane_id, Pace(self.settings))

    @property
    def embedded(self) -> str:
        """What this worker has embedded, in words."""
        rows, chunks = self._embedded[False], self._embedded[True]
        words = f"{rows:,} row{'' if rows == 1 else 's'} embedded"
        return words if not chunks else f"{words}, {chunks:,} chunk{'' if chunks == 1 else 's'} of versions filled"

    @property
    def is_report_due(self) -> bool:
        """Whether the server has not been looked at for a second."""
        return time.monotonic() >= self._report_at

    def report(self) -> str:
        """Ask whether to stop; once a second look at the server's state and show in embedline.worker what goes on."""
        session = self.engine.session
        if session.scalar(
            "SELECT stop_requested FROM embedline.worker WHERE worker_id = $1", ["integer"], self.worker_id
        ):
            return "stop"
        if not self.is_report_due:
            return "done"
        self._report_at = time.monotonic() + _REPORT_SECONDS
        schedule.let_launcher_breathe(session)
        settings = load_settings(session)
        if settings != self.settings:
            self.settings, self._paces = settings, {}
            self.claimant.set_live_share(settings.live_share)
        # Whose model has room is asked of these: a pipeline may have come while all others' models are busy.
        self._load_pipelines()
        self._held_back_by = pressure.held_back_by(session, settings)
        if self._held_back_by is not None:
            for pace in self._paces.values():
                pace.slow_down()
        for pipeline in self._pipelines:
            if documents.analyze_grown(session, pipeline, self._written[pipeline.lane_id]):
                self._written[pipeline.lane_id] = 0
        session.query(
            """
            UPDATE embedline.worker SET batch_rows = $2, requests_in_flight = $3, claim_seconds = $4, embed_seconds = $5,
                write_seconds = $6, held_back_by = $7, reported_at = clock_timestamp()
            WHERE worker_id = $1
            """,
            ["integer", "integer", "integer", "real", "real", "real", "text"],
            self.worker_id,
            max((pace.rows for pace in self._paces.values()), default=None),
            len(self.futures),
            self._claim_seconds,
            self._embed_seconds,
            self._write_seconds,
            self._held_back_by,
        )
        return "done"


def _depth(pipeline: Pipeline) -> int:
    """Requests that the model works on at a time."""
    config = pipeline.version.model.config
    return _LOCAL_DEPTH if config.provider == "sentence-transformers" else config.concurrency


def _advanced(steps: Iterator[None]) -> bool:
    """Take steps for as long as one poll may; return True if there are more."""
    until = time.monotonic() + _MEASURE_SECONDS
    while time.monotonic() < until:
        if next(steps, _END) is _END:
            return False
    return True
