"""Note alerts, move old batches and check quality, beside a worker's own work."""

from __future__ import annotations

import time

from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.queue.clock import follow_clock
from embedline.worker import batch_history

# Seconds between two rounds at least. A round takes 10 ms, and 0.4 s with 1,000 pipelines.
_SECONDS = 20.0
# Rounds take this share of the time at most.
_COST_SHARE = 0.005
# Seconds between two questions whether a check of quality is due, and the share of an idle worker's time for checks.
_QUALITY_SECONDS, _QUALITY_SHARE = 30.0, 0.2
# Seconds from a worker's start to its first round and its first such question. The first round of a session plans the
# queries of all alerts, which takes 0.1 to 0.2 s. A worker that starts has rows to claim.
_FIRST_SECONDS, _FIRST_QUALITY_SECONDS = 5.0, 2.0
_QUALITY_STEP = "SELECT embedline._quality_step($1, $2)"


class Housekeeping:
    """The rounds of one worker."""

    def __init__(self, session: Session, pipeline_name: str | None) -> None:
        self._session, self._pipeline_name = session, pipeline_name
        self._due_at = time.monotonic() + _FIRST_SECONDS
        self._quality_due_at, self._quality_seconds = time.monotonic() + _FIRST_QUALITY_SECONDS, 0.0

    def do_round(self, now: float) -> None:
        """Note since when alerts stand and move old batches, if that is due.

        A failure ends no worker and is tried again with the next round.
        """
        if now < self._due_at:
            return
        started = time.monotonic()
        try:
            with self._session.plpy.subtransaction():
                follow_clock(self._session)
                self._session.query("SELECT embedline._note_alerts()")
                batch_history.move_old(self._session)
                self._session.query("SELECT embedline._purge_query_samples()")
                self._session.query("SELECT embedline._purge_loans()")
        except self._session.plpy.SPIError as error:
            if sqlstate_of(error) in ENDING:
                raise
            self._session.plpy.warning(f"embedline worker: alerts could not be noted: {error}")
        self._due_at = now + max(_SECONDS, (time.monotonic() - started) / _COST_SHARE)

    def check_quality(self, now: float) -> bool:
        """Take a step of a check of quality, if one is due; return True if there are more.

        A change that comes meanwhile waits for one step. A failure ends no worker and is tried again with the next round.
        """
        if now < self._quality_due_at:
            return False
        started, progress = time.monotonic(), "idle"
        try:
            with self._session.plpy.subtransaction():
                progress = self._session.scalar(_QUALITY_STEP, ["text", "boolean"], self._pipeline_name, False)
        except self._session.plpy.SPIError as error:
            if sqlstate_of(error) in ENDING:
                raise
            self._session.plpy.warning(f"embedline worker: quality could not be checked: {error}")
        self._quality_seconds += time.monotonic() - started
        if progress == "more":
            return True
        least, share = (_QUALITY_SECONDS, _COST_SHARE) if progress == "idle" else (0.0, _QUALITY_SHARE)
        self._quality_due_at = time.monotonic() + max(least, self._quality_seconds / share)
        self._quality_seconds = 0.0
        return False

    def end(self) -> None:
        """Give up a check of quality that is under way."""
        self._session.scalar(_QUALITY_STEP, ["text", "boolean"], self._pipeline_name, True)
