"""Split a text into chunks of a fixed number of tokens, wherever these end."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.chunking.chunk import OnPiece, Span, closed_spans
from embedline.chunking.graphemes import boundary_at_or_before
from embedline.chunking.measure import Measure
from embedline.chunking.measured import Room

# Characters that are tokenized for a chunk, at first and at most. Some vocabularies make one token of any long word.
_FIRST_CHARACTERS_PER_UNIT = 6
_LONGEST_CHUNK = 40_000
_CHARACTERS_PER_UNIT = 16


def fixed_split(measure: Measure, text: str, room: Room, on_piece: OnPiece) -> Sequence[tuple[Span, str]]:
    """Cut a text after every `room.capacity` tokens; see `MeasuredChunker`.

    Tokens are counted from the chunk's own beginning. A chunk has fewer only if its last token would tear a character.
    """
    found: list[Span] = []
    start = 0
    while start < len(text):
        end, starts = _end_of_chunk(measure, text, start, room)
        if found and end <= found[-1][1]:
            # The overlap alone fills the chunk, because tokens differ in a text that begins within a word.
            start = found[-1][1]
            continue
        found.append((start, end))
        on_piece()
        if end == len(text):
            break
        start = _next_start(text, start, end, starts, room.overlap)
    return [(span, "") for span in closed_spans(text, found)]


def _end_of_chunk(measure: Measure, text: str, start: int, room: Room) -> tuple[int, Sequence[int]]:
    """Return the end of the chunk that begins at `start`, and the starts of its units.

    The starts are counted from the chunk's own beginning. They are left out if there is no overlap to find.
    """
    capacity = room.capacity
    reach = _FIRST_CHARACTERS_PER_UNIT * capacity
    longest = max(_LONGEST_CHUNK, _CHARACTERS_PER_UNIT * capacity)
    while True:
        window = text[start : start + reach]
        starts = measure.starts(window)
        if len(starts) > capacity or start + reach >= len(text) or reach >= longest:
            break
        reach *= 2
    if len(starts) <= capacity:
        end = len(window) if start + reach >= len(text) else max(boundary_at_or_before(window, len(window) - 1), 1)
        return start + end, [place for place in starts if place < end]
    while len(starts) > capacity:
        # The last token may have joined text on both sides of the cut, so the rest is counted again.
        end = boundary_at_or_before(window, starts[capacity]) or _first_character(window)
        if end >= len(window):
            break
        window = window[:end]
        if not room.overlap and measure.sizes([window])[0] <= capacity:
            return start + end, ()
        starts = measure.starts(window)
    return start + len(window), starts


def _first_character(window: str) -> int:
    """Return the length of the first character.

    It is kept whole, however many tokens it has.
    """
    for end in range(1, len(window)):
        if boundary_at_or_before(window, end) == end:
            return end
    return len(window)


def _next_start(text: str, start: int, end: int, starts: Sequence[int], overlap: int) -> int:
    if overlap == 0 or overlap >= len(starts):
        return end
    begin = boundary_at_or_before(text, start + starts[len(starts) - overlap])
    return begin if start < begin < end else end
