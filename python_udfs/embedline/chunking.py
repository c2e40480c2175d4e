"""Chunking: a text becomes consecutive slices that a model can read whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from embedline.errors import InvalidParameter

# Without the model's tokenizer a token is taken for this many characters. English averages four in the vocabularies
# of OpenAI's models; three leaves a margin for other languages and for code.
CHARACTERS_PER_TOKEN = 3


# The splitter's time grows with the square of a text without line breaks: 0.08 MB took 0.11 s, 1.3 MB 9.4 s. In pieces
# of this size it grows with the text.
_PIECE_CHARACTERS = 40_000


@dataclass(frozen=True, slots=True)
class Chunk:
    """A slice of a text: `content` is `text[start:end]`, offsets in characters; `digest` is 16 bytes of its SHA-256."""

    sequence: int
    start: int
    end: int
    content: str
    digest: bytes


class Chunker(Protocol):
    """Splits a text into chunks; calls `on_piece` from time to time, so that long work can be interrupted."""

    def __call__(self, text: str, on_piece: Callable[[], None] = ...) -> list[Chunk]: ...


def content_digest(content: str) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the UTF-8 text: what the uuid column content_hash holds."""
    return hashlib.sha256(content.encode()).digest()[:16]


def whole_text(text: str, on_piece: Callable[[], None] = lambda: None) -> list[Chunk]:
    """Return the text as its only chunk."""
    return [Chunk(0, 0, len(text), text, content_digest(text))]


def recursive_chunker(tokenizer: str | None, tokens: int, overlap: int = 0) -> Chunker:
    """Return a chunker that splits at the largest boundary (paragraph, sentence, word) that keeps a chunk in `tokens`.

    Tokens are the model's own where `tokenizer` is its tokenizer.json (the text), else estimated from the characters.
    With overlap 0 the slices rebuild the text: white space between two chunks belongs to the first.
    """
    from semantic_text_splitter import TextSplitter

    if not 0 <= overlap < tokens:
        raise InvalidParameter(
            "the overlap must be smaller than the chunk", detail=f"overlap {overlap}, chunk {tokens} tokens"
        )
    if tokenizer is None:
        splitter = TextSplitter(tokens * CHARACTERS_PER_TOKEN, overlap * CHARACTERS_PER_TOKEN)
    else:
        splitter = TextSplitter.from_huggingface_tokenizer_str(tokenizer, tokens, overlap)

    def split(text: str, on_piece: Callable[[], None] = _nothing) -> list[Chunk]:
        found: list[tuple[int, str]] = []
        for start, piece in _pieces(text):
            found += [(start + offset, content) for offset, content in splitter.chunk_indices(piece)]
            on_piece()
        return _slices(text, found)

    return split


def _nothing() -> None: ...


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Cut a long text at its best boundary about every _PIECE_CHARACTERS; return (offset, piece)."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        stop = start + _PIECE_CHARACTERS
        earliest = stop - _PIECE_CHARACTERS // 4
        for boundary in ("\n\n", "\n", ". ", " "):
            found = text.rfind(boundary, earliest, stop)
            if found >= 0:
                stop = found + len(boundary)
                break
        yield start, text[start:stop]
        start = stop
    yield start, text[start:]


def _slices(text: str, pieces: list[tuple[int, str]]) -> list[Chunk]:
    starts = [start for start, _ in pieces]
    ends = [start + len(piece) for start, piece in pieces]
    if starts:
        starts[0] = 0
        ends[-1] = len(text)
    for i in range(len(starts) - 1):
        # An overlap already reaches into the next chunk; only a gap is filled.
        ends[i] = max(ends[i], starts[i + 1])
    return [
        Chunk(sequence, start, end, text[start:end], content_digest(text[start:end]))
        for sequence, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
