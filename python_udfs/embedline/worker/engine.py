"""The engine: the stages of a batch, which callers put into transactions.

`embed_pending` runs all steps in the caller's transaction. The resident worker commits between them, holds no transaction
while a provider works, and has several batches in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from embedline.models.pool import let_cancel_through, wait_first
from embedline.postgres.claims import Claims
from embedline.postgres.session import Session
from embedline.worker import batch_history
from embedline.worker.batch import Batch
from embedline.worker.models import DatabaseModels
from embedline.worker.permits import DatabasePermits
from embedline.worker.stages.defer import Defer
from embedline.worker.stages.embed import Embed
from embedline.worker.stages.failures import Failures
from embedline.worker.stages.prepare import Prepare
from embedline.worker.stages.write import Write

# Seconds between two checks for a cancel.
_CANCEL_SECONDS = 0.1


class Engine:
    """Embeds batches for one session.

    `patience` is how many seconds a batch may wait for a grant of rate limit or budget before its rows are requeued. With
    `begins_batches` what can wait is left to the provider's batch endpoint.
    """

    def __init__(self, session: Session, claims: Claims, patience: float, *, begins_batches: bool = False) -> None:
        self._session = session
        self._claims = claims
        models = DatabaseModels(session)
        self.failures = Failures(models)
        self.embed = Embed(models, DatabasePermits(session, claims), patience)
        self.prepare = Prepare(session, self.embed, self.failures, Defer(session, begins_batches))
        self.write = Write(self.embed, self.failures)

    def run(self, batch: Batch, is_over: Callable[[], bool] = lambda: False) -> None:
        """Take a batch through all stages inside the caller's transaction.

        The statement stays cancellable. `is_over` is asked while the provider is waited for: if it returns True, the rows
        that are not written are requeued.
        """
        check_interrupts = let_cancel_through(self._session)
        self.prepare.read(batch)
        self.prepare.chunk(batch, now_and_then(check_interrupts))
        self.prepare.submit(batch)
        while batch.units:
            self.embed.start(batch)
            if self.write.write_ready(batch):
                continue
            if is_over():
                self._abandon(batch)
                break
            if batch.futures:
                wait_first(batch.futures, check_interrupts, is_over)
                continue
            time.sleep(max(min(batch.grant_at - time.monotonic(), _CANCEL_SECONDS), 0.0))
            check_interrupts()
            if time.monotonic() >= batch.grant_at:
                self.embed.grant(batch)
        self.finish(batch)

    def finish(self, batch: Batch) -> None:
        """End the claim of a batch that is through, and keep its measurements."""
        batch.source.finish(batch.claim)
        batch_history.keep(self._session, self._claims, batch)

    def _abandon(self, batch: Batch) -> None:
        """Requeue the rows that are not written, uncharged."""
        self.embed.abandon(batch)
        units, batch.units = batch.units, []
        batch.requeue(units, 0.0, charged=False, error=None)


def now_and_then(check_interrupts: Callable[[], None]) -> Callable[[], None]:
    """Return a function that checks for interrupts ten times a second at most."""
    last = time.monotonic()

    def rarely() -> None:
        nonlocal last
        if time.monotonic() - last >= _CANCEL_SECONDS:
            check_interrupts()
            last = time.monotonic()

    return rarely
