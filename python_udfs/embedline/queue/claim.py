"""A claim as a value: the rows in flight, and where their marks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from embedline.queue.outbox import ClaimedRow


@dataclass
class Claim:
    """Rows that were claimed together, from one queue.

    A worker's marks are in one of four places. Keys of the inbox have a row of the table of claims (`claim_id`), blocks
    of the backfill a range (`range_id`). Chunks have lists of the version's queue (`queue_ids`), and each row of the
    outbox its own number (`outbox_ids`).
    """

    rows: list[ClaimedRow]
    of_backfill: bool = False
    # Rows that were in flight when a worker died, which are tried apart from all others.
    is_suspect: bool = False
    # When the oldest change was made, if the rows come from the inbox.
    enqueued_at: str | None = None
    claim_id: int | None = None
    range_id: int | None = None
    queue_ids: Sequence[int] = field(default_factory=list)
