"""Choose the next texts for the model.

Queries come first, then slices of the document requests in turn. Pure but for one lock: connections put requests in,
the inference thread takes batches out.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from embedline.model_host.tokens import CHARACTERS_PER_TOKEN

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedline.core.embedding import Kind
    from embedline.core.media import MediaPart
    from embedline.core.reranking import Pair
    from embedline.errors import ProviderError
    from embedline.model_host.tokens import Tokens

# One text, one segment of media, or for a reranker one pair; each has a length in characters.
Item: TypeAlias = "str | Pair | MediaPart"


@dataclass(frozen=True)
class SliceLimits:
    """The most that one pass through the model takes.

    `characters` counts the model's work: the number of texts times the longest of them, because short ones are padded.
    Texts whose tokens are known count by these, each token for four characters.
    """

    texts: int
    characters: int


class Request:
    """The texts of one client request on their way through the model.

    `deliver` is called once, from the inference thread, with all rows in the texts' own order or with an error.
    """

    def __init__(
        self, kind: Kind, texts: Sequence[Item], deliver: Callable[[NDArray[np.float32] | ProviderError], None]
    ) -> None:
        self.kind = kind
        self.texts = texts
        self.tokens: Tokens | None = None
        self.cancelled = False
        # Why segments have no vector, by their places.
        self.faults: dict[int, str] = {}
        self._deliver = deliver
        # Longest first: equal lengths waste no padding, and a lack of memory shows in the first slice.
        self._order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        self._taken = 0
        # Sizes of the texts before each place of the order, once the tokens are known.
        self._totals: list[int] = []
        self._rows: NDArray[np.float32] | None = None
        self._missing = len(texts)
        self._done = False

    def tokenized(self, tokens: Tokens) -> None:
        """Take the texts' tokens, before any text is taken.

        From now on sizes are those of tokens.
        """
        import numpy as np

        order = np.argsort(-tokens.lengths, kind="stable")
        self.tokens, self._order = tokens, order.tolist()
        self._totals = [0, *(CHARACTERS_PER_TOKEN * np.cumsum(tokens.lengths[order], dtype=np.int64)).tolist()]

    def has_waiting(self) -> bool:
        return self._taken < len(self._order) and not self.cancelled and not self._done

    def longest_waiting(self) -> int:
        return len(self.texts[self._order[self._taken]])

    def fitting(self, characters: int) -> int:
        """Return how many of the next texts have tokens for that many characters."""
        return bisect_right(self._totals, self._totals[self._taken] + characters) - 1 - self._taken

    def take(self, count: int) -> list[int]:
        """Take the indexes of the next texts."""
        indexes = self._order[self._taken : self._taken + count]
        self._taken += len(indexes)
        return indexes

    def size_of(self, indexes: list[int]) -> int:
        """Return the size of texts whose tokens are known, in characters."""
        assert self.tokens is not None
        return CHARACTERS_PER_TOKEN * int(self.tokens.lengths[indexes].sum())

    def fill(self, indexes: list[int], rows: NDArray[np.float32]) -> None:
        """Put rows of shape (len(indexes), dimensions) in their places.

        Delivers when none is missing.
        """
        import numpy as np

        if self._done:
            return
        if self._rows is None:
            self._rows = np.empty((len(self.texts), rows.shape[1]), dtype="<f4")
        self._rows[indexes] = rows
        self._missing -= len(indexes)
        if self._missing == 0:
            self._finish(self._rows)

    def fill_missing(self, indexes: list[int], dimensions: int) -> None:
        """Put NaN in the places of segments that have no vector."""
        import numpy as np

        self.fill(indexes, np.full((len(indexes), dimensions), np.nan, dtype="<f4"))

    def fail(self, error: ProviderError) -> None:
        if not self._done:
            self._finish(error)

    def _finish(self, result: NDArray[np.float32] | ProviderError) -> None:
        self._done = True
        self._deliver(result)


Part = tuple[Request, list[int]]


class Scheduler:
    """Requests that wait for the model."""

    def __init__(self) -> None:
        self._queues: dict[Kind, deque[Request]] = {"query": deque(), "document": deque()}
        self._changed = threading.Condition()

    def put(self, request: Request) -> None:
        with self._changed:
            self._queues[request.kind].append(request)
            self._changed.notify()

    def take(self, limits: SliceLimits, wait: bool = True) -> list[Part]:
        """Return one slice, after waiting for work if there is none.

        Without `wait` it may be empty. It holds parts of one or more requests of the same kind.
        """
        with self._changed:
            while True:
                for queue in self._queues.values():
                    parts = _fill_slice(queue, limits)
                    if parts:
                        return parts
                if not wait:
                    return []
                self._changed.wait()

    def drain(self) -> list[Request]:
        """Take out all requests that wait."""
        with self._changed:
            requests = [request for queue in self._queues.values() for request in queue]
            for queue in self._queues.values():
                queue.clear()
            return requests


def _sort(request: Request) -> tuple[bool, bool]:
    return request.tokens is None, isinstance(request.texts[0], str)


def _fill_slice(queue: deque[Request], limits: SliceLimits) -> list[Part]:
    parts: list[Part] = []
    count = longest = size = 0
    while queue and count < limits.texts:
        request = queue[0]
        if not request.has_waiting():
            queue.popleft()
            continue
        # Texts with tokens, texts without, and segments of media go through the model apart.
        if parts and _sort(request) != _sort(parts[0][0]):
            break
        if request.tokens is None:
            longest = max(longest, request.longest_waiting())
            room = min(limits.texts, limits.characters // max(longest, 1)) - count
        else:
            # Texts with tokens are padded in batches of equal lengths, so padding does not count.
            room = min(limits.texts - count, request.fitting(limits.characters - size))
        if room <= 0 and parts:
            break
        indexes = request.take(max(room, 1))
        parts.append((request, indexes))
        count += len(indexes)
        size += request.size_of(indexes) if request.tokens is not None else 0
        if request.has_waiting():
            # The slice is full. The other requests come next, so that a small one does not wait for a whole large one.
            queue.rotate(-1)
            break
        queue.popleft()
    return parts
