"""Find the best size of one pass through the model, from real traffic.

No calibration is needed. Small slices keep a processor's caches warm and queries quick; large ones spread the cost of a
call. The best size depends on the model, the backend and the machine. On 2 cores all-MiniLM-L6-v2 reads 28 texts of 900
characters a second in slices of 4, and 17 in slices of 32. Its int8 form is fastest with 1 to 4, a static model with
hundreds.

Pure: the caller passes the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from embedline.model_host.scheduler import SliceLimits

# Longest seconds of the slices that are begun, unless one is a text alone. A query waits for them.
MAX_SLICE_SECONDS = 0.2
LEAST_CHARACTERS = 512
_MOST_CHARACTERS = 1 << 22
# Both sizes in turn, each equally often first and second. Texts get shorter within a request, and other load comes and
# goes.
_TURNS = (0, 1, 1, 0) * 3
_MIN_GAIN = 1.05
# Least filled part of a slice whose time counts for its size.
_FULL = 0.5
_SLOW_IN_A_ROW = 3
_FIRST_REST, _LONGEST_REST = 16, 4096
# Characters per text that bound a slice of very short texts, because each text costs its special tokens.
_CHARACTERS_PER_TEXT = 16


@dataclass
class _Trial:
    """Two sizes against each other: useful characters and seconds of each."""

    sizes: tuple[int, int]
    turn: int = 0
    characters: list[int] = field(default_factory=lambda: [0, 0])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def gain(self) -> float:
        """Return the second size's characters per second over the first one's."""
        rates = [c / max(s, 1e-9) for c, s in zip(self.characters, self.seconds, strict=True)]
        return rates[1] / max(rates[0], 1e-9)


class SliceTuner:
    """Climb from a start towards the fastest size, by factors of two.

    The size never exceeds the limits of memory and of queries.
    """

    def __init__(self, characters: int, most_seconds: float = MAX_SLICE_SECONDS) -> None:
        self._size = characters
        self._most_seconds = most_seconds
        self._ceiling = _MOST_CHARACTERS
        self._trial: _Trial | None = None
        self._steps: list[float] = []
        self._rest = self._rests = _FIRST_REST
        self._slow = 0

    @property
    def limits(self) -> SliceLimits:
        """Return the limits of the next slice."""
        size = self._size if self._trial is None else self._trial.sizes[_TURNS[self._trial.turn]]
        return SliceLimits(texts=max(1, size // _CHARACTERS_PER_TEXT), characters=size)

    def note(self, lengths: list[int], seconds: float) -> None:
        """Learn from a slice of texts of these lengths, in characters, and its seconds."""
        size = self.limits.characters
        if len(lengths) * max(lengths) < _FULL * size:
            return
        if self._is_too_slow(lengths, seconds):
            return
        if self._trial is not None:
            self._continue(self._trial, sum(lengths), seconds)
        elif self._rest > 0:
            self._rest -= 1
        else:
            self._begin(seconds)

    def shrink(self, lengths: list[int]) -> None:
        """Remember a slice that did not fit into memory.

        From now on half of it is the most.
        """
        self._ceiling = max(LEAST_CHARACTERS, min(self._ceiling, len(lengths) * max(lengths) // 2))
        self._settle(min(self._size, self._ceiling))

    def _is_too_slow(self, lengths: list[int], seconds: float) -> bool:
        """Return True if the slice made queries wait too long.

        A few such slices in a row halve the size; one ends a trial.
        """
        if seconds <= self._most_seconds or len(lengths) == 1:
            self._slow = 0
            return False
        if self._trial is not None:
            # The larger size or other load is the reason. In both cases there is no time for a trial.
            self._settle(min(self._trial.sizes))
            return True
        self._slow += 1
        if self._slow >= _SLOW_IN_A_ROW:
            self._settle(max(LEAST_CHARACTERS, self._size // 2))
        return True

    def _begin(self, seconds: float) -> None:
        """Try the next size; `seconds` is the time of a slice of the present one."""
        if not self._steps:
            self._steps = [2.0, 0.5]
        while self._steps:
            candidate = int(self._size * self._steps[0])
            too_slow = candidate > self._size and 2 * seconds > self._most_seconds
            if LEAST_CHARACTERS <= candidate <= self._ceiling and not too_slow:
                self._trial = _Trial((self._size, candidate))
                return
            del self._steps[0]
        self._settle(self._size)

    def _continue(self, trial: _Trial, characters: int, seconds: float) -> None:
        side = _TURNS[trial.turn]
        trial.characters[side] += characters
        trial.seconds[side] += seconds
        trial.turn += 1
        if trial.turn < len(_TURNS):
            return
        self._trial = None
        won = trial.gain >= _MIN_GAIN
        if won:
            # Go on in the same direction, because the way back has just been measured.
            self._size, self._steps = trial.sizes[1], self._steps[:1]
            self._rests = _FIRST_REST
        else:
            del self._steps[0]
        if self._steps:
            self._begin(2 * trial.seconds[won] / len(_TURNS))
        else:
            self._settle(self._size)

    def _settle(self, size: int) -> None:
        """Keep a size for a while, and longer after each trial without a gain."""
        if size != self._size:
            self._rests = _FIRST_REST
        self._size, self._trial, self._steps, self._slow = size, None, [], 0
        self._rest = self._rests
        self._rests = min(_LONGEST_REST, self._rests * 4)
