"""WorkSource: the interface to one kind of work of one pipeline.

It stands for a queue and for the tables of its results. Its signatures hold values alone. The connection and the form
of the claims are the implementation's. So a worker outside the database can have an implementation that calls SQL
functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from embedline.catalog.values import Pipeline, WorkKey
from embedline.documents.values import Document, Vector
from embedline.queue.claim import Claim
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.queue.signals import Asked

# Seconds until a row that an application has locked is tried again; the try is not charged.
BUSY_SECONDS = 0.1
# Bytes of content of a row, if nothing is known of it: two chunks.
LIKELY_ROW_BYTES = 2000.0


class Kind(Enum):
    """What a claim is taken of."""

    CHANGES = "changes"
    BACKFILL = "backfill"
    # Rows that were in flight when a worker died.
    SUSPECTS = "suspects"


@dataclass(frozen=True)
class Waiting:
    """What a queue holds, as one statement sees it.

    `fresh` changes were never tried, `due` ones wait in the outbox; `queued` means either. `unread` is an open backfill.
    `deleted` rows have left vectors behind. `orphaned` rows are claimed by a worker that is gone.
    """

    fresh: bool = False
    due: bool = False
    queued: bool = False
    unread: bool = False
    deleted: bool = False
    suspected: bool = False
    orphaned: bool = False

    @property
    def is_nothing(self) -> bool:
        """Return True if the queue is empty."""
        return not (self.queued or self.unread or self.deleted or self.suspected or self.orphaned)


@dataclass
class Reading:
    """What was read of a claim: documents that need vectors.

    The other rows are settled, or back in the queue.
    """

    documents: list[Document] = field(default_factory=list)
    content_bytes: int = 0
    # Rows that went back to the queue because the claim's contents were too large for one batch.
    deferred_count: int = 0


class WorkSource(Protocol):
    """The work of one kind of one pipeline."""

    @property
    def pipeline(self) -> Pipeline:
        """Return the pipeline with the version that is embedded, as it was loaded."""

    @property
    def key(self) -> WorkKey:
        """Return what tells this work apart from other work."""

    @property
    def weight(self) -> float:
        """Return the share of the workers that this work has."""

    @property
    def is_hidden(self) -> bool:
        """Return True if source rows are hidden, so that nothing may be read."""

    @property
    def has_signals(self) -> bool:
        """Return True if writers leave signals for this work.

        They are removed once nothing waits.
        """

    @property
    def may_cut(self) -> bool:
        """Return True if texts may be cut into other chunks."""

    # Claiming

    def can_claim(self) -> bool:
        """Take the locks that a claim needs first.

        Return False if an application has them.
        """

    def has_work(self, live: Sequence[int]) -> bool:
        """Return False if a glance that leaves no lock behind finds nothing."""

    def peek(self, live: Sequence[int]) -> Waiting:
        """Return what can be claimed; `live` are the workers whose claims count."""

    def claim(self, kind: Kind, limit: int, waiting: Waiting) -> Claim | None:
        """Claim about `limit` rows of a kind, as `waiting` has found the queue.

        Return None if none is free.
        """

    def reclaim_from_dead_workers(self) -> None:
        """Free the rows of workers that are gone; they are suspected from now on."""

    def remove_deleted(self) -> bool:
        """Remove some of what is stored of deleted rows.

        Return True if there was something to remove.
        """

    # One batch

    def read(self, claim: Claim, rows: Sequence[ClaimedRow], max_bytes: int) -> Reading:
        """Read rows of a claim, up to `max_bytes` of content.

        Settle those that need no vector.
        """

    def known_vectors(self, documents: Sequence[Document]) -> dict[bytes, Vector]:
        """Return the vectors of the documents' chunks that are stored already, by digest."""

    def write(self, claim: Claim, documents: Sequence[Document], vectors: Mapping[bytes, Vector]) -> list[int]:
        """Write the documents that have not changed.

        Return their indexes. All others are settled or requeued.
        """

    def settle(self, rows: Sequence[ClaimedRow]) -> None:
        """Remove rows from the queue that need nothing more."""

    def requeue(
        self, claim: Claim, rows: Sequence[ClaimedRow], delay: float, *, charged: bool, error: str | None
    ) -> list[int]:
        """Put rows back into the queue, to be tried again after a delay.

        Return the numbers of their entries. Only a `charged` try counts.
        """

    def quarantine(self, claim: Claim, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters and settle their rows.

        Rows that another session has locked are requeued.
        """

    def finish(self, claim: Claim) -> None:
        """End a claim all of whose rows are settled."""

    def release(self, claim: Claim) -> None:
        """End a claim and free its rows; the tries are not counted."""

    # The work as a whole

    def close(self) -> bool:
        """Close the backfill if it is through; return True if a sweep found more to embed."""

    def clear_signals(self, asked: Asked) -> None:
        """Remove the signals that were due when all were asked, if nothing waits."""

    def maintain(self) -> None:
        """Maintain what belongs to the work, such as indexes.

        A failure is shown and does not raise.
        """

    def record_error(self, message: str) -> None:
        """Show an error where the people on call look."""

    def forget_error(self) -> None:
        """Remove the error that was shown at loading, unless there is another now."""

    def record_fault(self, message: str) -> None:
        """Show why nothing can be claimed; wait for no lock."""

    def hidden_reason(self) -> str:
        """Return why rows of the source are hidden, and the remedy."""

    def likely_row_bytes(self) -> float | None:
        """Return the likely content of a row in bytes; None if that cannot be asked now."""
