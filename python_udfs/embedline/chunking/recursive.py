"""Split at the largest boundary that keeps a chunk within its room.

Boundaries are paragraphs, lines, sentences and words.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from embedline.chunking.chunk import OnPiece, Span, closed_spans
from embedline.chunking.graphemes import boundary_at_or_before
from embedline.chunking.measure import Measure
from embedline.chunking.measured import Room

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

# Characters of a piece, because the splitter's time grows with the square of a text without line breaks. 0.08 MB took
# 0.11 s, 1.3 MB 9.4 s. In pieces of this size the time grows with the text.
#
# Without any line break the splitter searches the rest of its piece for each chunk. 60,000 Chinese characters in chunks
# of 7 tokens took 20 s, so such a piece is a few chunks long.
_PIECE_CHARACTERS = 40_000
_DENSE_PIECE_CHARACTERS = 2_000
_DENSE_PIECE_CHUNK_SIZES = 32


def split_recursively(measure: Measure, text: str, capacity: int, overlap: int, on_piece: OnPiece) -> list[Span]:
    """Return spans of up to `capacity` that rebuild the text if `overlap` is 0."""
    from semantic_text_splitter import TextSplitter

    splitter = measure.splitter(TextSplitter, capacity, overlap)
    found: list[Span] = []
    for start, piece in pieces(text, capacity):
        parts = split_piece(splitter, piece, lambda piece: halved(measure, piece, capacity))
        found += [(start + at, start + at + len(content)) for at, content in parts]
        on_piece()
    return closed_spans(text, within(measure, text, found, capacity))


def split_piece(
    splitter: TextSplitter | MarkdownSplitter, piece: str, otherwise: Callable[[str], list[tuple[int, str]]]
) -> list[tuple[int, str]]:
    """Return offsets and contents of a piece's chunks.

    If the splitter fails on the piece, they are those of `otherwise`. semantic-text-splitter 0.33 panics on some
    Markdown with overlap (" ßß\r\n" in a chunk of 11 characters). A panic is not an Exception, so it would end the
    worker.
    """
    try:
        return _without_repeated_starts(splitter.chunk_indices(piece))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return otherwise(piece)


def _without_repeated_starts(parts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Return the parts without those that the next part begins with.

    Beside "\\r\\n" the splitter may give both.
    """
    following = [start for start, _ in parts[1:]]
    return [part for part, start in itertools.zip_longest(parts, following) if start is None or start > part[0]]


def halved(measure: Measure, piece: str, capacity: int) -> list[tuple[int, str]]:
    """Return chunks of up to `capacity`, cut at boundaries of characters only."""
    return [
        (start, piece[start:end])
        for start, end in within(measure, piece, [(0, len(piece))], capacity, trusts_ascii=False)
    ]


def within(
    measure: Measure, text: str, spans: Sequence[Span], capacity: int, *, trusts_ascii: bool = True
) -> list[Span]:
    """Return the spans, those larger than `capacity` cut.

    The splitter gave '0000' and 15 letters of Linear B as one chunk of 65 tokens for a room of 64. Texts in ASCII,
    where this was never seen, are not measured again.
    """
    doubtful = [span for span in spans if not (trusts_ascii and text[slice(*span)].isascii())]
    sizes = (
        dict(zip(doubtful, measure.sizes([text[slice(*span)] for span in doubtful]), strict=True)) if doubtful else {}
    )
    kept: list[Span] = []
    for span in spans:
        start, end = span
        while sizes.get((start, end), 0) > capacity and end - start > 1:
            piece = text[start:end]
            at = boundary_at_or_before(piece, measure.starts(piece)[capacity])
            if at <= 0:
                break  # One character that a reader sees is never cut.
            kept.append((start, start + at))
            start += at
            sizes[start, end] = measure.sizes([text[start:end]])[0]
        kept.append((start, end))
    return _without_contained(kept)


def _without_contained(spans: Sequence[Span]) -> list[Span]:
    """Return the spans without those that lie within a neighbour.

    If spans overlap, a part that is cut from one may lie within the next.
    """
    kept: list[Span] = []
    for start, end in spans:
        if kept and end <= kept[-1][1]:
            continue
        while kept and start <= kept[-1][0]:
            kept.pop()
        kept.append((start, end))
    return kept


def recursive_split(measure: Measure, text: str, room: Room, on_piece: OnPiece) -> Sequence[tuple[Span, str]]:
    """Split a text recursively; see `MeasuredChunker`."""
    return [(span, "") for span in split_recursively(measure, text, room.capacity, room.overlap, on_piece)]


def pieces(text: str, capacity: int) -> Iterator[tuple[int, str]]:
    """Cut a long text at its best boundary about every 40,000 characters.

    Yields (offset, piece).
    """
    start = 0
    while len(text) - start > _DENSE_PIECE_CHARACTERS:
        length = _PIECE_CHARACTERS
        if text.find("\n", start, start + length) < 0:
            length = min(length, max(_DENSE_PIECE_CHARACTERS, _DENSE_PIECE_CHUNK_SIZES * capacity))
        stop = start + length
        if stop >= len(text):
            break
        earliest = stop - length // 4
        for boundary in ("\n\n", "\n", ". ", " "):
            found = text.rfind(boundary, earliest, stop)
            if found >= 0:
                stop = found + len(boundary)
                break
        yield start, text[start:stop]
        start = stop
    if start < len(text):
        yield start, text[start:]
