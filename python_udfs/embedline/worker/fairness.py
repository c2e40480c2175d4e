"""Whose turn it is: sources by weight, live changes before the backfill."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


class Turns:
    """Whose turn it is: each source gets rows in proportion to its weight.

    Stride scheduling (Waldspurger and Weihl, 1995) over rows claimed. A source's clock advances by rows divided by
    weight, and the source whose clock is behind goes first. One that had nothing to do does not save up turns. One
    that could not be asked for a while, because its provider was busy, keeps its account.
    """

    def __init__(self) -> None:
        self._clocks: dict[Hashable, float] = {}
        self._asked: set[Hashable] = set()

    def order(self, keys: Sequence[K]) -> list[K]:
        """Return the sources, the one whose turn it is first."""
        behind = min((self._clocks[key] for key in keys if key in self._asked), default=0.0)
        for key in keys:
            if key not in self._asked:
                self._clocks[key] = max(self._clocks.get(key, behind), behind)
        self._asked = set(keys)
        return sorted(keys, key=lambda key: self._clocks[key])

    def worked(self, key: Hashable, rows: int, weight: float, had_nothing: Collection[Hashable]) -> None:
        """Advance the clock of a source that worked.

        Those asked before it that had nothing catch up with it.
        """
        self._clocks[key] = self._clocks.get(key, 0.0) + rows / weight
        for idle in had_nothing:
            self._clocks[idle] = max(self._clocks.get(idle, 0.0), self._clocks[key])


class LiveShare:
    """Live changes come first, but leave a backfill its share.

    They have at most `share` of the batches while a backfill has work, too.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit = 1.0 - share

    def backfill_first(self) -> bool:
        """Return True if the backfill is asked before the live changes this time."""
        return self._credit >= 1.0

    def took(self, *, backfill: bool) -> None:
        """Take note whether the batch was one of the backfill."""
        self._credit = max(self._credit - self._share, 0.0) if backfill else min(self._credit + 1.0 - self._share, 2.0)
