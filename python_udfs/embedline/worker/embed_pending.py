"""Embed what waits inside the caller's transaction."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

from embedline.catalog.health import contain, note_fault
from embedline.catalog.load import load_active_pipelines, load_lanes, load_some
from embedline.catalog.settings import load_settings
from embedline.catalog.source import hidden_source
from embedline.catalog.values import Pipeline
from embedline.core.processes import prepare_environment
from embedline.documents.read import can_hold_source
from embedline.documents.statistics import analyze_grown
from embedline.errors import EmbedlineError, InvalidParameter
from embedline.models import circuit
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.queue import backfill, chunk_queue, inbox, signals
from embedline.worker.batch import Batch
from embedline.worker.claim import Claimant
from embedline.worker.engine import Engine
from embedline.worker.fairness import Turns
from embedline.worker.index_maintenance import maintain_contained, unfinished

_BATCH_ROWS = 1000
# embed_pending waits no longer for a rate limit: its caller waits, too.
_PATIENCE_SECONDS = 2.0
# Pipelines that one embed_pending maintains beside those it worked on, and whose signals it takes away.
_MAINTAINED, _CLEARED = 16, 64
# Whose turn it is for embed_pending, from one call to the next.
_TURNS_KEY = "embedline.turns"


@entry_point
def embed_pending(session: Session, max_rows: int, pipeline_name: str | None) -> int:
    """Embed up to `max_rows` source rows inside the caller's transaction: live changes first, but not them alone."""
    if max_rows < 1:
        raise InvalidParameter("max_rows must be at least 1", hint="SELECT embed_pending(1000);")
    prepare_environment()
    run = _Run(session, max_rows, pipeline_name)
    # Where changes come faster than calls, every call leaves something for the backfill.
    run.embed(_live_rows(session, max_rows), embed_backfill=False)
    is_through = False
    while not is_through:
        is_drained = run.embed(max_rows, embed_backfill=True)
        # Another pipeline's backlog keeps no backfill open. Where the sweep that closes one finds rows, they are next.
        is_through = not run.close_backfills() or not is_drained
    run.clear_signals()
    pipelines = run.all_pipelines()
    for pipeline in run.to_maintain(pipelines):
        maintain_contained(session, pipeline)
    for pipeline in pipelines:
        if pipeline.is_hidden and (hidden := hidden_source(session, pipeline.source_oid)):
            session.plpy.warning(f'pipeline "{pipeline.name}" is held back: {hidden}', hint=hidden.hint or "")
        if circuit.is_open(session, pipeline.version.model.model_id):
            session.plpy.warning(f'model "{pipeline.version.model.config.name}" is unavailable; its rows stay queued')
    if run.refusal is not None:
        session.plpy.warning(f"{run.refusal}; the rows stay queued")
    return run.embedded


def _live_rows(session: Session, max_rows: int) -> int:
    """Return how many live changes go before the backfill. A claim passes its limit to the end of an inbox row."""
    rows = math.ceil(max_rows * load_settings(session).live_share)
    return rows - rows % inbox.KEYS_PER_ROW if rows > inbox.KEYS_PER_ROW else rows


class _Run:
    """One call of embed_pending."""

    def __init__(self, session: Session, max_rows: int, pipeline_name: str | None) -> None:
        self.embedded = 0
        self._session = session
        self._max_rows = max_rows
        self._pipeline_name = pipeline_name
        self._engine = Engine(session, None, _PATIENCE_SECONDS)
        turns = session.cache.setdefault(_TURNS_KEY, Turns())
        # Live changes have had their share when the backfill's turn comes.
        self._claimant = Claimant(session, None, live_share=0.0, turns=turns)
        self._examined = 0
        self._batch_rows = _BATCH_ROWS
        self._written = Counter[int]()
        # Pipelines that failed in this call: they are left alone, and the others go on.
        self._failed: set[int] = set()
        self._claimed: Batch | None = None
        # Those that may have something left, None before the first claim; and those that were embedded.
        self._left: set[int] | None = None
        # The versions beside the serving one, by pipeline: its new chunks wait for them.
        self._lanes = defaultdict[int, set[int]](set)
        self._worked: set[int] = set()

    def all_pipelines(self) -> list[Pipeline]:
        """The pipelines that are embedded."""
        # Versions beside the serving ones come last: their backfills can be closed only after those.
        found = [
            *load_active_pipelines(self._session, self._pipeline_name),
            *load_lanes(self._session, self._pipeline_name),
        ]
        for pipeline in found:
            if pipeline.is_lane:
                self._lanes[pipeline.pipeline_id].add(pipeline.lane_id)
        return [pipeline for pipeline in found if pipeline.lane_id not in self._failed]

    def _pipelines_left(self) -> list[Pipeline]:
        """Those that may have something to claim: of 1,000 pipelines each batch must not load all."""
        if self._left is None:
            return self.all_pipelines()
        return load_some(self._session, self._left - self._failed)

    def to_maintain(self, pipelines: list[Pipeline]) -> list[Pipeline]:
        """Those that were written to or have something unfinished, and a few others: each call may hold so many locks."""
        wanted = self._worked | set(unfinished(self._session, self._pipeline_name))
        others = [pipeline for pipeline in pipelines if pipeline.pipeline_id not in wanted]
        some = random.sample(others, min(len(others), _MAINTAINED))
        return [pipeline for pipeline in pipelines if pipeline.pipeline_id in wanted] + some

    def clear_signals(self) -> None:
        """Take away the signals of what is embedded; without a resident worker no other session does.

        Under a stricter isolation others' signals could not be told from those that this transaction cannot see.
        """
        if self._session.scalar("SELECT current_setting('transaction_isolation')") != "read committed":
            return
        asked = signals.ask(self._session, None, self._pipeline_name)
        for pipeline in load_some(self._session, [i for i in asked.signalled if i not in self._failed][:_CLEARED]):
            if can_hold_source(self._session, pipeline):
                signals.clear(self._session, pipeline, asked.at, asked.live)

    @property
    def refusal(self) -> str | None:
        """Why a budget or a rate limit has kept rows back, where it has."""
        return self._engine.refusal

    def embed(self, limit: int, *, embed_backfill: bool) -> bool:
        """Embed until nothing can be claimed (True) or `limit` rows of this call are embedded (False)."""
        # Rows that end as dead letters or need no embedding do not count as embedded, so a run of them must not end the
        # work; ten times max_rows bounds the transaction all the same.
        self._left = None
        while self.embedded < limit and self._examined < 10 * self._max_rows:
            self._batch_rows = min(_BATCH_ROWS, limit - self.embedded)
            found = self._pipelines_left()
            # A new session knows of no turns: whoever begins, it must not always be the same.
            random.shuffle(found)
            self._claimed = None
            try:
                # Of a batch that fails the claim is undone, too.
                with self._session.plpy.subtransaction():
                    self._claim_and_embed(found, embed_backfill=embed_backfill)
            except (self._session.plpy.SPIError, EmbedlineError) as error:
                self._leave_alone(error)
                continue
            if self._claimed is None:
                if not self._claimant.has_removed:
                    return True
                # More may be removed now.
                self._left = None
        return False

    def _claim_and_embed(self, found: list[Pipeline], *, embed_backfill: bool) -> None:
        batch = self._claimant.claim(found, self._rows, is_idle=True, embed_backfill=embed_backfill)
        self._claimed = batch
        self._left = {pipeline.lane_id for pipeline in found} - set(self._claimant.asked)
        if batch is not None:
            self._worked.add(batch.pipeline.pipeline_id)
            self._examined += max(len(batch.rows), 1)
            self.embedded += self._embed_batch(batch)
            # Asked before, they had nothing; rows that were cut just now are theirs to embed, too.
            self._left |= self._lanes[batch.pipeline.pipeline_id]

    def _leave_alone(self, error: Exception) -> None:
        """Say what failed of one pipeline, in its status and as a WARNING, and go on without it."""
        pipeline = self._claimed.pipeline if self._claimed is not None else self._claimant.asking
        for future in self._claimed.futures if self._claimed is not None else ():
            future.cancel()
        # A serialization failure or a deadlock is the transaction's, not the pipeline's.
        if pipeline is None or sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] == "40":
            raise error
        self._failed.add(pipeline.lane_id)
        note_fault(self._session, pipeline, str(error))
        self._session.plpy.warning(f"embedline, pipeline {pipeline.name}: {error}")

    def _rows(self, pipeline: Pipeline) -> int:
        return self._batch_rows

    def close_backfills(self) -> bool:
        """Close the backfills that are read through; True where there turns out to be more to do."""
        open_ones = [p for p in self.all_pipelines() if p.version.state == "backfilling" and not p.is_hidden]
        return any([self._close(pipeline) for pipeline in open_ones])

    def _close(self, pipeline: Pipeline) -> bool:
        """Close one backfill; where that fails the other pipelines go on."""
        close = chunk_queue.close if pipeline.is_lane else backfill.close_backfill
        return contain(self._session, pipeline, lambda: close(self._session, pipeline))

    def _embed_batch(self, batch: Batch) -> int:
        self._engine.run(batch)
        self._written[batch.pipeline.lane_id] += batch.embedded_count
        if analyze_grown(self._session, batch.pipeline, self._written[batch.pipeline.lane_id]):
            self._written[batch.pipeline.lane_id] = 0
        return batch.embedded_count
