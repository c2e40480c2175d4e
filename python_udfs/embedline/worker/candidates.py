"""The sources that a resident worker loads and peeks into, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection

from embedline.catalog.values import WorkKey
from embedline.worker.sources import WorkSources
from embedline.worker.work_source import WorkSource

# Sources that one claim loads and peeks into. The first mostly has work; the locks of their tables are held together.
_CANDIDATES = 8


class Candidates:
    """The sources of the claim that goes on, and those that earlier claims have seen."""

    def __init__(self, sources: WorkSources) -> None:
        self._sources = sources
        # Sources that were loaded last, and all that were ever loaded.
        self.loaded: list[WorkSource] = []
        self.known: dict[WorkKey, WorkSource] = {}
        # The keys of this claim, and all since the last claim that found nothing anywhere.
        self._keys: list[WorkKey] = []
        self._seen: set[WorkKey] = set()

    def load(self, keys: Collection[WorkKey]) -> list[WorkSource]:
        """Return the sources with these keys that workers serve now."""
        found = self._sources.load(keys)
        self.known |= {source.key: source for source in found}
        return found

    def choose(
        self,
        keys: list[WorkKey],
        order: Callable[[list[WorkKey]], list[WorkKey]],
        with_room: Callable[[list[WorkSource]], list[WorkSource]],
    ) -> bool:
        """Load the sources to peek into now; return False if there are more.

        Sources that had nothing, or are blocked, come again after all others.
        """
        ordered = order([key for key in keys if key not in self._seen])
        self.loaded, self._keys = [], []
        while ordered and not with_room(self.loaded):
            chosen, ordered = ordered[:_CANDIDATES], ordered[_CANDIDATES:]
            self.loaded = self.load(chosen)
            self._keys += chosen
        return not ordered

    def note_seen(self, quiet: Collection[WorkKey], *, is_over: bool) -> None:
        """Note the sources that a claim has peeked into, once it has not failed.

        Forget all if the round is over.
        """
        # A signal of a source in which nothing waited is a new one.
        self._seen |= set(self._keys) - set(quiet)
        if is_over:
            self._seen = set()
