"""Decide about rows whose content cannot be read."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.core.retry import MAX_ATTEMPTS, backoff_seconds
from embedline.postgres.sqlstates import OF_A_ROW, sqlstate_of
from embedline.queue.claim import Claim
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.worker.work_source import WorkSource


def fail_unread(source: WorkSource, claim: Claim, failed: Sequence[tuple[ClaimedRow, Exception]]) -> list[ClaimedRow]:
    """Give up rows that cannot be read, or put them back and return them."""
    letters, put_back = [], []
    for row, error in failed:
        state, message = sqlstate_of(error), str(error).removeprefix("spiexceptions.")
        if state[:2] in OF_A_ROW or row.attempts >= MAX_ATTEMPTS:
            letters.append(DeadLetter(row, "read", state, message, None))
        else:
            source.requeue(claim, [row], backoff_seconds(row.attempts), charged=True, error=message)
            put_back.append(row)
    if letters:
        source.quarantine(claim, letters)
    return put_back
