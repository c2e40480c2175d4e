"""Define the result of every chunker, and the rules that hold for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from embedline.core.media import MediaPart, ModelInput

# Half-open range of characters of a text.
Span = tuple[int, int]
OnPiece = Callable[[], None]


class Chunk(NamedTuple):
    """A slice of a text: `content` is `text[start:end]`, offsets in characters.

    `prefix` stands before the content for embedding only. `digest` identifies what is embedded; see `content_digest`.
    A chunk of an image or a recording has `media`, and its content is the caption.
    """

    sequence: int
    start: int
    end: int
    content: str
    digest: bytes
    prefix: str = ""
    media: MediaPart | None = None

    @property
    def embedded(self) -> ModelInput:
        """Return what the model reads: the text, or the segment."""
        return self.embedded_text if self.media is None else self.media

    @property
    def embedded_text(self) -> str:
        """Return the text that the model reads.

        White space around the content is removed, because it has no meaning for the model.
        """
        return self.prefix + self.content.strip()


def nothing() -> None:
    """Do nothing; the `on_piece` of a caller that needs no interruption."""


class Chunker(Protocol):
    """Split a text into chunks, each with the document's `prefix`.

    Calls `on_piece` from time to time, so that long work can be interrupted.
    """

    def __call__(self, text: str, on_piece: OnPiece = ..., prefix: str = ...) -> list[Chunk]: ...


def content_digest(content: str, prefix: str = "") -> bytes:
    """Return the first 16 bytes of a SHA-256, as in the uuid column content_hash.

    The hash is of the content, or of prefix, NUL and content.
    """
    return hashlib.sha256((f"{prefix}\0{content}" if prefix else content).encode()).digest()[:16]


def chunk_of(text: str, sequence: int, span: Span, prefix: str) -> Chunk:
    """Return the chunk of a span of the text."""
    content = text[span[0] : span[1]]
    return Chunk(sequence, span[0], span[1], content, content_digest(content, prefix), prefix)


def closed_spans(text: str, found: Sequence[Span]) -> list[Span]:
    """Return the spans of a text's chunks, in order, so that they leave nothing out.

    White space between two spans belongs to the first, at the text's ends to the outer ones. A span of nothing but
    white space joins its neighbour, because the model would read it as an empty text. Spans may overlap; they are never
    moved.
    """
    closed: list[Span] = []
    for start, end in found:
        if text[start:end].isspace():
            continue
        if closed:
            # An overlap already reaches into the next span; only a gap is filled.
            closed[-1] = (closed[-1][0], max(closed[-1][1], start))
        closed.append((start, end))
    if not closed:
        return [(0, len(text))] if text else []
    closed[0] = (0, closed[0][1])
    closed[-1] = (closed[-1][0], len(text))
    return closed


def whole_text(text: str, on_piece: OnPiece = nothing, prefix: str = "") -> list[Chunk]:
    """Return the text as its only chunk."""
    return [chunk_of(text, 0, (0, len(text)), prefix)]
