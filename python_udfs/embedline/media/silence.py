"""Find where a recording is quiet, or without speech, and cut it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedline.chunking.spec import ChunkingSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Frames whose energy is measured, a second. Syllables take 0.1 s, so gaps between them show and those within none.
FRAMES_PER_SECOND = 100
# Decibels of full scale under which a whole recording is silence: half a step of 16 bits is at -96.
_FLOOR_DECIBELS = -90.0
# A longer segment is cut at its quietest place, but leaves at least this part of the longest.
_SHORTEST_PART = 0.5
# Frames over which the quietest place is sought, so that no single zero between two waves is taken.
_SMOOTHED = 10


def quiet_cuts(energies: NDArray[np.float32], spec: ChunkingSpec) -> list[float]:
    """Return the seconds at which to cut, from the mean square of each frame.

    Each pause of at least `shortest_silence` is cut in its middle; one at the beginning or the end is not. What is still
    longer than `longest_seconds` is cut at its quietest places. Silence alone is not cut.
    """
    import numpy as np

    with np.errstate(divide="ignore"):
        decibels = 10 * np.log10(energies.astype(np.float64))
    loudest = float(decibels.max())
    if loudest < _FLOOR_DECIBELS:
        return []
    return _cuts(energies, decibels < loudest + spec.media_option("silence_decibels"), spec)


def speechless_cuts(probabilities: NDArray[np.float32], steps_per_second: float, spec: ChunkingSpec) -> list[float]:
    """Return the seconds at which to cut, from the probability of speech in each step.

    A place is quiet if that is below `speech_probability`, however loud it is.
    """
    import numpy as np

    frames = max(1, round(len(probabilities) / steps_per_second * FRAMES_PER_SECOND))
    steps = (np.arange(frames) * (steps_per_second / FRAMES_PER_SECOND)).astype(np.int64)
    speech = probabilities[np.minimum(steps, len(probabilities) - 1)]
    return _cuts(speech, speech < spec.option("speech_probability", 0.0), spec)


def _cuts(loudness: NDArray[np.float32], quiet: NDArray[np.bool_], spec: ChunkingSpec) -> list[float]:
    import numpy as np

    shortest = spec.media_option("shortest_silence") * FRAMES_PER_SECOND
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
    runs = [(first, last) for first, last in edges.reshape(-1, 2).tolist() if last - first >= shortest]
    cuts = [(first + last) // 2 for first, last in runs if first > 0 and last < len(quiet)]
    longest = max(2, round(spec.media_option("longest_seconds") * FRAMES_PER_SECOND))
    smoothed = np.convolve(loudness, np.ones(_SMOOTHED) / _SMOOTHED, mode="same")[: len(loudness)]
    found: list[int] = []
    start = 0
    for end in [*cuts, len(quiet)]:
        while end - start > longest:
            first = start + max(1, int(longest * _SHORTEST_PART))
            start = first + int(smoothed[first : start + longest].argmin())
            found.append(start)
        if end < len(quiet):
            found.append(end)
            start = end
    return [frame / FRAMES_PER_SECOND for frame in found]
