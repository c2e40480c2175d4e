"""Batch size: additive increase, multiplicative decrease by measured times.

Pure: the worker tells what it measured, and asks how many rows its next batch may have.
"""

from __future__ import annotations

from embedline.catalog.settings import PacingLimits

# Content that a batch holds at most; what is beyond it goes back to the queue, and one larger row is read alone.
MAX_BATCH_BYTES = 8 * 1024 * 1024


class Pace:
    """The batch size of one source of work in one worker.

    It doubles until it first is too slow, then grows by steps. A batch is bounded by rows and by bytes of content. How many
    bytes a row has is what the last batches had; before any, it is `row_bytes`, an estimate. `chunk_bytes` is what a chunk
    has at most, by which the first batch's chunks are bounded.

    After TCP's slow start and congestion avoidance (RFC 5681): a size that is too slow is halved, one that is not grows. A
    halving that does not shorten the time is taken back: a far provider is slow at any size.
    """

    _FIRST_ROWS = 1000
    _STEP_ROWS = 100
    # Content of a first batch: eight workers share 800 pages of 8 kB by 32 at a time. And its chunks, if these are small.
    _FIRST_BYTES, _FIRST_CHUNKS = 256 * 1024, 1000
    _MIN_BYTES = 64 * 1024

    def __init__(self, limits: PacingLimits, row_bytes: float = 0.0, chunk_bytes: int | None = None) -> None:
        self._limits = limits
        self._row_bytes = row_bytes
        first = self._FIRST_BYTES if chunk_bytes is None else min(self._FIRST_BYTES, self._FIRST_CHUNKS * chunk_bytes)
        self._bytes = max(first, self._MIN_BYTES)
        self._rows = float(min(max(self._FIRST_ROWS, limits.min_rows), limits.max_rows))
        self._is_starting = True
        # Nothing was measured yet: the bytes of a row are a guess.
        self._is_first = True
        # The last batch that was too slow: its rows and seconds.
        self._halved_at: tuple[int, float] | None = None
        # What batches may take because the provider takes it whatever their size; 0: nothing of the kind.
        self._latency = 0.0

    @property
    def rows(self) -> int:
        """Rows that the next batch may have."""
        likely = self._bytes / self._row_bytes if self._row_bytes else self._rows
        return max(int(min(self._rows, likely)), 1)

    @property
    def is_measured(self) -> bool:
        """Whether the bytes of a row are known from a batch, not guessed."""
        return not self._is_first

    def guess(self, row_bytes: float) -> None:
        """Take note of what a row likely has, before any was read."""
        self._row_bytes = row_bytes

    @property
    def bytes(self) -> int:
        """Bytes of content that the next batch may have; one row may have more."""
        return self._bytes

    def measured(
        self, rows: int, batch_seconds: float, commit_seconds: float, content_bytes: int | None = None
    ) -> None:
        """Take note of a batch and its times.

        They are the seconds from claim to the last answer, and of the longest write with its commit. `content_bytes` is
        what its rows had of content.
        """
        filled = content_bytes is not None and (rows >= 0.9 * self.rows or content_bytes >= 0.9 * self._bytes)
        if content_bytes is not None and rows:
            row_bytes = content_bytes / rows
            self._row_bytes = (self._row_bytes + row_bytes) / 2 if self._row_bytes and not self._is_first else row_bytes
            self._is_first = False
        if commit_seconds > self._limits.commit_seconds:
            self.slow_down()
        elif rows > 1.1 * self._rows:
            # Claimed before the last halving, which answered for it.
            return
        elif batch_seconds > max(self._limits.batch_seconds, self._latency):
            self._answer_slowness(rows, batch_seconds)
        else:
            if batch_seconds <= self._limits.batch_seconds:
                self._latency = 0.0
            self._halved_at = None
            if filled:
                self._bytes = min(self._bytes * 2, MAX_BATCH_BYTES)
            if rows >= 0.9 * self._rows:
                # A batch that had room to spare says nothing about larger ones.
                grown = self._rows * 2 if self._is_starting else self._rows + self._STEP_ROWS
                self._rows = min(grown, float(self._limits.max_rows))

    def _answer_slowness(self, rows: int, batch_seconds: float) -> None:
        """Halve, unless the last halving has not helped.

        Then the time is the provider's latency and not the batch's.
        """
        if self._halved_at is not None and rows <= 0.6 * self._halved_at[0]:
            earlier_rows, earlier_seconds = self._halved_at
            if batch_seconds > 0.75 * earlier_seconds:
                self._rows = min(max(self._rows, float(earlier_rows)), float(self._limits.max_rows))
                self._latency = 1.5 * batch_seconds
                self._halved_at = None
                return
        self.slow_down()
        self._halved_at = rows, batch_seconds

    def slow_down(self) -> None:
        """Halve the batches."""
        self._is_starting = False
        self._rows = max(self._rows / 2, float(self._limits.min_rows))
        self._bytes = max(self._bytes // 2, self._MIN_BYTES)
