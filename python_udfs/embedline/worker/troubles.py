"""Sources that fail in a resident worker, and how long each is left alone.

The others must not wait for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from embedline.catalog.values import WorkKey
from embedline.postgres.sqlstates import DISK_FULL, LOCK_NOT_AVAILABLE
from embedline.worker.work_source import WorkSource

# A statement that ran into a lock, a deadlock or a full disk is tried again: the answers are paid for and kept.
PASSING_FAULTS = ("40001", "40P01", DISK_FULL, "53200", "53300", LOCK_NOT_AVAILABLE)
# Faults in a row after which `until_idle` does not wait for a source: they may never pass.
_LASTING_FAULTS = 3
# Seconds until a failed step is tried again: the first time, and at most; each pause is twice the last.
SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
# Faults that last as long as someone else makes them last. However long that is, answers are kept, because the next ones
# would be paid for and lost, too. Memory that is short may be so for this batch alone.
_OUTSIDE_FAULTS = ("40001", "40P01", DISK_FULL, LOCK_NOT_AVAILABLE)
# Seconds for which a batch may keep its claim while its writes fail for another cause, or while its worker is to end.
_PATIENCE_SECONDS = 60.0


class Troubles:
    """Pauses and faults of the sources of one worker."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Until when a source is left alone; its last pause and the sum of all.
        self._asleep: dict[WorkKey, float] = {}
        self._pauses: dict[WorkKey, tuple[float, float]] = {}
        # Faults in a row that do not pass by themselves, and sources whose status shows one.
        self._faults = Counter[WorkKey]()
        self._shown: set[WorkKey] = set()

    def is_asleep(self, key: WorkKey) -> bool:
        """Return True while a source is left alone."""
        return self._asleep.get(key, 0.0) > self._clock()

    def put_off(self, key: WorkKey) -> None:
        """Claim nothing of a source for a while."""
        pause, _ = self._next_pause(key)
        self._asleep[key] = self._clock() + pause

    def put_off_write(self, key: WorkKey, sqlstate: str, *, is_ending: bool) -> tuple[float, bool]:
        """Return when to try a write again, and True if its batch has patience."""
        pause, total = self._next_pause(key)
        is_kept = sqlstate in _OUTSIDE_FAULTS and not is_ending
        return self._clock() + pause, is_kept or total < _PATIENCE_SECONDS

    def count(self, key: WorkKey, sqlstate: str) -> None:
        """Count a fault of a source, unless it is one that passes."""
        if sqlstate not in PASSING_FAULTS:
            self._faults[key] += 1

    def forget(self, key: WorkKey) -> None:
        """Forget the troubles of a source that works."""
        self._pauses.pop(key, None)
        self._faults.pop(key, None)

    @property
    def lasting(self) -> set[WorkKey]:
        """The sources that fail again and again."""
        return {key for key, count in self._faults.items() if count >= _LASTING_FAULTS}

    def show(self, source: WorkSource, message: str) -> None:
        """Show in the status of a source why nothing could be claimed of it."""
        source.record_fault(message)
        self._shown.add(source.key)

    def forget_answered(self, sources: Iterable[WorkSource], answered: Collection[WorkKey]) -> None:
        """Forget the faults of sources that had an answer, and show them no longer."""
        if not (self._shown or self._faults):
            return
        for source in sources:
            if source.key in answered:
                self._faults.pop(source.key, None)
                if source.key in self._shown:
                    source.forget_error()
                    self._shown.discard(source.key)

    def _next_pause(self, key: WorkKey) -> tuple[float, float]:
        """Return the next pause after a failure, and the sum of all, in seconds."""
        last, total = self._pauses.get(key, (0.0, 0.0))
        pause = min(max(2 * last, SHORTEST_PAUSE), _LONGEST_PAUSE)
        self._pauses[key] = pause, total + pause
        return pause, total + pause
