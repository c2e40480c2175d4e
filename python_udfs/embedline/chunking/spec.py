"""Define a pipeline's chunking recipe as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embedline.core.media import Modality
from embedline.errors import InvalidParameter

METHODS = ("recursive", "sentences", "markdown", "fixed", "semantic", "none")
# Methods of a pipeline by its modality; `none` embeds the whole.
METHODS_BY_MODALITY: Mapping[Modality, tuple[str, ...]] = {
    "text": METHODS,
    "image": ("none", "tiles"),
    "audio": ("none", "windows", "silence"),
}


@dataclass(frozen=True)
class _Range:
    """The values of an option; the ends belong to it unless it is open."""

    low: float
    high: float
    is_whole: bool = False
    is_open: bool = False

    def number(self, value: object) -> float | None:
        """Return the value as a number, None if it is not one of these."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        holds = self.low < value < self.high if self.is_open else self.low <= value <= self.high
        return float(value) if holds and (not self.is_whole or value == int(value)) else None


# Options of each method with their values: pixels of tiles, seconds of windows and silence.
_OPTIONS: Mapping[str, Mapping[str, _Range]] = {
    "semantic": {"percentile": _Range(0, 100, is_open=True)},
    "tiles": {"tile_pixels": _Range(32, 16_384, is_whole=True), "tile_overlap": _Range(0, 8192, is_whole=True)},
    "windows": {"window_seconds": _Range(0.1, 3600), "window_overlap": _Range(0, 1800)},
    "silence": {
        "longest_seconds": _Range(1, 3600),
        "shortest_silence": _Range(0.05, 60),
        # Of the loudest hundredth of a second of the recording.
        "silence_decibels": _Range(-90, -1),
        # Without it a place is quiet by its loudness.
        "speech_probability": _Range(0.05, 0.95),
    },
}
# What the options of images and recordings are where a pipeline names none.
_DEFAULTS: Mapping[str, float] = {
    "tile_pixels": 512,
    "tile_overlap": 64,
    "window_seconds": 10,
    "window_overlap": 1,
    "longest_seconds": 30,
    "shortest_silence": 0.3,
    "silence_decibels": -40,
}
# Options of which the second may be at most half of the first.
_OVERLAPS = {"tiles": ("tile_pixels", "tile_overlap"), "windows": ("window_seconds", "window_overlap")}


@dataclass(frozen=True)
class ChunkingSpec:
    """A chunking recipe: `tokens` and `overlap` count the model's tokens.

    Tokens are None if the method measures nothing, as with images and recordings.
    """

    method: str
    tokens: int | None = None
    overlap: int = 0
    options: tuple[tuple[str, float], ...] = ()

    def option(self, name: str, default: float) -> float:
        """Return the value of an option of the method."""
        return dict(self.options).get(name, default)

    @property
    def size(self) -> float:
        """Return the side of a tile in pixels, or the length of a window in seconds."""
        return self.media_option(_OVERLAPS[self.method][0])

    @property
    def shared(self) -> float:
        """Return what neighbouring tiles or windows share, in the unit of `size`."""
        return min(self.media_option(_OVERLAPS[self.method][1]), self.size / 2)

    def media_option(self, name: str) -> float:
        """Return the value of an option of images or recordings, or its default."""
        return self.option(name, _DEFAULTS[name])


def chunking_spec(
    method: str, tokens: int | None, overlap: int | None, options: Mapping[str, object], modality: Modality = "text"
) -> ChunkingSpec:
    """Return the spec of these values or raise InvalidParameter."""
    if method not in METHODS_BY_MODALITY[modality]:
        raise _unknown_method(method, modality)
    if modality != "text":
        _require_no_tokens(method, tokens, overlap, modality)
    if method == "none" or modality != "text":
        tokens = None
    elif tokens is None or tokens < 1:
        raise InvalidParameter(f"chunk_tokens must be at least 1, not {tokens}", hint="The default is 256.")
    overlap = 0 if overlap is None else overlap
    if overlap < 0 or (tokens is not None and overlap >= tokens):
        raise InvalidParameter(
            "chunk_overlap must be at least 0 and smaller than chunk_tokens",
            detail=f"Overlap {overlap}, chunks of {tokens} tokens." if tokens is not None else f"Overlap {overlap}.",
            hint="An eighth of chunk_tokens is usual where an overlap is wanted at all.",
        )
    return ChunkingSpec(method, tokens, overlap, tuple(sorted(_checked_options(method, options).items())))


def _unknown_method(method: str, modality: Modality) -> InvalidParameter:
    others = [other for other, names in METHODS_BY_MODALITY.items() if method in names]
    what = f"is for modality {' and '.join(others)}, not {modality}" if others else "is not known"
    return InvalidParameter(
        f'chunking "{method}" {what}', hint=f"Use one of {', '.join(METHODS_BY_MODALITY[modality])}."
    )


def _require_no_tokens(method: str, tokens: int | None, overlap: int | None, modality: Modality) -> None:
    for name, value in (("chunk_tokens", tokens), ("chunk_overlap", overlap or None)):
        if value is not None:
            takes = ", ".join(_OPTIONS.get(method, {}))
            raise InvalidParameter(
                f"{name} counts tokens of a text, and modality {modality} has none",
                hint=f"Leave it out; chunk_options takes {takes}." if takes else "Leave it out.",
            )


def _checked_options(method: str, options: Mapping[str, object]) -> dict[str, float]:
    known = _OPTIONS.get(method, {})
    checked: dict[str, float] = {}
    for name, value in options.items():
        if name not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise InvalidParameter(f'chunking "{method}" has no option "{name}"', hint=takes)
        values = known[name]
        number = values.number(value)
        if number is None:
            kind = "whole number" if values.is_whole else "number"
            raise InvalidParameter(
                f'chunking option "{name}" cannot be {value}',
                hint=f"Use a {kind} between {values.low:g} and {values.high:g}.",
            )
        checked[name] = number
    _require_small_overlap(method, checked)
    return checked


def _require_small_overlap(method: str, options: Mapping[str, float]) -> None:
    size_name, overlap_name = _OVERLAPS.get(method, ("", ""))
    if overlap_name not in options:
        return
    size = options.get(size_name, _DEFAULTS[size_name])
    if options[overlap_name] > size / 2:
        raise InvalidParameter(
            f'chunking option "{overlap_name}" cannot be more than half of {size_name}',
            detail=f"{overlap_name} {options[overlap_name]:g}, {size_name} {size:g}.",
            hint="An eighth is usual.",
        )
