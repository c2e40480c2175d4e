"""Decode recordings with libsndfile, and choose their segments."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from embedline.chunking.spec import ChunkingSpec
from embedline.core.media import MediaPart
from embedline.errors import InputRejected
from embedline.media.kinds import RECORDINGS, decoding, kind_of, require_size
from embedline.media.places import require_few, starts
from embedline.media.silence import FRAMES_PER_SECOND, quiet_cuts, speechless_cuts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Seconds of the longest recording: 230 MB of samples at the 16 kHz of most models, which the model host holds in its 4096.
MAX_SECONDS = 3600
# Samples a second that are decoded: a telephone has 8000, a studio up to 192,000.
MIN_RATE, MAX_RATE = 1000, 384_000
# Channels of the widest recording that is mixed: 7.1 has 8.
MAX_CHANNELS = 32
# Samples of all channels that are decoded at once, 4 MB.
_BLOCK_SAMPLES = 1 << 20
# Part of a segment that may be missing at its end. Headers of MP3 and Ogg tell the length only about.
_MISSING_SECONDS = 0.25
# What libsndfile tells of a FLAC that was written as it was recorded; its other readers go wrong without a length.
_UNKNOWN_FRAMES = (1 << 63) - 1
_MILLISECONDS = 1000


def segments(data: bytes, spec: ChunkingSpec, on_block: Callable[[], None] = lambda: None) -> list[tuple[int, int]]:
    """Return the places of a recording's segments in milliseconds, in order.

    Only method silence decodes the recording, and calls `on_block` for each block. Raises InputRejected.
    """
    with decoding("audio"), _opened(data) as file:
        length = _milliseconds(_frames(file), file.samplerate)
        if spec.method == "silence":
            found = _quiet_places(file, spec, on_block)
            cuts = [cut for second in found if 0 < (cut := round(second * _MILLISECONDS)) < length]
            edges = [0, *cuts, length]
            require_few(len(edges) - 1, "segments")
            return list(itertools.pairwise(edges))
    if spec.method == "none":
        return [(0, length)]
    size, overlap = round(spec.size * _MILLISECONDS), round(spec.shared * _MILLISECONDS)
    places = starts(length, size, overlap)
    require_few(len(places), "windows")
    return [(start, min(start + size, length)) for start in places]


def samples(part: MediaPart, rate: int) -> NDArray[np.float32]:
    """Return a segment as samples, `rate` of them a second.

    They lie between -1 and 1, and are the mean of all channels. Raises InputRejected.
    """
    import numpy as np
    import soxr

    with decoding("audio"), _opened(part.data) as file:
        frames, own_rate = _frames(file), int(file.samplerate)
        first = part.start * own_rate // _MILLISECONDS
        last = frames if part.end == 0 else min(frames, -(-part.end * own_rate // _MILLISECONDS))
        if first >= last:
            raise InputRejected("the segment lies outside the recording")
        file.seek(first)
        blocks = list(_resampled(_mixed(file, last - first), own_rate, rate, soxr))
        result = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
        wanted = (last - first) * rate / own_rate
        if len(result) < wanted - _MISSING_SECONDS * rate or (not len(result) and wanted >= 1):
            raise InputRejected("the recording is cut short: its end is missing")
        # One sample at 96 kHz is none at 16 kHz; a model reads at least one.
        return result if len(result) else np.zeros(1, dtype=np.float32)


def _opened(data: bytes) -> Any:
    """Open a recording's header."""
    require_size(data, "audio")
    kind = kind_of(data, "audio")
    import soundfile

    file = soundfile.SoundFile(io.BytesIO(data))
    # libsndfile looks for itself; WAVEX is a form of WAV.
    if file.format.removesuffix("EX") not in RECORDINGS:
        file.close()
        raise InputRejected(f"the file begins as {kind} and is none")
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        rate = file.samplerate
        file.close()
        raise InputRejected(f"the recording has {rate} samples a second; {MIN_RATE} to {MAX_RATE} are decoded")
    if not 1 <= file.channels <= MAX_CHANNELS:
        channels = file.channels
        file.close()
        raise InputRejected(f"the recording has {channels} channels; at most {MAX_CHANNELS} are decoded")
    return file


def _frames(file: Any) -> int:
    """Return the samples of one channel."""
    frames = int(file.frames)
    if frames == _UNKNOWN_FRAMES:
        raise InputRejected(
            "the recording does not tell its length", hint="Write it again with a program that knows the end."
        )
    if frames > MAX_SECONDS * int(file.samplerate):
        raise InputRejected(
            f"the recording is longer than {MAX_SECONDS} seconds", hint="Store it in parts, each as a row."
        )
    if frames < 1:
        raise InputRejected("the recording has no samples")
    return frames


def _milliseconds(frames: int, rate: int) -> int:
    return math.ceil(frames * _MILLISECONDS / rate)


def _mixed(file: Any, frames: int) -> Iterator[NDArray[np.float32]]:
    """Yield up to `frames` samples in blocks, the mean of all channels."""
    import numpy as np

    size = max(1, _BLOCK_SAMPLES // int(file.channels))
    while frames > 0:
        block = file.read(min(size, frames), dtype="float32", always_2d=True)
        if not len(block):
            return
        frames -= len(block)
        # Samples of a WAV in floating point may be anything.
        mixed = np.nan_to_num(block.mean(axis=1, dtype=np.float32), nan=0.0, posinf=1.0, neginf=-1.0)
        yield np.clip(mixed, -1.0, 1.0)


def _resampled(blocks: Iterator[NDArray[np.float32]], own: int, rate: int, soxr: Any) -> Iterator[NDArray[np.float32]]:
    if own == rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(own, rate, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    import numpy as np

    yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _quiet_places(file: Any, spec: ChunkingSpec, on_block: Callable[[], None]) -> list[float]:
    """Return the seconds at which to cut, by loudness or by speech."""
    rate = int(file.samplerate)
    blocks = _watched(_mixed(file, MAX_SECONDS * rate), on_block)
    if not spec.option("speech_probability", 0.0):
        return quiet_cuts(_energies(blocks, rate), spec)
    import soxr

    from embedline.media.speech import RATE, STEPS_PER_SECOND, speech_probabilities

    return speechless_cuts(speech_probabilities(_resampled(blocks, rate, RATE, soxr)), STEPS_PER_SECOND, spec)


def _watched(blocks: Iterator[NDArray[np.float32]], on_block: Callable[[], None]) -> Iterator[NDArray[np.float32]]:
    for block in blocks:
        yield block
        on_block()


def _energies(blocks: Iterator[NDArray[np.float32]], rate: int) -> NDArray[np.float32]:
    """Return the mean square of each hundredth of a second."""
    import numpy as np

    frame = rate // FRAMES_PER_SECOND
    kept = np.zeros(0, dtype=np.float32)
    found: list[NDArray[np.float32]] = []
    for block in blocks:
        joined = np.concatenate([kept, block])
        whole = len(joined) // frame * frame
        found.append(np.square(joined[:whole].reshape(-1, frame)).mean(axis=1))
        kept = joined[whole:]
    if len(kept):
        found.append(np.square(kept).mean(keepdims=True))
    return np.concatenate(found) if found else np.zeros(1, dtype=np.float32)
