"""Small recordings of tones and silence."""

from __future__ import annotations

import io

import numpy as np
import soundfile

RATE = 8000


def recording(*parts: float | None, seconds: float = 1.0, loudness: float = 0.5, form: str = "WAV") -> bytes:
    """Return a file with a part for each value: a tone above a level from -1 to 1, or silence for None.

    The levels set recordings apart for the model of tests/towers_model.py, which hears means.
    """
    time = np.arange(int(seconds * RATE)) / RATE
    tone = loudness * np.sin(2 * np.pi * 440 * time)
    samples = [np.zeros_like(time) if part is None else np.clip(tone + part / 2, -1, 1) for part in parts]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(samples), RATE, format=form)
    return file.getvalue()
