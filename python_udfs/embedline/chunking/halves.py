"""Cutting a chunk in two: for a text that is too long for its model, whatever the estimate of its tokens said."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from embedline.chunking.chunk import Chunk, chunk_of
from embedline.chunking.graphemes import boundary_at_or_before
from embedline.core.tokens import estimated_size, weights

# A text of fewer thirds of a token is not cut: no model for texts reads less than 32 tokens.
SMALLEST_CUT = 2 * 96
# The best boundary within this part of the text, around its middle, is taken.
_MIDDLE = (0.35, 0.65)
_BOUNDARIES = ("\n\n", "\n", ". ", "。", "! ", "? ", " ")


def cut_chunks(chunks: Sequence[Chunk], doomed: Collection[bytes]) -> list[Chunk] | None:
    """Return the chunks with those of the digests `doomed` in halves; None if one of these is too short to be cut."""
    found: list[Chunk] = []
    for chunk in chunks:
        if chunk.digest not in doomed:
            found.append(chunk)
        elif parts := halves(chunk):
            found += parts
        else:
            return None
    return [chunk._replace(sequence=sequence) for sequence, chunk in enumerate(found)]


def halves(chunk: Chunk) -> tuple[Chunk, Chunk] | None:
    """Return two chunks that the chunk is made of, the same ones each time; None if it is too short to be cut."""
    content = chunk.content
    body = content.strip()
    if estimated_size(body) < SMALLEST_CUT:
        return None
    at = _middle(body)
    if at == 0:
        return None
    at += len(content) - len(content.lstrip())
    first, second = (chunk_of(content, 0, span, chunk.prefix) for span in ((0, at), (at, len(content))))
    return (
        first._replace(start=chunk.start, end=chunk.start + at),
        second._replace(start=chunk.start + at, end=chunk.end),
    )


def _middle(body: str) -> int:
    """Return where to cut a text: at the largest boundary near its middle, else between two characters; 0: nowhere."""
    ends = weights(body).cumsum()
    low, middle, high = (int(ends.searchsorted(share * ends[-1])) for share in (_MIDDLE[0], 0.5, _MIDDLE[1]))
    for boundary in _BOUNDARIES:
        before = body.rfind(boundary, low, middle)
        after = body.find(boundary, middle, high)
        found = [place + len(boundary) for place in (before, after) if place >= 0]
        if found:
            return min(found, key=lambda place: abs(place - middle))
    return boundary_at_or_before(body, middle)
