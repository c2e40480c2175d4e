"""Pack whole sentences into chunks, as many as fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedline.chunking.chunk import OnPiece, Span, closed_spans
from embedline.chunking.measure import Measure
from embedline.chunking.measured import Room
from embedline.chunking.recursive import split_recursively

# Unicode Standard Annex 29, sentence boundaries, with three changes that its section 6.2 allows a tailoring. A single
# line break does not end a sentence, but an empty line does, because text is often wrapped. "!" and "?" need white
# space after them, as in "a != b". A number that begins a sentence ("1. Open the lid") does not end with its full stop.
_FULL_STOP = ".\u2024\ufe52\uff0e"
_NEED_SPACE = "!?" + "\u203c\u203d\u2047\u2048\u2049"
_ALWAYS_END = (
    "\u0589\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u166e"
    "\u1803\u1809\u1b5a\u1b5b\u1c3b\u1c3c\u2cf9\u2cfa\u2cfb\u3002\ua4ff\ufe56\ufe57\uff01\uff1f\uff61"
)
_CLOSING = (
    "\"'\u2019\u201d\u00bb\u203a)\\]}\u3009\u300b\u300d\u300f\u3011\u3015\u3017\uff02\uff07\uff09\uff3d\uff5d\uff63"
)
# Each alternative takes its whole run and never backtracks, so that a scan is linear in the text.
_CANDIDATE = re.compile(
    rf"(?P<marks>[{_FULL_STOP}{_NEED_SPACE}{_ALWAYS_END}]++)[{_CLOSING}]*+(?P<space>\s*+)|\n\s*\n\s*+"
)
_CONTINUES = ",;:-\u2013\u2014\u3001\uff0c\uff1a\uff1b"
_LONGEST_NUMBER = 4
# Sentences that are measured between two calls of on_piece.
_SENTENCES_PER_PIECE = 500


@dataclass(frozen=True, slots=True)
class Unit:
    """A sentence with its size, or a part of one that is longer than a chunk."""

    start: int
    end: int
    size: int


def sentence_spans(text: str) -> Iterator[Span]:
    """Yield the sentences of a text, which rebuild the text.

    White space after a sentence belongs to it.
    """
    start = 0
    for match in _CANDIDATE.finditer(text):
        if match.end() < len(text) and _ends_sentence(text, start, match):
            yield start, match.end()
            start = match.end()
    if start < len(text):
        yield start, len(text)


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    marks = match["marks"]
    if marks is None:
        # An empty line. At the text's beginning there is no sentence yet.
        return match.start() > start
    if any(mark in _ALWAYS_END for mark in marks):
        return True
    if not match["space"]:
        return False
    if any(mark in _NEED_SPACE for mark in marks) or match["space"].count("\n") > 1:
        return True
    following = text[match.end()]
    number = match.start() - start <= _LONGEST_NUMBER and text[start : match.start()].strip().isdecimal()
    return not (following.islower() or following in _CONTINUES or number)


def sentence_units(measure: Measure, text: str, capacity: int, on_piece: OnPiece) -> list[Unit]:
    """Return the sentences of a text, those larger than `capacity` split recursively."""
    spans = list(sentence_spans(text))
    units: list[Unit] = []
    for first in range(0, len(spans), _SENTENCES_PER_PIECE):
        batch = spans[first : first + _SENTENCES_PER_PIECE]
        for (start, end), size in zip(batch, measure.sizes([text[a:b] for a, b in batch]), strict=True):
            if size <= capacity:
                units.append(Unit(start, end, size))
                continue
            parts = split_recursively(measure, text[start:end], capacity, 0, on_piece)
            sizes = measure.sizes([text[start + a : start + b].strip() for a, b in parts])
            units += [Unit(start + a, start + b, n) for (a, b), n in zip(parts, sizes, strict=True)]
        on_piece()
    return units


def pack(measure: Measure, text: str, units: Sequence[Unit], room: Room, on_piece: OnPiece) -> list[Span]:
    """Return the spans of as many neighbouring units as fit.

    Trailing units of up to the overlap begin the next span, too.
    """
    spans = [(units[first].start, units[last].end) for first, last in _packed(units, room)]
    packed: list[Span] = []
    for at in range(0, len(spans), _SENTENCES_PER_PIECE):
        batch = spans[at : at + _SENTENCES_PER_PIECE]
        for (start, end), size in zip(batch, measure.sizes([text[a:b].strip() for a, b in batch]), strict=True):
            # If the span before was split, its last part may begin within the overlap. This span holds all of that
            # part.
            while packed and packed[-1][0] >= start:
                packed.pop()
            if size <= room.capacity:
                packed.append((start, end))
            else:
                # Some vocabularies have more tokens for two sentences together than for each.
                parts = split_recursively(measure, text[start:end], room.capacity, 0, on_piece)
                # A part that is only the overlap is in the span before.
                reached = packed[-1][1] if packed else start
                packed += [(start + a, start + b) for a, b in parts if start + b > reached]
        on_piece()
    return packed


def _packed(units: Sequence[Unit], room: Room) -> Iterator[tuple[int, int]]:
    """Yield the (first, last) unit of each chunk."""
    first = total = 0
    for i, unit in enumerate(units):
        if i > first and total + unit.size > room.capacity:
            yield first, i - 1
            earliest, first, total = first, i, 0
            allowed = min(room.overlap, room.capacity - unit.size)
            # Without overlap not even a unit of size 0 is repeated.
            while room.overlap and first - 1 > earliest and total + units[first - 1].size <= allowed:
                first -= 1
                total += units[first].size
        total += unit.size
    if units:
        yield first, len(units) - 1


def sentences_split(measure: Measure, text: str, room: Room, on_piece: OnPiece) -> Sequence[tuple[Span, str]]:
    """Split a text into whole sentences; see `MeasuredChunker`."""
    units = sentence_units(measure, text, room.capacity, on_piece)
    return [(span, "") for span in closed_spans(text, pack(measure, text, units, room, on_piece))]
