"""The report of a resident worker in embedline.worker, and its counts."""

from __future__ import annotations

import time
from collections import Counter

from embedline.postgres.session import Session
from embedline.worker.batch import Batch

# Seconds between two reports.
_SECONDS = 1.0
_REPORT = """
    UPDATE embedline.worker SET batch_rows = $2, requests_in_flight = $3, claim_seconds = $4, embed_seconds = $5,
        write_seconds = $6, held_back_by = $7, commit_seconds = $8, reported_at = clock_timestamp()
    WHERE worker_id = $1
"""


class Report:
    """The row of embedline.worker of one worker."""

    def __init__(self, session: Session, worker_id: int) -> None:
        self._session = session
        self._worker_id = worker_id
        self._at = 0.0
        # Documents embedded, by the kind of their source.
        self._embedded = Counter[str]()
        self.claim_seconds = 0.0
        self.commit_seconds = 0.0
        self._embed_seconds = 0.0
        self._write_seconds = 0.0

    @property
    def is_due(self) -> bool:
        """Return True if the last report was over a second ago."""
        return time.monotonic() >= self._at

    def begin(self) -> None:
        """Note that a report begins: one that fails is not tried again at once."""
        self._at = time.monotonic() + _SECONDS

    @property
    def embedded(self) -> str:
        """What this worker has embedded, in words."""
        rows, chunks = self._embedded["pipeline"], self._embedded["version"]
        words = f"{rows:,} row{'' if rows == 1 else 's'} embedded"
        return words if not chunks else f"{words}, {chunks:,} chunk{'' if chunks == 1 else 's'} of versions filled"

    def count(self, batch: Batch) -> None:
        """Count a batch that is through, with its times."""
        self.count_embedded(batch)
        self._write_seconds = batch.longest_write
        if batch.answered_at:
            self._embed_seconds = batch.answered_at - batch.claimed_at

    def count_embedded(self, batch: Batch) -> None:
        """Count the documents of a batch that were embedded."""
        self._embedded[batch.source.key.kind] += batch.embedded_count

    def is_stop_requested(self) -> bool:
        """Return True if this worker is asked to stop."""
        query = "SELECT stop_requested FROM embedline.worker WHERE worker_id = $1"
        return bool(self._session.scalar(query, ["integer"], self._worker_id))

    def write(self, batch_rows: int | None, requests_in_flight: int, held_back_by: str | None) -> None:
        """Show the state of this worker."""
        self._session.query(
            _REPORT,
            ["integer", "integer", "integer", "real", "real", "real", "text", "real"],
            self._worker_id,
            batch_rows,
            requests_in_flight,
            self.claim_seconds,
            self._embed_seconds,
            self._write_seconds,
            held_back_by,
            self.commit_seconds,
        )

    def remove(self) -> None:
        """Remove the row of a worker that ends."""
        self._session.query("DELETE FROM embedline.worker WHERE worker_id = $1", ["integer"], self._worker_id)
