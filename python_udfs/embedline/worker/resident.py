"""The resident worker: what it has in work, and its steps, each of which is one short transaction."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import Literal

from embedline.catalog.health import contain, forget_fault, note_fault
from embedline.catalog.load import Pipeline, load_all_pipelines, load_some
from embedline.catalog.settings import load_settings
from embedline.core.embedding import EmbeddingBlock
from embedline.core.sql_text import quote_literal
from embedline.documents import documents
from embedline.models.query_embedding import keep_warm
from embedline.postgres.session import LOCK_NOT_AVAILABLE, UNDEFINED_TABLE, Session, sqlstate_of
from embedline.queue import backfill, chunk_queue, signals
from embedline.search.index_recall import Measurement
from embedline.worker import backpressure
from embedline.worker import claim as claims
from embedline.worker.batch import Batch, Unit
from embedline.worker.batch_size import Pace
from embedline.worker.claim import Claimant, release_batch
from embedline.worker.engine import Engine
from embedline.worker.index_maintenance import maintain_contained, unfinished
from embedline.worker.schedule import let_launcher_breathe
from embedline.worker.sources import work_of

Step = Literal["begin", "claim", "fault", "is_waiting", "report", "read", "submit", "write", "abandon", "end"]

# A statement that ran into a lock, a deadlock or a full disk is tried again: the answers are paid for and at hand.
PASSING_FAULTS = ("40001", "40P01", "53100", "53200", "53300", LOCK_NOT_AVAILABLE)
# Faults of a pipeline in a row after which `until_idle` does not wait for it: no one can tell that it will ever pass.
_LASTING_FAULTS = 3

# What all batches in work may take; one more is claimed only below this.
_MEMORY = 96 * 1024 * 1024
# A model host embeds one slice after the other.
_LOCAL_DEPTH = 1
_MAINTENANCE_SECONDS = 5.0
# Pipelines that one claim loads and looks at, of which the first mostly has work; and pipelines that are maintained together.
# The locks of their tables are held together.
_CANDIDATES, _MAINTAINED = 8, 32
# Pipelines that nothing was written to are maintained one after the other; each round takes this many times as long.
_ROUND_COST = 200
_REPORT_SECONDS = 1.0
_WRITE_LOCK_TIMEOUT = "2s"
# Nothing is lost where these steps wait for no one: they are done again. Below deadlock_timeout, so that in a deadlock it
# is never the application that fails.
_LOCK_TIMEOUT = "200ms"
# What could not be done is tried again after so long, twice as long each time.
_PUT_OFF_SECONDS = (0.2, 10.0)
# What a token and a row have, in bytes of content, if nothing is known of them: English, and two chunks.
_BYTES_A_TOKEN, _LIKELY_ROW_BYTES = 4, 2000
# Seconds that an idle worker measures an index before it looks for changes again.
_MEASURE_SECONDS = 0.05
_END = object()
# Whether something waits in an active pipeline of that name, or any, apart from those pipelines and versions.
_IS_WAITING = """
    WITH served AS MATERIALIZED (
        SELECT p.pipeline_id, p.name FROM embedline.pipeline AS p JOIN pg_class AS c ON c.oid = p.source
        WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1)
    )
    SELECT EXISTS (
        SELECT FROM embedline.version_queue AS q JOIN embedline.version AS v ON v.version_id = q.version_id
        JOIN served AS p ON p.pipeline_id = v.pipeline_id WHERE q.version_id <> ALL ($3)
    ) OR (
        SELECT bool_or(s.pending > 0 OR s.backfill_done < s.backfill_total) FROM embedline.status AS s
        WHERE s.pipeline IN (SELECT name FROM served) AND s.pipeline <> ALL ($2)
    )
"""
_DEPTHS = """
    SELECT DISTINCT m.model_id, m.provider, m.concurrency
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
    JOIN embedline.model AS m ON m.model_id = v.model_id
    WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1)
"""
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
        # Pipelines that were looked at last, and all that were ever loaded.
        self._pipelines: list[Pipeline] = []
        self._known: dict[int, Pipeline] = {}
        # Those of the claim that goes on, and all since the last one that found nothing anywhere.
        self._candidates: list[int] = []
        self._looked_at: set[int] = set()
        # Models of the pipelines, and how many requests each works on at a time.
        self._depths: dict[int, int] = {}
        self._providers: set[str] = set()
        # When idle, and at the latest.
        self._maintain_at, self._overdue_at = 0.0, time.monotonic() + _MAINTENANCE_SECONDS
        # Pipelines to maintain: those written to, and a round of all.
        self._touched: set[int] = set()
        self._round: list[int] = []
        self._visit_at = 0.0
        self._unmeasured: list[Pipeline] = []
        # The measurement of an index that is under way, and the versions that this worker has measured.
        self._measuring: tuple[Measurement, Iterator[None]] | None = None
        self._seen_versions: set[int] = set()
        self._report_at = 0.0
        # Rows written of each pipeline since its tables were last analysed here.
        self._written = Counter[int]()
        # Of pipelines that fail: until when they are left alone; the last pause and the sum of all.
        self._asleep: dict[int, float] = {}
        self._pauses: dict[int, tuple[float, float]] = {}
        # Of each pipeline: faults in a row that do not pass by themselves.
        self._faults = Counter[int]()
        self._noted: set[int] = set()
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
        if time.monotonic() >= self._overdue_at or not self._depths:
            return True
        return any(self._models_with_room())

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
            or (self.is_ending and self.engine.has_search(batch))
        )

    def claim(self) -> str:
        """Claim the next batch; say "work", "again", "idle" or "stop"."""
        session, self.claimant.asking = self.engine.session, None
        self._limit_lock_waits(_LOCK_TIMEOUT)
        asked = signals.ask(session, self.worker_id, self.pipeline_name)
        if asked.is_to_stop:
            return "stop"
        if self.is_report_due:
            self._report()
        if asked.has_dead:
            signals.note_dead_workers(session)
            return "again"
        started = time.monotonic()
        is_through = self._load_candidates(asked)
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
        self._forget_faults()
        self._note_looks(is_through=is_through)
        if self.current is not None:
            self._claim_seconds = time.monotonic() - started
            self.current.max_bytes = self._pace(self.current.pipeline).bytes
            self._touched.add(self.current.pipeline.pipeline_id)
            self.batches.append(self.current)
            return "work"
        self._clear_signals(asked)
        if self.claimant.has_removed or self._close_backfills() or not is_through:
            return "again"
        if started >= self._maintain_at or (self._round and started >= self._visit_at):
            self._maintain(started)
        return "again" if self._measure() else "idle"

    def _load_candidates(self, asked: signals.Asked) -> bool:
        """Load the pipelines to look at now; return False if there are more than one claim looks at."""
        # Those that had nothing, or are blocked, are not looked at again before all others were.
        wanted = [i for i in asked.lane_ids if i not in self._looked_at and not self._is_asleep(i)]
        ordered = self.claimant.order(wanted)
        self._pipelines, self._candidates = [], []
        while ordered and not self._with_room(self._pipelines):
            chosen, ordered = ordered[:_CANDIDATES], ordered[_CANDIDATES:]
            self._pipelines = self._load(chosen)
            self._candidates += chosen
        return not ordered

    def _note_looks(self, *, is_through: bool) -> None:
        """Take note of what a claim has looked at, once it has not failed."""
        # A signal of a pipeline in which nothing waited is a new one.
        self._looked_at |= set(self._candidates) - {pipeline.lane_id for pipeline in self.claimant.quiet}
        if is_through or self.current is not None:
            self._looked_at = set()

    def _load(self, lane_ids: Collection[int]) -> list[Pipeline]:
        found = load_some(self.engine.session, lane_ids)
        self._known |= {pipeline.lane_id: pipeline for pipeline in found}
        return found

    def _clear_signals(self, asked: signals.Asked) -> None:
        for pipeline in self.claimant.quiet:
            if pipeline.pipeline_id in asked.signalled:
                self.claimant.asking = pipeline
                signals.clear(self.engine.session, pipeline, asked.at, asked.live)

    def _close_backfills(self) -> bool:
        return any([self._close_backfill(pipeline) for pipeline in self._pipelines])

    def _maintain(self, now: float) -> None:
        """Maintain the indexes of pipelines that were written to, and one of the round of all others.

        That round takes as long as its cost allows: of 1,000 pipelines each is visited every few minutes.
        """
        session = self.engine.session
        due: list[int] = []
        if now >= self._maintain_at:
            self._maintain_at = self._overdue_at = now + _MAINTENANCE_SECONDS
            self._touched |= set(unfinished(session, self.pipeline_name))
            due = sorted(self._touched)[:_MAINTAINED]
            if not self._round:
                self._round = signals.all_pipelines(session, self.pipeline_name)
        if self._round and now >= self._visit_at:
            due.append(self._round.pop())
        started = time.monotonic()
        for pipeline in self._load(due):
            self.claimant.asking = pipeline
            maintain_contained(session, pipeline)
            if self._is_unmeasured(pipeline):
                self._unmeasured.append(pipeline)
        self._touched -= set(due)
        if due:
            self._visit_at = now + _ROUND_COST * (time.monotonic() - started) / len(due)
        keep_warm(session, self._providers)

    def _measure(self) -> bool:
        """Take some steps of measuring an index that was not measured yet; return True if there are more.

        A change that comes meanwhile waits for one piece of the work, not for all of it.
        """
        if self._measuring is None:
            pipeline = next(filter(self._is_unmeasured, self._unmeasured), None)
            self._unmeasured = [p for p in self._unmeasured if p is not pipeline and self._is_unmeasured(p)]
            if pipeline is None:
                return False
            self._seen_versions.add(pipeline.version.version_id)
            measurement = Measurement(self.engine.session, pipeline)
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

    def _close_backfill(self, pipeline: Pipeline) -> bool:
        if pipeline.version.state != "backfilling" or pipeline.is_hidden or self._is_asleep(pipeline.lane_id):
            return False
        self.claimant.asking = pipeline
        session = self.engine.session
        if pipeline.is_lane:
            return chunk_queue.close(session, pipeline)
        return documents.can_hold_source(session, pipeline) and backfill.close_backfill(session, pipeline)

    def _is_asleep(self, lane_id: int) -> bool:
        return self._asleep.get(lane_id, 0.0) > time.monotonic()

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
        self._faults.pop(batch.pipeline.lane_id, None)
        if batch.units:
            return
        self.batches.remove(batch)
        self.current = None
        self._written[batch.pipeline.lane_id] += batch.embedded_count
        self._embedded[batch.pipeline.is_lane] += batch.embedded_count
        self._write_seconds = batch.longest_write
        if batch.answered_at:
            self._embed_seconds = batch.answered_at - batch.claimed_at
            rows = len(batch.rows) - batch.deferred_count
            self._pace(batch.pipeline).measured(
                rows, self._embed_seconds, batch.longest_write, batch.content_bytes if rows else None
            )

    def is_waiting(self) -> bool:
        """Whether rows are queued that will be embedded without anybody's doing: not those that a budget holds back.

        Nor those that may not be read, nor those of a pipeline that fails again and again.
        """
        failing = {lane_id for lane_id, count in self._faults.items() if count >= _LASTING_FAULTS}
        unable = self.claimant.out_of_money | self.claimant.hidden | failing
        self._limit_lock_waits(_LOCK_TIMEOUT)
        try:
            found = self.engine.session.scalar(
                _IS_WAITING,
                ["text", "text[]", "bigint[]"],
                self.pipeline_name,
                [self._known[lane_id].name for lane_id in unable if lane_id > 0 and lane_id in self._known],
                [-lane_id for lane_id in unable if lane_id < 0],
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

    def failed(self, pipeline: Pipeline, sqlstate: str) -> None:
        """Take note that a pipeline could not be claimed of, and leave it alone for a while."""
        self.put_off(pipeline)
        self.count_fault(pipeline, sqlstate)

    def count_fault(self, pipeline: Pipeline, sqlstate: str) -> None:
        """Count a fault of a pipeline, unless it is one that passes."""
        if sqlstate not in PASSING_FAULTS:
            self._faults[pipeline.lane_id] += 1

    def note_fault(self, message: str) -> None:
        """Show in the status of the pipeline that was asked why nothing could be claimed of it."""
        self._limit_lock_waits(_LOCK_TIMEOUT)
        if self.claimant.asking is not None:
            note_fault(self.engine.session, self.claimant.asking, message)
            self._noted.add(self.claimant.asking.lane_id)

    def _forget_faults(self) -> None:
        """Show no longer what kept a pipeline from being claimed of, once it was asked and had an answer."""
        if not (self._noted or self._faults):
            return
        # While a batch is in work that nothing else waits says nothing about it.
        answered = set(self.claimant.asked) - {batch.pipeline.lane_id for batch in self.batches}
        for pipeline in self._pipelines:
            if pipeline.lane_id in answered:
                self._faults.pop(pipeline.lane_id, None)
                if pipeline.lane_id in self._noted:
                    forget_fault(self.engine.session, pipeline)
                    self._noted.discard(pipeline.lane_id)

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
        release_batch(self.engine.session, batch, self.worker_id)
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
                claims.release_all(self.engine.session, pipeline, self.worker_id)
            except Exception as error:
                if sqlstate_of(error) not in (LOCK_NOT_AVAILABLE, UNDEFINED_TABLE):
                    raise
        chunk_queue.release(self.engine.session, self.worker_id)
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
        # Least lately written first: answers to one batch, which come all the time, must not keep another from being written.
        for batch in sorted(self.batches, key=lambda batch: batch.written_at):
            if not self._has_work(batch, now):
                continue
            self.current = batch
            batch.written_at = now
            if not self._can_write(batch.pipeline):
                batch.write_at = now + _PUT_OFF_SECONDS[0]
                continue
            wrote = False
            if batch.ungranted and self.is_ending:
                self.engine.give_back_waiting(batch, "the worker ended while a rate limit held the row back")
                wrote = True
            if self.is_ending:
                wrote = self.engine.end_search(batch) or wrote
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

    def _models_with_room(self) -> list[int]:
        """Return the models that are not busy with what they have: a slow provider holds up no other."""
        if sum(batch.memory for batch in self.batches) >= _MEMORY:
            return []
        waiting, batches = Counter[int](), Counter[int]()
        for batch in self.batches:
            model_id = batch.pipeline.version.model.model_id
            batches[model_id] += 1
            waiting[model_id] += max(batch.first_requests, 1 if batch is self.current else 0)
        # As many requests again wait behind those in work: the provider never runs dry while the next batch is read. Batches
        # that are searched for the text that fails do not count: they would keep new rows out for as long as that takes.
        return [i for i, depth in self._depths.items() if waiting[i] < 2 * depth and batches[i] <= depth]

    def _with_room(self, pipelines: list[Pipeline]) -> list[Pipeline]:
        """Return the pipelines that can be claimed of now."""
        models = set(self._models_with_room())
        return [
            pipeline
            for pipeline in pipelines
            # A model that has come since the last report has had nothing to do yet.
            if (pipeline.version.model.model_id in models or pipeline.version.model.model_id not in self._depths)
            and not self._is_asleep(pipeline.lane_id)
        ]

    def _pace(self, pipeline: Pipeline) -> Pace:
        tokens = pipeline.spec.tokens
        chunk_bytes = None if tokens is None else tokens * _BYTES_A_TOKEN
        if pipeline.lane_id not in self._paces:
            self._paces[pipeline.lane_id] = Pace(self.settings, chunk_bytes or _LIKELY_ROW_BYTES, chunk_bytes)
        pace = self._paces[pipeline.lane_id]
        # Its size cannot be had while an application has it locked; neither can its rows.
        if not (pace.is_measured or pipeline.is_lane) and documents.can_hold_source(self.engine.session, pipeline):
            pace.guess(documents.likely_row_bytes(self.engine.session, pipeline) or _LIKELY_ROW_BYTES)
        return pace

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
        if self.is_report_due:
            self._report()
        return "done"

    def _report(self) -> None:
        session = self.engine.session
        self._report_at = time.monotonic() + _REPORT_SECONDS
        let_launcher_breathe(session)
        settings = load_settings(session)
        if settings != self.settings:
            self.settings, self._paces = settings, {}
            self.claimant.set_live_share(settings.live_share)
        # Whose model has room is asked of these: a pipeline may have come while all others' models are busy.
        models = session.query(_DEPTHS, ["text"], self.pipeline_name)
        self._depths = {int(row["model_id"]): _depth(str(row["provider"]), int(row["concurrency"])) for row in models}
        self._providers = {str(row["provider"]) for row in models}
        self._held_back_by = backpressure.held_back_by(session, settings)
        if self._held_back_by is not None:
            for pace in self._paces.values():
                pace.slow_down()
        for lane_id, written in self._written.items():
            if written and documents.analyze_grown(session, self._known[lane_id], written):
                self._written[lane_id] = 0
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


def _depth(provider: str, concurrency: int) -> int:
    """Requests that a model works on at a time."""
    return _LOCAL_DEPTH if provider == "sentence-transformers" else concurrency


def _advanced(steps: Iterator[None]) -> bool:
    """Take steps for as long as one poll may; return True if there are more."""
    until = time.monotonic() + _MEASURE_SECONDS
    while time.monotonic() < until:
        if next(steps, _END) is _END:
            return False
    return True
