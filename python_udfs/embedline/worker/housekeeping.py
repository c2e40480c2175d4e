"""Note alerts and move old batches, beside a resident worker's own work."""

from __future__ import annotations

import time

from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.worker import batch_history

# Seconds between two rounds at least. A round takes 10 ms, and 0.4 s with 1,000 pipelines.
_SECONDS = 20.0
# Rounds take this share of the time at most.
_COST_SHARE = 0.005


class Housekeeping:
    """The rounds of one worker."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._due_at = 0.0

    def do_round(self, now: float) -> None:
        """Note since when alerts stand and move old batches, if that is due.

        A failure ends no worker and is tried again with the next round.
        """
        if now < self._due_at:
            return
        started = time.monotonic()
        try:
            with self._session.plpy.subtransaction():
                self._session.query("SELECT embedline._note_alerts()")
                batch_history.move_old(self._session)
        except self._session.plpy.SPIError as error:
            if sqlstate_of(error) in ENDING:
                raise
            self._session.plpy.warning(f"embedline worker: alerts could not be noted: {error}")
        self._due_at = now + max(_SECONDS, (time.monotonic() - started) / _COST_SHARE)
