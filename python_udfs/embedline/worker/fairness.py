"""Whose turn it is: pipelines by weight, live changes before the backfill."""

from __future__ import annotations


class Turns:
    """Whose turn it is among pipelines: each gets rows in proportion to its weight, however large its batches are.

    Stride scheduling (Waldspurger and Weihl, 1995) over rows claimed: a pipeline's clock advances by rows divided by
    weight, and the one whose clock is behind goes first. One that had nothing to do does not save up turns, and one that
    could not be asked for a while, because its provider was busy, keeps its account.
    """

    def __init__(self) -> None:
        self._clocks: dict[int, float] = {}
        self._asked: set[int] = set()

    def order(self, pipeline_ids: list[int]) -> list[int]:
        """Return the pipelines, the one whose turn it is first."""
        behind = min((self._clocks[i] for i in pipeline_ids if i in self._asked), default=0.0)
        for i in pipeline_ids:
            if i not in self._asked:
                self._clocks[i] = max(self._clocks.get(i, behind), behind)
        self._asked = set(pipeline_ids)
        return sorted(pipeline_ids, key=lambda i: self._clocks[i])

    def worked(self, pipeline_id: int, rows: int, weight: float, had_nothing: list[int]) -> None:
        """Advance the clock of a pipeline that worked; those asked before it that had nothing catch up with it."""
        self._clocks[pipeline_id] = self._clocks.get(pipeline_id, 0.0) + rows / weight
        for idle in had_nothing:
            self._clocks[idle] = max(self._clocks.get(idle, 0.0), self._clocks[pipeline_id])


class LiveShare:
    """Live changes come first, but of the batches at most `share` while a backfill has work, too."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit = 1.0 - share

    def backfill_first(self) -> bool:
        """Whether the backfill is asked before the live changes this time."""
        return self._credit >= 1.0

    def took(self, *, backfill: bool) -> None:
        """Take note of which of the two had the batch."""
        self._credit = max(self._credit - self._share, 0.0) if backfill else min(self._credit + 1.0 - self._share, 2.0)
