"""The state of a resident worker between its steps.

Each step is one short transaction.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

from embedline.catalog.settings import load_settings
from embedline.catalog.values import WorkKey
from embedline.core.embedding import EmbeddingBlock
from embedline.core.sql_text import quote_literal
from embedline.documents.read import can_hold_source
from embedline.documents.statistics import analyze_grown
from embedline.postgres.claims import WorkerClaims
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import LOCK_NOT_AVAILABLE, UNDEFINED_TABLE, sqlstate_of
from embedline.queue import chunk_queue, signals
from embedline.worker import backpressure
from embedline.worker.batch import Batch, Unit
from embedline.worker.candidates import Candidates
from embedline.worker.capacity import Capacity, Paces
from embedline.worker.claim import Claimant
from embedline.worker.engine import Engine
from embedline.worker.housekeeping import Housekeeping
from embedline.worker.maintenance import Maintenance
from embedline.worker.permits import DatabasePermits
from embedline.worker.report import Report
from embedline.worker.schedule import wake_launcher
from embedline.worker.sources import WorkSources
from embedline.worker.steps import Answer
from embedline.worker.troubles import SHORTEST_PAUSE, Troubles
from embedline.worker.waiting import is_anything_waiting
from embedline.worker.work_source import WorkSource

_WRITE_LOCK_TIMEOUT = "2s"
# Steps that lose nothing by not waiting are done again. Below deadlock_timeout, so that in a deadlock it is never the
# application that fails.
_LOCK_TIMEOUT = "200ms"
# Seconds for which a batch may hold its claim while a rate limit lets it through little by little.
_PATIENCE_SECONDS = 60.0


class ResidentWorker:
    """State of a resident worker between its steps."""

    # Whether it leaves texts to the batch endpoints of providers.
    begins_batches = True

    def __init__(self, session: Session, worker_id: int, pipeline_name: str | None) -> None:
        self.worker_id = worker_id
        self._session = session
        self._pipeline_name = pipeline_name
        settings = load_settings(session)
        self._claims = claims = WorkerClaims(worker_id)
        self._sources = WorkSources(session, claims)
        self._candidates = Candidates(self._sources)
        self._engine = Engine(session, claims, _PATIENCE_SECONDS, begins_batches=self.begins_batches)
        self.claimant = Claimant(claims, DatabasePermits(session, claims), settings.live_share)
        self._maintenance = Maintenance(session, pipeline_name, self._ask, claims if self.begins_batches else None)
        self._capacity, self._paces = Capacity(), Paces(settings)
        self._troubles = Troubles()
        self._report = Report(session, worker_id)
        self._housekeeping = Housekeeping(session, pipeline_name)
        self._settings = settings
        self.batches: list[Batch] = []
        self.current: Batch | None = None
        self.is_ending = False
        # The source during whose reading a cancel came, which may be a row's own doing.
        self.cancelled_in: WorkKey | None = None
        self._written = Counter[WorkKey]()  # Rows of each source since its tables were last analysed here.
        self._before: list[tuple[Batch, list[Unit], dict[int, int | None]]] = []

    # What the loop asks between steps

    @property
    def futures(self) -> list[Future[EmbeddingBlock]]:
        """Requests in flight, of all batches, and calls of batch endpoints."""
        return [future for batch in self.batches for future in batch.futures] + self._maintenance.futures

    @property
    def has_room(self) -> bool:
        """Return True if another batch may be claimed."""
        if self.claimant.is_isolating and self.batches:
            return False
        if self._maintenance.is_overdue(time.monotonic()) or not self._capacity.is_known:
            return True
        return bool(self._capacity.models_with_room(self.batches, self.current))

    @property
    def has_answers(self) -> bool:
        """Return True if a write would find something to do."""
        now = time.monotonic()
        return any(self._has_work(batch, now) for batch in self.batches)

    def _has_work(self, batch: Batch, now: float) -> bool:
        return batch.write_at <= now and (
            not batch.units
            or any(unit.is_answered for unit in batch.units)
            or (bool(batch.ungranted) and (self.is_ending or batch.grant_at <= now))
            or (self.is_ending and self._engine.failures.has_search(batch))
        )

    @property
    def embedded(self) -> str:
        """What this worker has embedded, in words."""
        return self._report.embedded

    @property
    def is_report_due(self) -> bool:
        """Return True if the server's state was last read over a second ago."""
        return self._report.is_due

    # Claiming

    def claim(self) -> Answer:
        """Claim the next batch."""
        self.claimant.asking = None
        self.polled_at: tuple[float, float] | None = None
        self._limit_lock_waits(_LOCK_TIMEOUT)
        asked = signals.ask(self._session, self._claims, self._pipeline_name)
        if asked.is_to_stop:
            return Answer.STOP
        if self._report.is_due:
            self._read_server()
        if asked.has_dead:
            signals.note_dead_workers(self._session)
            return Answer.AGAIN
        started = time.monotonic()
        if self._maintenance.work_overdue(started):
            return Answer.AGAIN
        awake = [key for key in asked.keys if not self._troubles.is_asleep(key)]
        is_through = self._candidates.choose(awake, self.claimant.order, self._with_room)
        if self._maintenance.is_overdue(started):  # There was always something to claim, or no room.
            self._maintenance.put_off(started)
            self._close_backfills()
            self._maintain(started)
            return Answer.AGAIN
        found = self._with_room(self._candidates.loaded)
        self.current = self.claimant.claim(found, lambda source: self._paces.of(source).rows, is_idle=not self.batches)
        # A batch in flight, which nothing else waits for, says nothing about its source.
        answered = set(self.claimant.asked) - {batch.source.key for batch in self.batches}
        self._troubles.forget_answered(self._candidates.loaded, answered)
        is_over, quiet = is_through or self.current is not None, {source.key for source in self.claimant.quiet}
        self._candidates.note_seen(quiet, is_over=is_over)
        if self.current is not None:
            self._report.claim_seconds = time.monotonic() - started
            self.current.max_bytes = self._paces.of(self.current.source).bytes
            self._maintenance.touch(self.current.source)
            self.batches.append(self.current)
            return Answer.BATCH
        for source in self.claimant.quiet:
            self._ask(source)
            source.clear_signals(asked)
        if self.claimant.has_removed or self._close_backfills() or not is_through:
            return Answer.AGAIN
        self.polled_at = time.monotonic(), time.process_time()
        if self._maintenance.is_due(started):
            self._maintain(started)
        has_more = self._maintenance.derive() or self._maintenance.index_words() or self._maintenance.measure()
        return Answer.AGAIN if has_more or self._housekeeping.check_quality(started) else Answer.IDLE

    def _with_room(self, sources: list[WorkSource]) -> list[WorkSource]:
        """Return the sources that can be claimed of now."""
        awake = [source for source in sources if not self._troubles.is_asleep(source.key)]
        return self._capacity.with_room(awake, self.batches, self.current)

    def _ask(self, source: WorkSource) -> None:
        """Note whose fault a failure would be."""
        self.claimant.asking = source

    def _close_backfills(self) -> bool:
        return self._maintenance.close_backfills(self._candidates.loaded, self._troubles.is_asleep)

    def _maintain(self, now: float) -> None:
        self._housekeeping.do_round(now)
        self._maintenance.maintain(now, self._candidates.load, self._capacity.providers)

    # A batch

    def read(self) -> Answer:
        """Read the batch that was just claimed."""
        return self._prepare(self._engine.prepare.read)

    def submit(self) -> Answer:
        """Reserve the requests of the batch that was just chunked."""
        return self._prepare(self._engine.prepare.submit)

    def _prepare(self, stage: Callable[[Batch], None]) -> Answer:
        self._limit_lock_waits(_LOCK_TIMEOUT)
        if self.current is not None:
            if not can_hold_source(self._session, self.current.pipeline):
                return Answer.BUSY
            stage(self.current)
        return Answer.DONE

    def chunk(self, check_interrupts: Callable[[], None]) -> None:
        """Chunk the batch that was just read; no transaction is open."""
        if self.current is not None:
            self._engine.prepare.chunk(self.current, check_interrupts)

    def start(self) -> None:
        """Send what the transaction that was just committed has granted."""
        self._before = []
        if self.current is not None:
            self._engine.embed.start(self.current)

    def write(self) -> Answer:
        """Write what has come back for one batch."""
        self._limit_lock_waits(_WRITE_LOCK_TIMEOUT)
        now = time.monotonic()
        self._before = [(batch, list(batch.units), dict(batch.tokens_used)) for batch in self.batches]
        # Least recently written first: answers to one batch come all the time and must not hold up another.
        for batch in sorted(self.batches, key=lambda batch: batch.written_at):
            if not self._has_work(batch, now):
                continue
            self.current = batch
            batch.written_at = now
            if not can_hold_source(self._session, batch.pipeline):
                batch.write_at = now + SHORTEST_PAUSE
            elif self._write_batch(batch, now):
                return Answer.WRITTEN
        return Answer.NOTHING_READY

    def _write_batch(self, batch: Batch, now: float) -> bool:
        """Write a batch, ask again for its grants, and finish it if it is through.

        Return True if anything was done.
        """
        has_changed = False
        if batch.ungranted and self.is_ending:
            self._engine.embed.requeue_waiting(batch, "the worker ended while a rate limit held the row back")
            has_changed = True
        if self.is_ending:
            has_changed = self._engine.failures.end_search(batch) or has_changed
        if batch.ungranted and batch.grant_at <= now:
            self._engine.embed.grant(batch)
            has_changed = True
        has_changed = self._engine.write.write_ready(batch) or has_changed
        if not batch.units:
            self._engine.finish(batch)
            if batch.claim.is_suspect:
                self.claimant.end_isolation()
            return True
        return has_changed

    def wrote(self, seconds: float, commit_seconds: float) -> None:
        """Note the seconds of a write with its commit, and a batch that is through."""
        batch = self.current
        if batch is None:
            return
        self._report.commit_seconds = commit_seconds
        batch.longest_write = max(batch.longest_write, seconds)
        self._troubles.forget(batch.source.key)
        if batch.units:
            return
        self.batches.remove(batch)
        self.current = None
        self._written[batch.source.key] += batch.embedded_count
        self._report.count(batch)
        if batch.answered_at:
            rows = len(batch.rows) - batch.deferred_count
            self._paces.of(batch.source).measured(
                rows, batch.answered_at - batch.claimed_at, batch.longest_write, batch.content_bytes if rows else None
            )

    # Failures

    def undo(self) -> None:
        """Undo in memory a step whose transaction was rolled back.

        The answers are kept, because they are paid for.
        """
        for batch, units, tokens_used in self._before:
            batch.units, batch.tokens_used = units, tokens_used
            for request in batch.requests:
                if request.future is None:
                    request.is_granted, request.reservation_id = False, None
        self._before = []

    def put_off_write(self, sqlstate: str) -> bool:
        """Write the current batch later; return False if its patience is over."""
        if (batch := self.current) is None or batch not in self.batches:
            return False
        batch.write_at, is_kept = self._troubles.put_off_write(batch.source.key, sqlstate, is_ending=self.is_ending)
        return is_kept

    def count_fault(self, source: WorkSource, sqlstate: str) -> None:
        """Count a fault of a source."""
        self._troubles.count(source.key, sqlstate)

    def claim_failed(self, source: WorkSource, sqlstate: str) -> None:
        """Note that a claim of a source failed, and leave it alone for a while."""
        self._troubles.put_off(source.key)
        self._troubles.count(source.key, sqlstate)

    def record_fault(self, message: str) -> Answer:
        """Show why nothing could be claimed of the source that was asked."""
        self._limit_lock_waits(_LOCK_TIMEOUT)
        if (source := self.claimant.asking) is not None:
            self._troubles.show(source, message)
        return Answer.DONE

    def abandon(self, message: str | None) -> Answer:
        """Release the claim of the batch that failed, uncounted, and show why."""
        batch = self.current
        if batch is not None and message:
            batch.source.record_error(message)
        self._limit_lock_waits(_WRITE_LOCK_TIMEOUT)
        if batch is not None:
            batch.source.release(batch.claim)
            self.forget_current()
        return Answer.DONE

    def forget_current(self) -> None:
        """Go on without the batch that failed, and leave its source alone for a while."""
        batch = self.current
        if batch is None:
            return
        self._troubles.put_off(batch.source.key)
        if batch in self.batches:
            self.batches.remove(batch)
            self._report.count_embedded(batch)
        for future in batch.futures:
            future.cancel()
        self.current = None
        if not self.batches:
            self.claimant.end_isolation()

    def end(self) -> Answer:
        """Release every claim of this worker, uncounted.

        Claims that are locked now, or are of `cancelled_in`, are reclaimed later, as a dead worker's.
        """
        self._limit_lock_waits(_WRITE_LOCK_TIMEOUT)
        self._housekeeping.end()
        self._maintenance.end()
        for source in [source for source in self._sources.load_all() if source.key != self.cancelled_in]:
            try:
                source.release_all()
            except Exception as error:
                if sqlstate_of(error) not in (LOCK_NOT_AVAILABLE, UNDEFINED_TABLE):
                    raise
        chunk_queue.release(self._session, self.worker_id)
        for future in self.futures:
            future.cancel()
        self.batches, self.current = [], None
        self.claimant.end_isolation()
        if self.cancelled_in is None:
            self._report.remove()
        return Answer.DONE

    # The server

    def is_waiting(self) -> Answer:
        """Return YES if rows are queued that will be embedded without any intervention.

        That is not true of rows that a budget holds back, that may not be read, or whose pipeline fails again and again.
        """
        unable = self.claimant.out_of_money | self.claimant.hidden | self._troubles.lasting
        self._limit_lock_waits(_LOCK_TIMEOUT)
        known = self._candidates.known
        names = [known[key].pipeline.name for key in unable if key.kind == "pipeline" and key in known]
        versions = [key.number for key in unable if key.kind == "version"]
        found = is_anything_waiting(self._session, self._pipeline_name, names, versions)
        return Answer.YES if found else Answer.NO

    def report(self) -> Answer:
        """Ask whether to stop.

        Once a second read the server's state and show this worker's in embedline.worker.
        """
        if self._report.is_stop_requested():
            return Answer.STOP
        if self._report.is_due:
            self._read_server()
        return Answer.DONE

    def _read_server(self) -> None:
        self._report.begin()
        wake_launcher(self._session)
        settings = load_settings(self._session)
        if settings != self._settings:
            self._settings, self._paces = settings, Paces(settings)
            self.claimant.set_live_share(settings.live_share)
        self._capacity.reload(self._session, self._pipeline_name)
        held_back_by = backpressure.held_back_by(self._session, settings)
        if held_back_by is not None:
            self._paces.slow_down()
        for key, written in self._written.items():
            if written and analyze_grown(self._session, self._candidates.known[key].pipeline, written):
                self._written[key] = 0
        self._report.write(self._paces.most_rows, len(self.futures), held_back_by)

    def _limit_lock_waits(self, timeout: str) -> None:
        self._session.execute(f"SET LOCAL lock_timeout = {quote_literal(timeout)}")
