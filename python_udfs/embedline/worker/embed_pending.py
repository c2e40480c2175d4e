"""Embed what waits inside the caller's transaction."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

from embedline.catalog.health import isolate_failure
from embedline.catalog.settings import load_settings
from embedline.catalog.source import hidden_source
from embedline.catalog.values import WorkKey
from embedline.core.processes import prepare_environment
from embedline.documents.statistics import analyze_grown
from embedline.errors import EmbedlineError, InvalidParameter
from embedline.models import circuit
from embedline.postgres.claims import CALLERS_TRANSACTION
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.queue import inbox, signals
from embedline.worker.batch import Batch
from embedline.worker.claim import Claimant
from embedline.worker.derivation import derive_all
from embedline.worker.engine import Engine
from embedline.worker.fairness import Turns
from embedline.worker.index_maintenance import unfinished
from embedline.worker.permits import DatabasePermits
from embedline.worker.sources import WorkSources
from embedline.worker.work_source import WorkSource

# Rows of a batch at most.
_BATCH_ROWS = 1000
# Seconds to wait for a rate limit: the caller waits, too.
_PATIENCE_SECONDS = 2.0
# Pipelines that one call maintains beside those it worked on, and pipelines whose signals it removes.
_MAINTAINED, _CLEARED = 16, 64
# Key of the turns that a session keeps from one call to the next.
_TURNS_KEY = "embedline.turns"


@entry_point
def embed_pending(session: Session, max_rows: int, pipeline_name: str | None) -> int:
    """Embed up to `max_rows` source rows inside the caller's transaction.

    Live changes come first, but not alone.
    """
    if max_rows < 1:
        raise InvalidParameter("max_rows must be at least 1", hint="SELECT embed_pending(1000);")
    prepare_environment()
    run = _Run(session, max_rows, pipeline_name)
    # If changes come faster than calls, every call leaves something for the backfill.
    run.embed(_live_rows(session, max_rows), embed_backfill=False)
    is_through = False
    while not is_through:
        is_drained = run.embed(max_rows, embed_backfill=True)
        # Another pipeline's backlog keeps no backfill open. If the sweep that closes one finds rows, they are next.
        is_through = not run.close_backfills() or not is_drained
    run.clear_signals()
    derive_all(session, pipeline_name)
    sources = run.all_sources()
    for source in run.to_maintain(sources):
        source.maintain()
    for pipeline in [source.pipeline for source in sources]:
        if pipeline.is_hidden and (hidden := hidden_source(session, pipeline.source_oid)):
            session.plpy.warning(f'pipeline "{pipeline.name}" is held back: {hidden}', hint=hidden.hint or "")
        if circuit.is_open(session, pipeline.version.model.model_id):
            session.plpy.warning(f'model "{pipeline.version.model.config.name}" is unavailable; its rows stay queued')
    if run.refusal is not None:
        session.plpy.warning(f"{run.refusal}; the rows stay queued")
    return run.embedded


def _live_rows(session: Session, max_rows: int) -> int:
    """Return how many live changes go before the backfill.

    A claim passes its limit to the end of an inbox row.
    """
    rows = math.ceil(max_rows * load_settings(session).live_share)
    return rows - rows % inbox.KEYS_PER_ROW if rows > inbox.KEYS_PER_ROW else rows


class _Run:
    """One call of embed_pending."""

    def __init__(self, session: Session, max_rows: int, pipeline_name: str | None) -> None:
        self.embedded = 0
        self._session = session
        self._max_rows = max_rows
        self._pipeline_name = pipeline_name
        self._engine = Engine(session, CALLERS_TRANSACTION, _PATIENCE_SECONDS)
        self._sources = WorkSources(session, CALLERS_TRANSACTION)
        turns = session.cache.setdefault(_TURNS_KEY, Turns())
        # Live changes have had their share when the backfill's turn comes.
        self._claimant = Claimant(
            CALLERS_TRANSACTION, DatabasePermits(session, CALLERS_TRANSACTION), live_share=0.0, turns=turns
        )
        self._examined = 0
        self._batch_rows = _BATCH_ROWS
        self._written = Counter[WorkKey]()
        # Sources that failed in this call: they are left alone, and the others go on.
        self._failed: set[WorkKey] = set()
        self._claimed: Batch | None = None
        # Sources that may have something left, None before the first claim; and pipelines that were embedded.
        self._left: set[WorkKey] | None = None
        # The versions that are filled, by pipeline: new chunks of the pipeline wait for them.
        self._fills = defaultdict[int, set[WorkKey]](set)
        self._worked: set[int] = set()

    def all_sources(self) -> list[WorkSource]:
        """Return the sources that are embedded."""
        found = self._sources.load_active(self._pipeline_name)
        for source in found:
            if source.key.kind == "version":
                self._fills[source.pipeline.pipeline_id].add(source.key)
        return [source for source in found if source.key not in self._failed]

    def _sources_left(self) -> list[WorkSource]:
        """Return the sources that may have something to claim.

        Of 1,000 pipelines each batch must not load all.
        """
        if self._left is None:
            return self.all_sources()
        return self._sources.load(self._left - self._failed)

    def to_maintain(self, sources: list[WorkSource]) -> list[WorkSource]:
        """Return the sources with writes or unfinished builds, and a few others.

        Not all, because the maintenance of each takes locks.
        """
        wanted = self._worked | set(unfinished(self._session, self._pipeline_name))
        others = [source for source in sources if source.pipeline.pipeline_id not in wanted]
        some = random.sample(others, min(len(others), _MAINTAINED))
        return [source for source in sources if source.pipeline.pipeline_id in wanted] + some

    def clear_signals(self) -> None:
        """Remove the signals of pipelines that are embedded.

        Without a resident worker no other session does. Under a stricter isolation, signals of other sessions could not be
        told from those that this transaction cannot see.
        """
        if self._session.scalar("SELECT current_setting('transaction_isolation')") != "read committed":
            return
        asked = signals.ask(self._session, CALLERS_TRANSACTION, self._pipeline_name)
        signalled = [WorkKey("pipeline", pipeline_id) for pipeline_id in asked.signalled]
        for source in self._sources.load([key for key in signalled if key not in self._failed][:_CLEARED]):
            if source.can_claim():
                source.clear_signals(asked)

    @property
    def refusal(self) -> str | None:
        """Why a budget or a rate limit has held rows back, if one has."""
        return self._engine.embed.refusal

    def embed(self, limit: int, *, embed_backfill: bool) -> bool:
        """Embed up to `limit` rows; return True if nothing more can be claimed."""
        # Rows that end as dead letters or need no vector do not count as embedded, so a run of them does not end the
        # work. Ten times max_rows bounds the transaction all the same.
        self._left = None
        while self.embedded < limit and self._examined < 10 * self._max_rows:
            self._batch_rows = min(_BATCH_ROWS, limit - self.embedded)
            found = self._sources_left()
            # A new session has no scheduling history. Shuffle, so that the first source is not always the same.
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

    def _claim_and_embed(self, found: list[WorkSource], *, embed_backfill: bool) -> None:
        batch = self._claimant.claim(found, self._rows, is_idle=True, embed_backfill=embed_backfill)
        self._claimed = batch
        self._left = {source.key for source in found} - set(self._claimant.asked)
        if batch is not None:
            self._worked.add(batch.pipeline.pipeline_id)
            self._examined += max(len(batch.rows), 1)
            self.embedded += self._embed_batch(batch)
            # Asked before, they had nothing; the chunks that were cut just now are theirs to embed, too.
            self._left |= self._fills[batch.pipeline.pipeline_id]

    def _leave_alone(self, error: Exception) -> None:
        """Show in status and WARNING that one source fails, and go on without it."""
        source = self._claimed.source if self._claimed is not None else self._claimant.asking
        for future in self._claimed.futures if self._claimed is not None else ():
            future.cancel()
        # A serialization failure or a deadlock is the transaction's, not the pipeline's.
        if source is None or sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] == "40":
            raise error
        self._failed.add(source.key)
        source.record_fault(str(error))
        self._session.plpy.warning(f"embedline, pipeline {source.pipeline.name}: {error}")

    def _rows(self, source: WorkSource) -> int:
        return self._batch_rows

    def close_backfills(self) -> bool:
        """Close the backfills that are read through.

        Return True if sweeps found more to embed.
        """
        sources = [
            s for s in self.all_sources() if s.pipeline.version.state == "backfilling" and not s.pipeline.is_hidden
        ]
        # If one fails the other pipelines go on.
        return any([isolate_failure(self._session, source.pipeline, source.close) for source in sources])

    def _embed_batch(self, batch: Batch) -> int:
        self._engine.run(batch)
        self._written[batch.source.key] += batch.embedded_count
        if analyze_grown(self._session, batch.pipeline, self._written[batch.source.key]):
            self._written[batch.source.key] = 0
        return batch.embedded_count
