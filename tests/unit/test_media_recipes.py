"""Each method of chunking belongs to modalities, and its options belong to it."""

from __future__ import annotations

from typing import Any

import pytest

from embedline.chunking.spec import METHODS, METHODS_BY_MODALITY, ChunkingSpec, chunking_spec
from embedline.core.file_addresses import content_expression, content_parts
from embedline.core.media import Modality
from embedline.errors import InvalidParameter


def _refused(*values: Any, modality: Modality = "image") -> str:
    with pytest.raises(InvalidParameter) as caught:
        chunking_spec(*values, modality=modality)
    assert caught.value.hint
    return f"{caught.value.message} {caught.value.hint}"


def test_methods_of_media_measure_no_tokens() -> None:
    for modality, methods in METHODS_BY_MODALITY.items():
        for method in methods if modality != "text" else ():
            assert chunking_spec(method, None, None, {}, modality) == ChunkingSpec(method)
            assert chunking_spec(method, None, 0, {}, modality) == ChunkingSpec(method)
            assert "chunk_tokens counts tokens of a text" in _refused(method, 256, None, {}, modality=modality)
            assert "chunk_overlap counts tokens of a text" in _refused(method, None, 5, {}, modality=modality)


def test_a_method_of_another_modality_is_refused_by_its_name() -> None:
    assert _refused("tiles", 256, 0, {}, modality="text") == (
        f'chunking "tiles" is for modality image, not text Use one of {", ".join(METHODS)}.'
    )
    assert _refused("windows", None, 0, {}) == (
        'chunking "windows" is for modality audio, not image Use one of none, tiles.'
    )
    assert "is for modality text, not audio" in _refused("recursive", None, 0, {}, modality="audio")
    assert _refused("x", None, 0, {}) == 'chunking "x" is not known Use one of none, tiles.'


@pytest.mark.parametrize(
    ("method", "modality", "options", "reason"),
    [
        ("tiles", "image", {"tile_pixels": 31}, "whole number between 32 and 16384"),
        ("tiles", "image", {"tile_pixels": 100.5}, "whole number"),
        ("tiles", "image", {"tile_pixels": True}, "whole number"),
        ("tiles", "image", {"tile_pixels": float("inf")}, "whole number"),
        ("tiles", "image", {"tile_pixels": float("nan")}, "whole number"),
        ("tiles", "image", {"tile_overlap": -1}, "whole number between 0"),
        ("tiles", "image", {"tile_overlap": 257}, "more than half of tile_pixels"),
        ("tiles", "image", {"tile_pixels": 100, "tile_overlap": 51}, "more than half of tile_pixels"),
        ("tiles", "image", {"percentile": 5}, "It takes tile_pixels, tile_overlap."),
        ("none", "image", {"tile_pixels": 512}, "It takes none."),
        ("windows", "audio", {"window_seconds": "10"}, "number between 0.1 and 3600"),
        ("windows", "audio", {"window_seconds": 4, "window_overlap": 2.5}, "more than half of window_seconds"),
        ("silence", "audio", {"shortest_silence": 0}, "number between 0.05 and 60"),
        ("silence", "audio", {"silence_decibels": 0}, "number between -90 and -1"),
        (
            "silence",
            "audio",
            {"window_seconds": 5},
            "It takes longest_seconds, shortest_silence, silence_decibels, speech_probability.",
        ),
    ],
)
def test_an_option_out_of_its_range_is_refused(
    method: str, modality: Modality, options: dict[str, object], reason: str
) -> None:
    assert reason in _refused(method, None, None, options, modality=modality)


def test_options_have_defaults() -> None:
    spec = chunking_spec("tiles", None, None, {"tile_pixels": 64}, "image")
    assert (spec.size, spec.shared) == (64, 32)
    spec = chunking_spec("windows", None, None, {"window_overlap": 0}, "audio")
    assert (spec.size, spec.shared) == (10, 0)
    spec = chunking_spec("silence", None, None, {"longest_seconds": 20}, "audio")
    assert [spec.media_option(name) for name in ("longest_seconds", "shortest_silence")] == [20, 0.3]


@pytest.mark.parametrize("address", ["address", "'/' || \"Name\"", content_expression("a", "b")])
@pytest.mark.parametrize("changed_by", ["etag", "size::text || ')'", content_expression("a", "b")])
def test_an_address_is_told_from_what_changes_with_its_file(address: str, changed_by: str) -> None:
    assert content_parts(content_expression(address, changed_by)) == (address, changed_by)


@pytest.mark.parametrize(
    "expression", ["address", "", content_expression("a", "b")[1:], content_expression("a", "b")[:-1]]
)
def test_another_expression_is_that_of_no_address(expression: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        content_parts(expression)
