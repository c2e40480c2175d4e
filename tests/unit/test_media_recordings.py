"""Any bytes in a column of audio end as segments, or are rejected with a reason."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedline.chunking.spec import ChunkingSpec, chunking_spec
from embedline.core.media import MAX_MEDIA_BYTES, MediaPart
from embedline.errors import InputRejected
from embedline.media import audio
from media_files import encoded, picture, recorded, tone

_RATE = 16_000
_KINDS = (("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("AIFF", None))
_WHOLE = chunking_spec("none", None, None, {}, "audio")


def _spec(method: str, **options: float) -> ChunkingSpec:
    return chunking_spec(method, None, None, options, "audio")


def _decoded(data: bytes, place: tuple[int, int] = (0, 0), rate: int = _RATE) -> np.ndarray:
    return audio.samples(MediaPart("audio", data, *place), rate)


def _rejected(data: bytes, spec: ChunkingSpec = _WHOLE) -> str:
    """Return the reason for which a file is rejected."""
    with pytest.raises(InputRejected) as caught:
        for place in audio.segments(data, spec):
            _decoded(data, place)
    reason = caught.value.message
    assert "\n" not in reason and "BytesIO" not in reason
    return reason


def _hertz(samples: np.ndarray, rate: int = _RATE) -> float:
    """Return the loudest frequency."""
    return float(np.fft.rfftfreq(len(samples), 1 / rate)[np.abs(np.fft.rfft(samples)).argmax()])


@pytest.mark.parametrize(("kind", "subtype"), _KINDS)
def test_each_kind_of_file_is_read_whole(kind: str, subtype: str | None) -> None:
    data = recorded(tone(1.5), kind=kind, subtype=subtype)
    ((start, end),) = audio.segments(data, _WHOLE)
    assert start == 0 and end == pytest.approx(1500, abs=60)
    decoded = _decoded(data)
    assert decoded.dtype == np.float32 and decoded.ndim == 1
    assert len(decoded) == pytest.approx(1.5 * _RATE, abs=0.06 * _RATE)
    assert _hertz(decoded) == pytest.approx(440, abs=2)
    # The last samples of Opus are louder.
    assert np.quantile(np.abs(decoded), 0.99) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("own", [8000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("rate", [8000, 16_000, 48_000])
def test_each_rate_becomes_that_of_the_model(own: int, rate: int) -> None:
    data = recorded(tone(0.7, own), own)
    decoded = _decoded(data, rate=rate)
    assert abs(len(decoded) - 0.7 * rate) <= 3
    assert _hertz(decoded, rate) == pytest.approx(440, abs=3)


def test_a_tone_that_the_rate_cannot_hold_is_filtered() -> None:
    decoded = _decoded(recorded(tone(1, 48_000, hertz=12_000), 48_000))
    assert np.abs(decoded[1000:-1000]).max() < 0.01


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_each_depth_has_the_same_scale(subtype: str) -> None:
    decoded = _decoded(recorded(tone(0.2), subtype=subtype))
    np.testing.assert_allclose(decoded, tone(0.2), atol=0.02)


def test_channels_are_mixed() -> None:
    stereo = np.stack([tone(0.5), np.zeros(8000, dtype=np.float32)], axis=1)
    np.testing.assert_allclose(_decoded(recorded(stereo)), tone(0.5) / 2, atol=1e-3)
    eight = np.repeat(tone(0.5)[:, None], 8, axis=1)
    np.testing.assert_allclose(_decoded(recorded(eight)), tone(0.5), atol=1e-3)


def test_samples_that_are_no_numbers_stay_within_the_scale() -> None:
    wild = np.array([np.nan, np.inf, -np.inf, 1e30, 0.25], dtype=np.float32)
    assert _decoded(recorded(wild, subtype="FLOAT")).tolist() == [0.0, 1.0, -1.0, 1.0, 0.25]


@pytest.mark.parametrize("rate", [8000, 16_000, 96_000])
def test_a_single_sample_is_a_recording(rate: int) -> None:
    data = recorded(np.array([0.5], dtype=np.float32), rate)
    assert audio.segments(data, _WHOLE) == [(0, 1)]
    for method in ("windows", "silence"):
        assert audio.segments(data, _spec(method)) == [(0, 1)]
    assert len(_decoded(data)) >= 1


@pytest.mark.parametrize("samples", [np.zeros(32_000, dtype=np.float32), np.full(32_000, 1e-5, dtype=np.float32)])
def test_silence_alone_is_one_segment(samples: np.ndarray) -> None:
    data = recorded(samples)
    assert audio.segments(data, _spec("silence")) == [(0, 2000)]
    assert np.abs(_decoded(data)).max() < 1e-4


def test_pauses_are_cut_in_their_middle() -> None:
    pause, short = np.zeros(_RATE // 2, dtype=np.float32), np.zeros(_RATE // 10, dtype=np.float32)
    parts = [pause, tone(1), short, tone(1), pause, tone(2, hertz=880), pause]
    data = recorded(np.concatenate(parts))
    first, second = audio.segments(data, _spec("silence"))
    assert (first[0], second[1]) == (0, 5600)
    assert first[1] == second[0] == pytest.approx(2850, abs=20)
    assert _hertz(_decoded(data, first)) == pytest.approx(440, abs=2)
    assert _hertz(_decoded(data, second)) == pytest.approx(880, abs=2)
    assert len(audio.segments(data, _spec("silence", shortest_silence=0.08))) == 3


def test_a_pause_is_quiet_beside_the_rest_and_not_by_itself() -> None:
    rng = np.random.default_rng(5)
    for scale in (1.0, 0.01):
        noise = (rng.normal(size=_RATE) * 0.0005).astype(np.float32)
        samples = np.concatenate([tone(1), noise, tone(1)]) * scale
        data = recorded(samples.astype(np.float32), subtype="FLOAT")
        assert len(audio.segments(data, _spec("silence"))) == 2
        assert len(audio.segments(data, _spec("silence", silence_decibels=-80))) == 1


def test_what_is_still_too_long_is_cut_at_its_quietest_place() -> None:
    samples = tone(10)
    samples[round(7.0 * _RATE) : round(7.2 * _RATE)] *= 0.2
    places = audio.segments(recorded(samples), _spec("silence", longest_seconds=8))
    assert len(places) == 2
    assert places[0][1] == pytest.approx(7100, abs=100)
    places = audio.segments(recorded(tone(20)), _spec("silence", longest_seconds=3))
    assert all(1000 <= end - start <= 3000 for start, end in places[:-1])


@given(
    milliseconds=st.integers(1, 9000),
    window=st.floats(0.1, 4),
    share=st.floats(0, 0.5),
    rate=st.sampled_from([1000, 8000, 11_025]),
)
@settings(deadline=None, max_examples=60)
def test_windows_cover_the_recording_in_order(milliseconds: int, window: float, share: float, rate: int) -> None:
    frames = max(1, milliseconds * rate // 1000)
    data = recorded(np.zeros(frames, dtype=np.float32), rate)
    spec = _spec("windows", window_seconds=window, window_overlap=window * share)
    places = audio.segments(data, spec)
    assert places[0][0] == 0 and places[-1][1] == -(-frames * 1000 // rate)
    assert all(before < after for before, after in pairwise(places))
    assert all(after[0] <= before[1] for before, after in pairwise(places))
    size = round(window * 1000)
    assert len(places) == 1 or all(end - start == size for start, end in places)
    assert all(len(_decoded(data, place, rate)) >= 1 for place in places)


@given(seed=st.integers(0, 2**32 - 1), longest=st.floats(1, 5), shortest=st.floats(0.05, 1))
@settings(deadline=None, max_examples=40)
def test_segments_between_pauses_cover_the_recording(seed: int, longest: float, shortest: float) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.choice([0.0, 0.001, 0.5]) * rng.normal(size=rng.integers(1, 3000)) for _ in range(rng.integers(1, 12))]
    samples = np.concatenate(parts).astype(np.float32)
    data = recorded(samples, 1000, subtype="FLOAT")
    places = audio.segments(data, _spec("silence", longest_seconds=longest, shortest_silence=shortest))
    assert places[0][0] == 0 and places[-1][1] == len(samples)
    assert all(before[1] == after[0] and before[0] < before[1] for before, after in pairwise(places))
    if np.abs(samples).max() > 1e-3:
        assert all(end - start <= longest * 1000 + 10 for start, end in places)
    assert sum(len(_decoded(data, place, 1000)) for place in places) == len(samples)


def test_windows_are_ten_seconds_by_themselves() -> None:
    data = recorded(np.zeros(25 * 1000, dtype=np.float32), 1000)
    assert audio.segments(data, _spec("windows")) == [(0, 10_000), (9000, 19_000), (15_000, 25_000)]


def test_a_segment_is_the_part_at_its_place() -> None:
    samples = np.concatenate([tone(1), tone(1, hertz=880), tone(1, hertz=1320)])
    for kind, subtype in _KINDS:
        data = recorded(samples, kind=kind, subtype=subtype)
        part = _decoded(data, (1100, 1900))
        assert len(part) == pytest.approx(0.8 * _RATE, abs=2), kind
        assert _hertz(part) == pytest.approx(880, abs=3), kind


@pytest.mark.parametrize("place", [(1000, 1200), (900, 900), (800, 700)])
def test_a_place_outside_the_recording_is_rejected(place: tuple[int, int]) -> None:
    with pytest.raises(InputRejected, match="segment"):
        _decoded(recorded(tone(1)), place)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the recording is empty"),
        (b"a text", "the file is a text, not a recording"),
        (b"\xff\xfea\0 \0t\0e\0x\0t\0", "the file is of no known type, not a recording"),
        (b"%PDF-1.7 ", "the file is a PDF, not a recording"),
        (b"\0\0\0\x18ftypM4A \0\0\0\0", "the file is a video, not a recording"),
        (b"RIFF\0\0\0\0AVI LIST", "the file is a video, not a recording"),
        (b"RIFF\0\0\0\0WAVEfmt ", "the recording cannot be decoded: it is damaged or cut short"),
    ],
)
def test_what_is_no_recording_is_rejected_by_its_name(data: bytes, reason: str) -> None:
    assert _rejected(data) == reason


def test_an_image_is_no_recording_and_formats_that_are_not_listed_are_never_opened() -> None:
    assert _rejected(encoded(picture(), "JPEG")) == "the file is a JPEG, not a recording"
    # libsndfile would open each of these.
    for kind in ("AU", "CAF", "VOC", "W64", "MAT4", "HTK", "IRCAM", "NIST", "SVX"):
        assert "not a recording" in _rejected(recorded(tone(0.1), kind=kind))
    tag = b"ID3\x04\0\0\0\0\0\x0a" + b"\0" * 10
    for kind in ("AIFF", "AU"):
        assert "not a recording" in _rejected(tag + recorded(tone(0.1), kind=kind))


def test_a_file_behind_a_tag_is_read() -> None:
    tag = b"ID3\x04\0\0\0\0\0\x0a" + b"\0" * 10
    assert len(_decoded(tag + recorded(tone(0.5), kind="MP3"))) > 7000


def test_a_recording_longer_than_the_limit_is_rejected() -> None:
    # An hour and a second of silence has few bytes.
    data = recorded(np.zeros(3601 * 1000, dtype=np.int16), 1000, kind="FLAC")
    assert len(data) < 100_000
    assert "longer than 3600 seconds" in _rejected(data)


def test_a_recording_without_a_length_is_rejected() -> None:
    data = bytearray(recorded(tone(2), kind="FLAC"))
    # The 36 bits of the samples in STREAMINFO.
    packed = int.from_bytes(data[18:26], "big")
    data[18:26] = (packed & ~((1 << 36) - 1)).to_bytes(8, "big")
    assert _rejected(bytes(data)) == "the recording does not tell its length"


def test_an_unbelievable_rate_or_number_of_channels_is_rejected() -> None:
    def wav(channels: int, rate: int) -> bytes:
        frame = 2 * channels
        form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, 16)
        data = b"\0" * frame * 10
        return (
            b"RIFF"
            + struct.pack("<I", 36 + len(data))
            + b"WAVEfmt \x10\0\0\0"
            + form
            + b"data"
            + struct.pack("<I", len(data))
            + data
        )

    assert len(_decoded(wav(2, 8000))) == 20
    assert "samples a second" in _rejected(wav(1, 10))
    assert "samples a second" in _rejected(wav(1, 2_000_000_000))
    assert "channels" in _rejected(wav(200, 8000))


def test_a_file_over_the_limit_is_rejected_before_it_is_opened() -> None:
    assert "at most" in _rejected(recorded(tone(0.1)) + b"\0" * MAX_MEDIA_BYTES)


def test_more_windows_than_the_limit_are_rejected() -> None:
    data = recorded(np.zeros(3600 * 1000, dtype=np.int16), 1000, kind="FLAC")
    assert "windows" in _rejected(data, _spec("windows", window_seconds=0.2, window_overlap=0.1))


@pytest.mark.parametrize(("kind", "subtype"), _KINDS)
def test_a_file_that_is_cut_short_is_rejected_or_read_as_far_as_it_goes(kind: str, subtype: str | None) -> None:
    data = recorded(tone(3), kind=kind, subtype=subtype)
    for length in range(0, len(data), max(1, len(data) // 40)):
        try:
            places = audio.segments(data[:length], _WHOLE)
            decoded = _decoded(data[:length], places[0])
        except InputRejected as error:
            assert error.message
        else:
            assert 0 < len(decoded) <= 3.1 * _RATE


def test_half_of_a_flac_is_rejected() -> None:
    data = recorded(tone(3), kind="FLAC")
    assert _rejected(data[: len(data) // 2]).startswith("the recording")
