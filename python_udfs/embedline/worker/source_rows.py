"""The rows of a pipeline's source, as a WorkSource.

They come from the inbox, the outbox, or a range of the backfill.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from embedline.catalog import health
from embedline.catalog.source import hidden_source
from embedline.catalog.values import Pipeline, WorkKey
from embedline.core.retry import MAX_ATTEMPTS, ROWS_PER_CLAIM_AFTER_CRASHES
from embedline.documents import deletions
from embedline.documents.keys import queued_anew, take_documents
from embedline.documents.read import can_hold_source, likely_row_bytes, read_isolated, read_rows, still_current
from embedline.documents.remove import remove_absent
from embedline.documents.reuse import known_vectors
from embedline.documents.values import Document, Vector
from embedline.documents.write import write_documents
from embedline.postgres.claims import Claims
from embedline.postgres.locks import live_workers
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.queue import backfill, dead_letters, inbox, outbox, signals, source_queue
from embedline.queue.claim import Claim
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.worker.index_maintenance import maintain_isolated
from embedline.worker.unread import fail_unread
from embedline.worker.work_source import BUSY_SECONDS, LIKELY_ROW_BYTES, Kind, Reading, Waiting

# Rows of the inbox that a claim of a pipeline with tenants moves on at most: each tenant must be seen to have its turn.
_ROWS_MOVED_FOR_TENANTS = 20_000
# Seconds until deleted rows are read again whose vectors earlier changes may still use: the first time, and at most. Each
# time reads the whole queue, which may be long.
_DELETIONS_SECONDS = (0.1, 2.0)
# Delay for rows that changed while in flight, if the queue is too long to search for their newer entry.
_LONG_QUEUE_SECONDS = 5.0


@dataclass
class Memory:
    """What is remembered of a pipeline from one claim to the next."""

    after_tenant: str | None = None
    had_retries: bool = False
    # When to try again to remove what deleted rows left, and the seconds since the last try.
    deletions: tuple[float, float] = (0.0, 0.0)


@dataclass(eq=False)
class SourceRows:
    """Source rows on their way to chunks and vectors."""

    session: Session
    claims: Claims
    pipeline: Pipeline
    memory: Memory = field(default_factory=Memory)
    has_signals: bool = True
    may_cut: bool = True

    @property
    def key(self) -> WorkKey:
        """Return the pipeline's key."""
        return WorkKey("pipeline", self.pipeline.pipeline_id)

    @property
    def weight(self) -> float:
        """Return the pipeline's weight."""
        return self.pipeline.weight

    @property
    def is_hidden(self) -> bool:
        """Return True if rows are hidden from the owner: they would seem deleted."""
        return self.pipeline.is_hidden

    # Claiming

    def can_claim(self) -> bool:
        """Lock the source; return False if an application is about to change it."""
        return can_hold_source(self.session, self.pipeline)

    def has_work(self, live: Sequence[int]) -> bool:
        """Return False if nothing waits.

        Inside a caller's transaction the locks of the glance are released at once. The locks of the tables of 1,000
        pipelines are too many for one transaction.
        """
        if self.claims.is_resident:
            return True
        return read_and_release(self.session, lambda: self.can_claim() and not self.peek(live).is_nothing)

    def peek(self, live: Sequence[int]) -> Waiting:
        """Return what waits, in one statement, the cost of an idle poll."""
        return Waiting(**source_queue.peek(self.session, self.pipeline, list(live)))

    def claim(self, kind: Kind, limit: int, waiting: Waiting) -> Claim | None:
        """Claim changes, the front of a range of the backfill, or suspected rows."""
        if kind is Kind.SUSPECTS:
            return self._claim_suspects()
        if kind is Kind.BACKFILL:
            return backfill.claim_range(self.session, self.pipeline, limit, self.claims, self._take_turns())
        return self._claim_changes(limit, waiting)

    def _claim_suspects(self) -> Claim | None:
        crashes = outbox.most_crashes(self.session, self.pipeline)
        live = self._take_turns()
        if crashes is not None:
            limit = ROWS_PER_CLAIM_AFTER_CRASHES.get(crashes, 1)
            found = outbox.claim_due(self.session, self.pipeline, limit, self.claims, live, crash_count=crashes)
            return Claim(found, is_suspect=True) if found else None
        for crashes in (*ROWS_PER_CLAIM_AFTER_CRASHES, max(ROWS_PER_CLAIM_AFTER_CRASHES) + 1):
            limit = ROWS_PER_CLAIM_AFTER_CRASHES.get(crashes, 1)
            claim = backfill.claim_range(self.session, self.pipeline, limit, self.claims, live, crash_count=crashes)
            if claim is not None:
                return claim
        return None

    def _claim_changes(self, limit: int, waiting: Waiting) -> Claim | None:
        session, pipeline, memory = self.session, self.pipeline, self.memory
        live = self._take_turns()
        if pipeline.tenant is not None:
            if waiting.fresh:
                inbox.move_to_outbox(session, pipeline, _ROWS_MOVED_FOR_TENANTS)
            found, memory.after_tenant = outbox.claim_in_turns(
                session, pipeline, limit, self.claims, live, memory.after_tenant
            )
            return Claim(found) if found else None
        # Retries and new changes of a pipeline take turns: neither starves the other.
        if waiting.due and not (waiting.fresh and memory.had_retries):
            memory.had_retries = True
            found = outbox.claim_due(session, pipeline, limit, self.claims, live)
            if found:
                return Claim(found)
        memory.had_retries = False
        claim = inbox.claim_inbox(session, pipeline, limit, self.claims, live) if waiting.fresh else None
        return claim if claim is not None and claim.rows else None

    def _take_turns(self) -> list[int]:
        """Let claims of one pipeline follow each other.

        Return the workers that are alive then. So each claim sees every earlier one, and a key is never in flight twice.
        """
        self.claims.take_turns(self.session, self.pipeline.pipeline_id)
        return live_workers(self.session)

    def reclaim_from_dead_workers(self) -> None:
        """Free the rows of workers that are gone."""
        claimants = source_queue.claimants(self.session, self.pipeline)
        # Who is alive is asked after the claims were seen: a worker that began in between is not taken for dead.
        dead = sorted(claimants - set(live_workers(self.session)))
        if dead:
            inbox.break_claims(self.session, self.pipeline, "claimed_by = ANY ($1)", dead, crash_count=1)
            outbox.reclaim_from_dead_workers(self.session, self.pipeline, dead)
            backfill.reclaim_from_dead_workers(self.session, self.pipeline, dead)

    def remove_deleted(self) -> bool:
        """Remove some of what is stored of deleted rows.

        If it must stay for now, try again a little later. This needs no provider: it goes on while the circuit is open,
        after the longest wait if changes wait for one.
        """
        if self.is_hidden:
            return False
        now = time.monotonic()
        try_at, pause = self.memory.deletions
        if self.claims.is_resident and now < try_at:
            return False
        if can_hold_source(self.session, self.pipeline) and deletions.remove_some(self.session, self.pipeline):
            self.memory.deletions = (0.0, 0.0)
            return True
        shortest, longest = _DELETIONS_SECONDS
        pause = min(max(2 * pause, shortest), longest)
        self.memory.deletions = now + pause, pause
        return False

    # Reading

    def read(self, claim: Claim, rows: Sequence[ClaimedRow], max_bytes: int) -> Reading:
        """Read and compare; settle at once rows that are gone or have not changed."""
        reading = Reading()
        absent: list[Document] = []
        settled: list[ClaimedRow] = []
        deferred: list[ClaimedRow] = []
        found, failed = read_isolated(
            self.session,
            self.pipeline,
            [row.key for row in rows],
            lambda keys: read_rows(self.session, self.pipeline, keys, max_bytes),
        )
        for index, row in enumerate(rows):
            read = found.get(index)
            if index in failed:
                continue
            if read is not None and read.deferred:
                deferred.append(row)
            elif read is None or not read.accepted:
                absent.append(Document(row))
            elif read.current or (read.given_up and claim.of_backfill):
                # A backfill retries no dead letter; a change of its row does, and so does requeue.
                settled.append(row)
            else:
                reading.documents.append(Document(row, read.content_hash, read.content, read.prefix))
                reading.content_bytes += len(read.content or "")
        self._settle_current(claim, settled)
        reading.deferred_count = len(deferred)
        if deferred:
            self.requeue(claim, deferred, 0.0, charged=False, error=None)
        unread = [(rows[index], error) for index, error in failed.items()]
        put_back = fail_unread(self, claim, unread) if unread else []
        source_queue.narrow(self.session, self.pipeline, claim, deferred + put_back, self.claims)
        self._settle_absent(claim, absent)
        return reading

    def _settle_current(self, claim: Claim, rows: Sequence[ClaimedRow]) -> None:
        if not rows:
            return
        current = still_current(self.session, self.pipeline, [row.key for row in rows])
        self.settle([row for i, row in enumerate(rows) if i in current])
        self._requeue_busy(claim, [row for i, row in enumerate(rows) if i not in current])

    def _settle_absent(self, claim: Claim, absent: Sequence[Document]) -> None:
        if not absent:
            return
        again = set(remove_absent(self.session, self.pipeline, absent))
        self.settle([document.row for i, document in enumerate(absent) if i not in again])
        self._requeue_busy(claim, [absent[i].row for i in again])

    # Writing

    def known_vectors(self, documents: Sequence[Document]) -> dict[bytes, Vector]:
        """Return the vectors that are stored of the same chunks anywhere in the pipeline."""
        return known_vectors(self.session, self.pipeline, documents)

    def write(self, claim: Claim, documents: Sequence[Document], vectors: Mapping[bytes, Vector]) -> list[int]:
        """Write chunks, vectors and state of documents whose rows have not changed."""
        of_backfill = claim.range_id is not None
        result = write_documents(self.session, self.pipeline, documents, vectors, of_backfill=of_backfill)
        self.settle([documents[i].row for i in result.written])
        self._settle_absent(claim, [documents[i] for i in result.absent])
        self._requeue_busy(claim, [documents[i].row for i in result.busy])
        self._requeue_stale(claim, [documents[i] for i in result.stale])
        return result.written

    def _requeue_stale(self, claim: Claim, stale: list[Document]) -> None:
        # A newer change has its own row in the queue, however often that happens. The rest are expressions that never give
        # the same text twice.
        newer = queued_anew(self.session, self.pipeline, [document.row for document in stale]) if stale else set()
        if newer is None:
            rows = [document.row for document in stale]
            self.requeue(claim, rows, _LONG_QUEUE_SECONDS, charged=False, error=None)
            return
        self.settle([stale[i].row for i in newer])
        stale = [document for i, document in enumerate(stale) if i not in newer]
        spent = [document for document in stale if document.row.attempts >= MAX_ATTEMPTS]
        message = "the content differs at every read; is the content expression volatile?"
        if spent:
            self.quarantine(claim, [DeadLetter(d.row, "write", "EL021", message, d.content_hash) for d in spent])
        rest = [document.row for document in stale if document.row.attempts < MAX_ATTEMPTS]
        if rest:
            self.requeue(claim, rest, 0.0, charged=True, error=None)

    def settle(self, rows: Sequence[ClaimedRow]) -> None:
        """Remove rows from the outbox.

        Those of an inbox claim or a range end with the claim.
        """
        outbox.finish(self.session, self.pipeline, rows, self.claims)

    def requeue(
        self, claim: Claim, rows: Sequence[ClaimedRow], delay: float, *, charged: bool, error: str | None
    ) -> list[int]:
        """Put rows into the outbox."""
        retry = outbox.Retry(delay, charged, error, of_backfill=claim.range_id is not None)
        return outbox.requeue(self.session, self.pipeline, rows, retry, enqueued_at=claim.enqueued_at)

    def _requeue_busy(self, claim: Claim, rows: Sequence[ClaimedRow]) -> None:
        if rows:
            self.requeue(claim, rows, BUSY_SECONDS, charged=False, error=None)

    def quarantine(self, claim: Claim, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters of rows whose documents are free; the others are requeued."""
        wanted = [Document(letter.row, letter.content_hash) for letter in letters]
        # A row that cannot be read, or that ends its worker, is given up without being read again.
        were_read = [i for i, letter in enumerate(letters) if letter.stage not in ("claim", "read")]
        free = take_documents(self.session, self.pipeline, wanted, were_read)
        given_up = [letter for i, letter in enumerate(letters) if i in free]
        if given_up:
            dead_letters.write_dead_letters(self.session, self.pipeline, given_up)
        self.settle([letter.row for letter in given_up])
        self._requeue_busy(claim, [letter.row for i, letter in enumerate(letters) if i not in free])

    def finish(self, claim: Claim) -> None:
        """Mark the range as read, or remove the inbox claim."""
        if claim.range_id is not None:
            backfill.finish_range(self.session, claim.range_id, self.claims)
        if claim.claim_id is not None:
            inbox.finish_claim(self.session, self.pipeline, claim.claim_id, self.claims)

    def release(self, claim: Claim) -> None:
        """Release the claim: marks and range."""
        worker_id = self.claims.worker_id
        if worker_id is None:
            return
        if claim.claim_id is not None:
            inbox.break_claims(self.session, self.pipeline, "claim_id = ANY ($1)", [claim.claim_id], crash_count=0)
        ids = [outbox_id for row in claim.rows for outbox_id in row.outbox_ids]
        if ids:
            outbox.release(self.session, self.pipeline, worker_id, ids)
        if claim.range_id is not None:
            backfill.release(self.session, self.pipeline, worker_id, claim.range_id)

    def release_all(self) -> None:
        """Release all claims that this worker has of the pipeline.

        The tries are not counted.
        """
        worker_id = self.claims.worker_id
        if worker_id is None:
            return
        inbox.break_claims(self.session, self.pipeline, "claimed_by = ANY ($1)", [worker_id], crash_count=0)
        outbox.release(self.session, self.pipeline, worker_id)
        backfill.release(self.session, self.pipeline, worker_id)

    # The work as a whole

    def close(self) -> bool:
        """Mark the serving version complete if no row is missing.

        Return True if some were queued.
        """
        return backfill.close_backfill(self.session, self.pipeline)

    def clear_signals(self, asked: signals.Asked) -> None:
        """Remove the pipeline's signals, if it had some and nothing waits."""
        if self.pipeline.pipeline_id in asked.signalled:
            signals.clear(self.session, self.pipeline, asked.at, asked.live)

    def maintain(self) -> None:
        """Maintain the pipeline's indexes."""
        maintain_isolated(self.session, self.pipeline)

    def record_error(self, message: str) -> None:
        """Show the error in embedline.status."""
        health.record_error(self.session, self.pipeline, message)

    def forget_error(self) -> None:
        """Remove the error from embedline.status."""
        health.forget_error(self.session, self.pipeline)

    def record_fault(self, message: str) -> None:
        """Show the fault in embedline.status."""
        health.record_fault(self.session, self.pipeline, message)

    def hidden_reason(self) -> str:
        """Return why rows of the source are hidden, and the remedy."""
        hidden = hidden_source(self.session, self.pipeline.source_oid)
        return f"{hidden}. {hidden.hint}" if hidden else ""

    def likely_row_bytes(self) -> float | None:
        """Return the likely size of a source row.

        None while an application has the source locked.
        """
        if not self.can_claim():
            return None
        return likely_row_bytes(self.session, self.pipeline) or LIKELY_ROW_BYTES
