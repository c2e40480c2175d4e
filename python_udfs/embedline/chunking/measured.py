"""Run the chunkers that measure.

Short texts are returned at once, and every chunk keeps room for the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from embedline.chunking.chunk import Chunk, OnPiece, Span, chunk_of, nothing, whole_text
from embedline.chunking.graphemes import boundary_at_or_before
from embedline.chunking.measure import Measure

# Characters per unit of room above which a text is split without measuring it whole.
_CHARACTERS_PER_UNIT = 8
# Tokens that prefix and content may have more together than each alone, because other tokens are merged at the seam.
_SEAM = 1


@dataclass(frozen=True)
class Room:
    """The room of a chunk's content, in the measure's unit.

    `prefix_capacity` is the part of it that a prefix of the chunk's own may take.
    """

    capacity: int
    overlap: int
    prefix_capacity: int


class Split(Protocol):
    """Split a text that does not fit into one chunk.

    Returns the chunks' spans, each with its own prefix.
    """

    def __call__(self, measure: Measure, text: str, room: Room, on_piece: OnPiece) -> Sequence[tuple[Span, str]]: ...


@dataclass(frozen=True)
class MeasuredChunker:
    """Split texts into chunks that, with their prefixes, take up to `tokens`."""

    measure: Measure
    tokens: int
    overlap: int
    split: Split

    def __call__(self, text: str, on_piece: OnPiece = nothing, prefix: str = "") -> list[Chunk]:
        if not text:
            return []
        measure = self.measure.suited_to(prefix + text)
        capacity = measure.capacity(self.tokens)
        if measure.surely_fits(prefix + text if prefix else text, capacity):
            return whole_text(text, prefix=prefix)
        prefix, taken = cut_to(measure, prefix, capacity // 2)
        room = max(capacity - taken - (_SEAM if prefix else 0), 1)
        if len(text) <= room * _CHARACTERS_PER_UNIT and measure.sizes([text])[0] <= room:
            return whole_text(text, prefix=prefix)
        overlap = measure.capacity(self.overlap) * room // capacity
        parts = self.split(measure, text, Room(room, overlap, capacity // 2 - taken), on_piece)
        return [chunk_of(text, i, span, prefix + own_prefix) for i, (span, own_prefix) in enumerate(parts)]


def cut_to(measure: Measure, prefix: str, capacity: int) -> tuple[str, int]:
    """Return the beginning of a prefix that takes up to `capacity`, and its size."""
    if not prefix:
        return "", 0
    size = measure.sizes([prefix])[0]
    while size > capacity:
        at = measure.starts(prefix)[capacity]
        # The beginning alone may have more units than it had within the whole.
        prefix = prefix[: min(boundary_at_or_before(prefix, at), len(prefix) - 1)]
        size = measure.sizes([prefix])[0]
    return prefix, size
