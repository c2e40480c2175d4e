"""What a worker takes next: whose turn it is, live changes or backfill, and rows under suspicion only alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from embedline.catalog.health import note_error
from embedline.catalog.load import Pipeline
from embedline.catalog.source import hidden_source
from embedline.core.retry import ROWS_PER_CLAIM_AFTER_CRASHES
from embedline.documents import deletions
from embedline.documents.documents import can_hold_source
from embedline.models import circuit
from embedline.postgres.session import CLAIM_LOCK_CLASS, SUSPECT_LOCK_CLASS, Session, live_workers, read_and_release
from embedline.queue import backfill, chunk_queue, inbox, outbox
from embedline.spending import ledger
from embedline.worker.batch import Batch
from embedline.worker.batch_size import LiveShare, Turns
from embedline.worker.sources import work_of

# Rows of the inbox that a claim moves on at most where tenants have their turns: each must be seen to have one.
_ROWS_MOVED_FOR_TENANTS = 20_000
# Seconds to wait before looking again at deleted rows whose vectors earlier changes may still use: the first time, and at
# most. A look reads the whole queue, which may be long.
_DELETIONS_SECONDS = (0.1, 2.0)


class Claimant:
    """Claims batches for one session. `worker_id` is None inside embed_pending, whose transaction is the claim."""

    def __init__(self, session: Session, worker_id: int | None, live_share: float, turns: Turns | None = None) -> None:
        self.session = session
        self.worker_id = worker_id
        self._turns = turns or Turns()
        self._share = live_share
        # Of each pipeline: with one account for all, those whose turns fell in step with it got nothing or everything.
        self._live_shares: dict[int, LiveShare] = {}
        self._after_tenant: dict[int, str | None] = {}
        self._had_retries: set[int] = set()
        self._had_suspects: set[int] = set()
        self.is_isolating = False
        # Whom `claim` was asking when it failed, and who had nothing when it was asked.
        self.asking: Pipeline | None = None
        # Whether the last `claim` removed what is stored of deleted rows; when to look again at each pipeline, and the
        # seconds since the look before.
        self.has_removed = False
        self._deletions_at: dict[int, tuple[float, float]] = {}
        self.asked: list[int] = []
        # Pipelines in whose tables nothing was found to wait by the last claim.
        self.quiet: list[Pipeline] = []
        # Pipelines whose budget or rate limit lets nothing through at the moment.
        self.out_of_money: set[int] = set()
        # Pipelines whose source cannot be read at the moment.
        self.hidden: set[int] = set()

    def claim(
        self,
        pipelines: Sequence[Pipeline],
        rows: Callable[[Pipeline], int],
        *,
        is_idle: bool,
        embed_backfill: bool = True,
    ) -> Batch | None:
        """Claim a batch of the pipeline whose turn it is, of at most `rows(pipeline)`; None where nothing can be claimed.

        `is_idle` says that the caller has no other batch in work: only then are suspects claimed.
        """
        if is_idle:
            self.end_isolation()
        self.has_removed = False
        by_id = {pipeline.lane_id: pipeline for pipeline in pipelines}
        live = live_workers(self.session)
        self.asked = asked = list[int]()
        self.quiet = []
        for lane_id in self._turns.order(list(by_id)):
            self.asking = pipeline = by_id[lane_id]
            batch = None
            if not self._is_blocked(pipeline):
                claim_of = self._claim_of_version if pipeline.is_lane else self._claim_of
                batch = claim_of(pipeline, rows(pipeline), live, is_idle, embed_backfill)
            elif not pipeline.is_lane and not pipeline.is_hidden:
                # What deleted rows leave needs no provider; where changes wait for one, it goes after the longest wait.
                self._remove_deleted(pipeline)
            if batch is not None:
                self._turns.worked(lane_id, len(batch.rows) + 1, pipeline.weight, asked)
                return batch
            if self.is_isolating:
                return None
            asked.append(lane_id)
        self.asking = None
        return None

    def order(self, lane_ids: list[int]) -> list[int]:
        """Return pipelines and lanes in the order of their turns."""
        return self._turns.order(lane_ids)

    def set_live_share(self, share: float) -> None:
        """Go on with another share of live changes."""
        if share != self._share:
            self._share, self._live_shares = share, {}

    def _live_share(self, pipeline: Pipeline) -> LiveShare:
        return self._live_shares.setdefault(pipeline.lane_id, LiveShare(self._share))

    def end_isolation(self) -> None:
        """Let other sessions have their turn with suspects."""
        if self.is_isolating:
            self.is_isolating = False
            self.session.query("SELECT pg_advisory_unlock($1, 0)", ["integer"], SUSPECT_LOCK_CLASS)

    def _is_blocked(self, pipeline: Pipeline) -> bool:
        if self._is_hidden(pipeline) or circuit.is_open(self.session, pipeline.version.model.model_id):
            return True
        is_out_of_money = pipeline.metered and ledger.blocked_until(self.session, pipeline) is not None
        (self.out_of_money.add if is_out_of_money else self.out_of_money.discard)(pipeline.lane_id)
        return is_out_of_money

    def _is_hidden(self, pipeline: Pipeline) -> bool:
        """Whether rows of the source are hidden from its owner: to claim them would be to take them for deleted."""
        if not pipeline.is_hidden or pipeline.is_lane:
            self.hidden.discard(pipeline.lane_id)
            return False
        if pipeline.lane_id not in self.hidden:
            self.hidden.add(pipeline.lane_id)
            hidden = hidden_source(self.session, pipeline.source_oid)
            note_error(self.session, pipeline, f"{hidden}. {hidden.hint}" if hidden else "")
        return True

    def _claim_of(
        self, pipeline: Pipeline, limit: int, live: list[int], is_idle: bool, embed_backfill: bool
    ) -> Batch | None:
        if self.worker_id is None and not self._may_have_work(pipeline, live):
            return None
        if not can_hold_source(self.session, pipeline):
            return None
        waiting = self._look(pipeline, live)
        if not any(waiting.values()):
            self.quiet.append(pipeline)
            return None
        if waiting["orphaned"]:
            _take_over(self.session, pipeline)
            waiting = self._look(pipeline, live)
        if waiting["deleted"]:
            self._remove_deleted(pipeline)
        # Suspects go a few at a time: whatever else waits has a turn in between.
        is_others_turn = pipeline.pipeline_id in self._had_suspects and (waiting["queued"] or waiting["unread"])
        self._had_suspects.discard(pipeline.pipeline_id)
        if waiting["suspected"] and not is_others_turn and (self.worker_id is None or self._isolate()):
            if not is_idle:
                return None
            self._had_suspects.add(pipeline.pipeline_id)
            return self._claim_suspects(pipeline)
        sources: list[Callable[[], Batch | None]] = []
        if waiting["queued"]:
            sources.append(lambda: self._claim_changes(pipeline, limit, waiting))
        if waiting["unread"] and embed_backfill:
            sources.append(lambda: self._claim_range(pipeline, limit, 0))
        if len(sources) == 2 and self._live_share(pipeline).backfill_first():
            sources.reverse()
        for source in sources:
            batch = source()
            if batch is not None:
                if len(sources) == 2:
                    self._live_share(pipeline).took(backfill=batch.claimed_range is not None)
                return batch
        return None

    def _may_have_work(self, pipeline: Pipeline, live: list[int]) -> bool:
        """Look, and give the locks back at once: in one transaction, those of 1,000 pipelines' tables are too many."""

        def look() -> bool:
            return can_hold_source(self.session, pipeline) and any(self._look(pipeline, live).values())

        return read_and_release(self.session, look)

    def _claim_of_version(
        self, lane: Pipeline, limit: int, live: list[int], is_idle: bool, embed_backfill: bool
    ) -> Batch | None:
        """Claim chunks of a version beside the serving one: new ones before its backfill, suspects alone."""
        session, waiting = self.session, chunk_queue.look(self.session, lane, live)
        if waiting["orphaned"]:
            # Who is alive is asked after the claims were seen: a worker that began in between is not taken for dead.
            chunk_queue.take_over(session, lane, live_workers(session))
            waiting = chunk_queue.look(session, lane, live)
        is_others_turn = lane.lane_id in self._had_suspects and (waiting["queued"] or waiting["unread"])
        self._had_suspects.discard(lane.lane_id)
        claim, is_suspect = None, False
        if waiting["suspected"] and not is_others_turn and (self.worker_id is None or self._isolate()):
            if not is_idle:
                return None
            self._had_suspects.add(lane.lane_id)
            crashes, is_suspect = chunk_queue.most_crashes(session, lane), True
            claim = chunk_queue.claim_lists(session, lane, limit, self.worker_id, crash_count=crashes)
        elif waiting["queued"] or (waiting["unread"] and embed_backfill):
            both = waiting["queued"] and waiting["unread"] and embed_backfill
            backfill_first = both and self._live_share(lane).backfill_first()
            if waiting["queued"] and not backfill_first:
                claim = chunk_queue.claim_lists(session, lane, limit, self.worker_id)
            if claim is None and waiting["unread"] and embed_backfill:
                claim = chunk_queue.claim_range(session, lane, limit, self.worker_id)
            if both and claim is not None:
                self._live_share(lane).took(backfill=claim.of_backfill)
        if claim is None:
            return None
        return Batch(lane, claim.rows, queue_ids=claim.queue_ids, of_backfill=claim.of_backfill, is_suspect=is_suspect)

    def _look(self, pipeline: Pipeline, live: list[int]) -> dict[str, Any]:
        """One statement that says what there is to claim: an idle poll costs no more than this for each pipeline."""
        return self.session.query(
            f"""
            SELECT s.fresh, s.due, s.fresh OR s.due AS queued, s.unread,
                EXISTS (SELECT FROM {pipeline.generated("deleted")})
                OR EXISTS (SELECT FROM {pipeline.generated("lent")}) AS deleted,
                EXISTS (SELECT FROM {pipeline.outbox} WHERE claimed_by IS NULL AND crash_count > 0
                    AND not_before <= (SELECT clock_timestamp()))
                OR EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done
                    AND claimed_by IS NULL AND crash_count > 0) AS suspected,
                EXISTS (SELECT FROM {pipeline.generated("claim")} WHERE claimed_by <> ALL ($1))
                OR EXISTS (SELECT FROM {pipeline.outbox} WHERE claimed_by IS NOT NULL AND claimed_by <> ALL ($1))
                OR EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done
                    AND claimed_by <> ALL ($1)) AS orphaned
            FROM (
                SELECT EXISTS (SELECT FROM {pipeline.generated("inbox")}) AS fresh,
                    -- Asked for the first in the index; for any that is due, all of a long queue would be read in vain.
                    coalesce((SELECT not_before FROM {pipeline.outbox} WHERE claimed_by IS NULL AND crash_count = 0
                        ORDER BY not_before LIMIT 1) <= clock_timestamp(), false) AS due,
                    EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done
                        AND claimed_by IS NULL AND crash_count = 0) AS unread
            ) AS s
            """,
            ["integer[]", "bigint"],
            live,
            pipeline.pipeline_id,
        )[0]

    def _remove_deleted(self, pipeline: Pipeline) -> None:
        """Remove some of what is stored of deleted rows; where it must stay for now, look again a little later."""
        now = time.monotonic()
        look_at, pause = self._deletions_at.get(pipeline.pipeline_id, (0.0, 0.0))
        if self.worker_id is not None and now < look_at:
            return
        if can_hold_source(self.session, pipeline) and deletions.remove_some(self.session, pipeline):
            self.has_removed = True
            self._deletions_at.pop(pipeline.pipeline_id, None)
        else:
            shortest, longest = _DELETIONS_SECONDS
            pause = min(max(2 * pause, shortest), longest)
            self._deletions_at[pipeline.pipeline_id] = now + pause, pause

    def _isolate(self) -> bool:
        """Take the lock under which suspects are tried: one session at a time, so that a crash accuses few others."""
        if not self.is_isolating:
            self.is_isolating = bool(
                self.session.scalar("SELECT pg_try_advisory_lock($1, 0)", ["integer"], SUSPECT_LOCK_CLASS)
            )
        return self.is_isolating

    def _claim_suspects(self, pipeline: Pipeline) -> Batch | None:
        crashes = self.session.scalar(
            f"SELECT max(crash_count) FROM {pipeline.outbox} WHERE claimed_by IS NULL AND crash_count > 0"
            " AND not_before <= (SELECT clock_timestamp())"
        )
        if crashes is not None:
            limit = ROWS_PER_CLAIM_AFTER_CRASHES.get(crashes, 1)
            live = self._lock_claims(pipeline)
            found = outbox.claim_due(self.session, pipeline, limit, self.worker_id, live, crash_count=crashes)
            return Batch(pipeline, found, is_suspect=True) if found else None
        for crashes in (*ROWS_PER_CLAIM_AFTER_CRASHES, max(ROWS_PER_CLAIM_AFTER_CRASHES) + 1):
            batch = self._claim_range(pipeline, ROWS_PER_CLAIM_AFTER_CRASHES.get(crashes, 1), crashes)
            if batch is not None:
                return batch
        return None

    def _claim_range(self, pipeline: Pipeline, limit: int, crashes: int) -> Batch | None:
        claimed = backfill.claim_backfill(self.session, pipeline, limit, self.worker_id, crash_count=crashes)
        return Batch(pipeline, claimed.rows, claimed_range=claimed, is_suspect=crashes > 0) if claimed else None

    def _claim_changes(self, pipeline: Pipeline, limit: int, waiting: dict[str, Any]) -> Batch | None:
        live = self._lock_claims(pipeline)
        if pipeline.tenant is not None:
            if waiting["fresh"]:
                inbox.move_to_outbox(self.session, pipeline, _ROWS_MOVED_FOR_TENANTS)
            found, self._after_tenant[pipeline.pipeline_id] = outbox.claim_in_turns(
                self.session, pipeline, limit, self.worker_id, live, self._after_tenant.get(pipeline.pipeline_id)
            )
            return Batch(pipeline, found) if found else None
        # Retries and new changes of a pipeline take turns: neither starves the other.
        if waiting["due"] and not (waiting["fresh"] and pipeline.pipeline_id in self._had_retries):
            self._had_retries.add(pipeline.pipeline_id)
            found = outbox.claim_due(self.session, pipeline, limit, self.worker_id, live)
            if found:
                return Batch(pipeline, found)
        self._had_retries.discard(pipeline.pipeline_id)
        claimed = inbox.claim_inbox(self.session, pipeline, limit, self.worker_id, live) if waiting["fresh"] else None
        if claimed is None or not claimed.rows:
            return None
        return Batch(pipeline, claimed.rows, claimed.claim_id, enqueued_at=claimed.enqueued_at)

    def _lock_claims(self, pipeline: Pipeline) -> list[int]:
        """Let claims of one pipeline follow each other, each a few milliseconds; return the workers that are alive then.

        So each sees every earlier one, and a key is never in two workers' hands. embed_pending must not hold such a lock
        to the end of its caller's transaction.
        """
        if self.worker_id is not None:
            self.session.query(
                "SELECT pg_advisory_xact_lock($1, $2)", ["integer", "integer"], CLAIM_LOCK_CLASS, pipeline.pipeline_id
            )
        return live_workers(self.session)


def _take_over(session: Session, pipeline: Pipeline) -> None:
    """Free what workers had in hand that are gone; it is under suspicion now."""
    claimants = session.scalar(
        f"""
        SELECT array_agg(DISTINCT c.claimed_by) FROM (
            SELECT claimed_by FROM {pipeline.generated("claim")}
            UNION ALL SELECT claimed_by FROM {pipeline.outbox} WHERE claimed_by IS NOT NULL
            UNION ALL SELECT claimed_by FROM embedline.backfill_range WHERE pipeline_id = $1 AND claimed_by IS NOT NULL
        ) AS c
        """,
        ["bigint"],
        pipeline.pipeline_id,
    )
    # Who is alive is asked after the claims were seen: a worker that began in between is not taken for dead.
    dead = sorted(set(claimants or ()) - set(live_workers(session)))
    if dead:
        inbox.break_claims(session, pipeline, "claimed_by = ANY ($1)", dead, crash_count=1)
        outbox.take_over(session, pipeline, dead)
        backfill.take_over(session, pipeline, dead)


def release_all(session: Session, pipeline: Pipeline, worker_id: int) -> None:
    """Give back whatever a worker that ends in order still has; the tries are not counted."""
    inbox.break_claims(session, pipeline, "claimed_by = ANY ($1)", [worker_id], crash_count=0)
    outbox.release(session, pipeline, worker_id)
    backfill.release(session, pipeline, worker_id)


def release_batch(session: Session, batch: Batch, worker_id: int) -> None:
    """Give back the claim of one batch; the tries are not counted."""
    work_of(batch).release(session, batch, worker_id)
