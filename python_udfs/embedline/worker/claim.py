"""The next claim: whose turn it is, changes or backfill, suspects apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from embedline.catalog.values import WorkKey
from embedline.postgres.claims import Claims
from embedline.postgres.spans import record
from embedline.queue.claim import Claim
from embedline.worker.batch import Batch
from embedline.worker.fairness import LiveShare, Turns
from embedline.worker.meter import Stage
from embedline.worker.permits import Permits
from embedline.worker.work_source import Kind, Waiting, WorkSource


class Claimant:
    """Claims batches for one session."""

    def __init__(self, claims: Claims, permits: Permits, live_share: float, turns: Turns | None = None) -> None:
        self._claims = claims
        self._permits = permits
        self._turns = turns or Turns()
        self._share = live_share
        # One for each source: with one account for all, sources whose turns fell in step with it got nothing or everything.
        self._live_shares: dict[WorkKey, LiveShare] = {}
        self._had_suspects: set[WorkKey] = set()
        self.is_isolating = False
        # Whether this session embeds for a remote worker, and how many rows it takes at once.
        self.is_remote = False
        self.max_rows: int | None = None
        # The source that `claim` was asking when it failed, and those that had nothing when they were asked.
        self.asking: WorkSource | None = None
        self.asked: list[WorkKey] = []
        # Sources with signals in whose tables nothing was found by the last claim.
        self.quiet: list[WorkSource] = []
        # Whether the last `claim` removed what is stored of deleted rows.
        self.has_removed = False
        # Sources whose budget or rate limit lets nothing through, and those that cannot be read, at the moment.
        self.out_of_money: set[WorkKey] = set()
        self.hidden: set[WorkKey] = set()

    def claim(
        self,
        sources: Sequence[WorkSource],
        rows: Callable[[WorkSource], int],
        *,
        is_idle: bool,
        embed_backfill: bool = True,
    ) -> Batch | None:
        """Claim a batch of the source whose turn it is, of at most `rows(source)`.

        Return None if nothing can be claimed. `is_idle` says that the caller has no other batch in flight: only then are
        suspects claimed.
        """
        started = time.perf_counter()
        batch = self._claim(sources, rows, is_idle=is_idle, embed_backfill=embed_backfill)
        if batch is not None:
            # An idle worker asks several times a second; only claims that found rows are told.
            seconds = batch.meter.seconds[Stage.CLAIM] = time.perf_counter() - started
            meter = batch.meter
            record(Stage.CLAIM, seconds, lambda: meter.attributes)
        return batch

    def _claim(
        self,
        sources: Sequence[WorkSource],
        rows: Callable[[WorkSource], int],
        *,
        is_idle: bool,
        embed_backfill: bool,
    ) -> Batch | None:
        if is_idle:
            self.end_isolation()
        self.has_removed = False
        by_key = {source.key: source for source in sources}
        live = self._permits.live_workers()
        self.asked = asked = list[WorkKey]()
        self.quiet = []
        for key in self._turns.order(list(by_key)):
            self.asking = source = by_key[key]
            claim = None
            if not self._is_blocked(source):
                limit = rows(source) if self.max_rows is None else min(rows(source), self.max_rows)
                claim = self._claim_of(source, limit, live, is_idle=is_idle, embed_backfill=embed_backfill)
            else:
                self.has_removed |= source.remove_deleted()
            if claim is not None:
                self._turns.worked(key, len(claim.rows) + 1, source.weight, asked)
                return Batch(source, claim)
            if self.is_isolating:
                return None
            asked.append(key)
        self.asking = None
        return None

    def order(self, keys: list[WorkKey]) -> list[WorkKey]:
        """Return pipelines and versions in the order of their turns."""
        return self._turns.order(keys)

    def set_live_share(self, share: float) -> None:
        """Go on with another share of live changes."""
        if share != self._share:
            self._share, self._live_shares = share, {}

    def end_isolation(self) -> None:
        """Let other sessions have their turn with suspects."""
        if self.is_isolating:
            self.is_isolating = False
            self._permits.end_isolation()

    def _is_blocked(self, source: WorkSource) -> bool:
        if source.pipeline.is_remote and not self.is_remote:
            return True
        if self._is_hidden(source) or not self._permits.is_available(source.pipeline):
            return True
        is_out_of_money = not self._permits.has_money(source.pipeline)
        (self.out_of_money.add if is_out_of_money else self.out_of_money.discard)(source.key)
        return is_out_of_money

    def _is_hidden(self, source: WorkSource) -> bool:
        if not source.is_hidden:
            self.hidden.discard(source.key)
            return False
        if source.key not in self.hidden:
            self.hidden.add(source.key)
            source.record_error(source.hidden_reason())
        return True

    def _claim_of(
        self, source: WorkSource, limit: int, live: list[int], *, is_idle: bool, embed_backfill: bool
    ) -> Claim | None:
        if not source.has_work(live) or not source.can_claim():
            return None
        waiting = source.peek(live)
        if waiting.is_nothing:
            if source.has_signals:
                self.quiet.append(source)
            return None
        if waiting.orphaned:
            source.reclaim_from_dead_workers()
            waiting = source.peek(live)
        if waiting.deleted:
            self.has_removed |= source.remove_deleted()
        # Suspects go a few at a time: the other rows have a turn in between.
        is_others_turn = source.key in self._had_suspects and (waiting.queued or waiting.unread)
        self._had_suspects.discard(source.key)
        if waiting.suspected and not is_others_turn and self._isolate():
            if not is_idle:
                return None
            self._had_suspects.add(source.key)
            return source.claim(Kind.SUSPECTS, limit, waiting)
        return self._claim_sound(source, limit, waiting, embed_backfill=embed_backfill)

    def _claim_sound(self, source: WorkSource, limit: int, waiting: Waiting, *, embed_backfill: bool) -> Claim | None:
        """Claim changes before the backfill, but not them alone."""
        kinds = [Kind.CHANGES] * waiting.queued + [Kind.BACKFILL] * (waiting.unread and embed_backfill)
        share = self._live_shares.setdefault(source.key, LiveShare(self._share)) if len(kinds) == 2 else None
        if share is not None and share.backfill_first():
            kinds.reverse()
        for kind in kinds:
            claim = source.claim(kind, limit, waiting)
            if claim is not None:
                if share is not None:
                    share.took(backfill=claim.of_backfill)
                return claim
        return None

    def _isolate(self) -> bool:
        """Take the right to try suspects.

        A caller's transaction needs none: its crash marks no row.
        """
        if not self._claims.is_resident:
            return True
        self.is_isolating = self.is_isolating or self._permits.isolate()
        return self.is_isolating
