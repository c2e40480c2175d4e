"""Splitting at the largest boundary (paragraph, line, sentence, word) that keeps a chunk within its room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from embedline.chunking.chunk import OnPiece, Span, closed_spans
from embedline.chunking.measure import Measure
from embedline.chunking.measured import Room

# The splitter's time grows with the square of a text without line breaks: 0.08 MB took 0.11 s, 1.3 MB 9.4 s. In pieces
# of this size it grows with the text. Without any line break it looks through the rest of its piece for each chunk: 60,000
# Chinese characters in chunks of 7 tokens took 20 s, so such a piece is a few chunks long.
_PIECE_CHARACTERS = 40_000
_DENSE_PIECE_CHARACTERS = 2_000
_DENSE_PIECE_CHUNK_SIZES = 32


def split_recursively(measure: Measure, text: str, capacity: int, overlap: int, on_piece: OnPiece) -> list[Span]:
    """Return spans of up to `capacity` that rebuild the text where `overlap` is 0."""
    from semantic_text_splitter import TextSplitter

    splitter = measure.splitter(TextSplitter, capacity, overlap)
    found: list[Span] = []
    for start, piece in pieces(text, capacity):
        found += [(start + at, start + at + len(content)) for at, content in splitter.chunk_indices(piece)]
        on_piece()
    return closed_spans(text, found)


def recursive_split(measure: Measure, text: str, room: Room, on_piece: OnPiece) -> Sequence[tuple[Span, str]]:
    """Split a text recursively; see `MeasuredChunker`."""
    return [(span, "") for span in split_recursively(measure, text, room.capacity, room.overlap, on_piece)]


def pieces(text: str, capacity: int) -> Iterator[tuple[int, str]]:
    """Cut a long text at its best boundary about every 40,000 characters; return (offset, piece)."""
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
