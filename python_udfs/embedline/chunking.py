"""Chunking: a text becomes consecutive slices that a model can read whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from embedline.errors import InvalidParameter

# Without the model's tokenizer a token is taken for this many characters. English averages four in the vocabularies
# of OpenAI's models; three leaves a margin for other languages and for code.
CHARACTERS_PER_TOKEN = 3


@dataclass(frozen=True, slots=True)
class Chunk:
    """A slice of a text: `content` is `text[start:end]`, offsets in characters; `digest` is 16 bytes of its SHA-256."""

    sequence: int
    start: int
    end: int
    content: str
    digest: bytes


Chunker = Callable[[str], list[Chunk]]


def content_digest(content: str) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the UTF-8 text: what the uuid column content_hash holds."""
    return hashlib.sha256(content.encode()).digest()[:16]


def whole_text(text: str) -> list[Chunk]:
    """Return the text as its only chunk."""
    return [Chunk(0, 0, len(text), text, content_digest(text))]


def recursive_chunker(tokenizer: str | None, tokens: int, overlap: int = 0) -> Chunker:
    """Return a chunker that splits at the largest boundary (paragraph, sentence, word) that keeps a chunk in `tokens`.

    Tokens are the model's own where `tokenizer` is its tokenizer.json (the text), else estimated from the characters.
    With overlap 0 the slices rebuild the text: white space between two chunks belongs to the first.
    """
    from semantic_text_splitter import TextSplitter

    if not 0 <= overlap < tokens:
        raise InvalidParameter("the overlap must be smaller than the chunk", detail=f"overlap {overlap}, chunk {tokens} tokens")
    if tokenizer is None:
        splitter = TextSplitter(tokens * CHARACTERS_PER_TOKEN, overlap * CHARACTERS_PER_TOKEN)
    else:
        splitter = TextSplitter.from_huggingface_tokenizer_str(tokenizer, tokens, overlap)

    def split(text: str) -> list[Chunk]:
        return _slices(text, splitter.chunk_indices(text))

    return split


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
