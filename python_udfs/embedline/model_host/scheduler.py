"""Choose the next texts for the model.

Queries come first, then slices of the document requests in turn. Pure but for one lock: connections put requests in,
the inference thread takes batches out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedline.core.embedding import Kind
    from embedline.core.reranking import Pair
    from embedline.errors import ProviderError

# One text, or for a reranker one pair; both have a length in characters.
Item: TypeAlias = "str | Pair"


@dataclass(frozen=True)
class SliceLimits:
    """The most that one pass through the model takes.

    A query waits for at most one such slice. `characters` counts the model's work: the number of texts times the
    longest of them, because short ones are padded.
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
        self.cancelled = False
        self._deliver = deliver
        # Longest first: equal lengths waste no padding, and a lack of memory shows in the first slice.
        self._waiting = deque(sorted(range(len(texts)), key=lambda index: -len(texts[index])))
        self._rows: NDArray[np.float32] | None = None
        self._missing = len(texts)
        self._done = False

    def has_waiting(self) -> bool:
        return bool(self._waiting) and not self.cancelled and not self._done

    def longest_waiting(self) -> int:
        return len(self.texts[self._waiting[0]])

    def take(self, count: int) -> list[int]:
        """Take the indexes of the next texts."""
        return [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]

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

    def take(self, limits: SliceLimits) -> list[Part]:
        """Wait for work and return one slice.

        It holds parts of one or more requests of the same kind.
        """
        with self._changed:
            while True:
                for queue in self._queues.values():
                    parts = _fill_slice(queue, limits)
                    if parts:
                        return parts
                self._changed.wait()

    def drain(self) -> list[Request]:
        """Take out all requests that wait."""
        with self._changed:
            requests = [request for queue in self._queues.values() for request in queue]
            for queue in self._queues.values():
                queue.clear()
            return requests


def _fill_slice(queue: deque[Request], limits: SliceLimits) -> list[Part]:
    parts: list[Part] = []
    count = longest = 0
    while queue and count < limits.texts:
        request = queue[0]
        if not request.has_waiting():
            queue.popleft()
            continue
        longest = max(longest, request.longest_waiting())
        room = min(limits.texts, limits.characters // max(longest, 1)) - count
        if room <= 0 and parts:
            break
        indexes = request.take(max(room, 1))
        parts.append((request, indexes))
        count += len(indexes)
        if request.has_waiting():
            # The slice is full. The other requests come next, so that a small one does not wait for a whole large one.
            queue.rotate(-1)
            break
        queue.popleft()
    return parts
