"""Small recordings of tones, silence, and something like a voice."""

from __future__ import annotations

import io

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 8000
# The first three resonances of vowels, in hertz.
_VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))


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


def voice(seconds: float, seed: int = 0, rate: int = 16_000) -> NDArray[np.float64]:
    """Return samples like speech: vowels of 0.2 s, sung by a gliding pitch."""
    random, count = np.random.default_rng(seed), int(seconds * rate)
    time = np.arange(count) / rate
    pitch = 120 + 25 * np.sin(2 * np.pi * 0.7 * time) + 8 * np.sin(2 * np.pi * 5 * time)
    pulses = np.diff(np.floor(np.cumsum(pitch / rate)), prepend=0.0)
    samples, length = np.zeros(count), rate // 5
    for first in range(0, count, length):
        pulse = pulses[first : first + length]
        hertz = np.fft.rfftfreq(2 * length, 1 / rate)
        # The throat's resonances: centre and width in hertz, and how much of each is heard.
        centres = _VOWELS[random.integers(len(_VOWELS))]
        gain = sum(part / (1 + 1j * (hertz - centre) / width)
                   for centre, width, part in zip(centres, (80, 100, 140), (1, 0.6, 0.3), strict=True))  # fmt: skip
        vowel = np.fft.irfft(np.fft.rfft(pulse, 2 * length) * gain, 2 * length)[: len(pulse)]
        samples[first : first + length] = vowel * np.sqrt(np.hanning(len(vowel)))
    return 0.5 * samples / np.abs(samples).max()
