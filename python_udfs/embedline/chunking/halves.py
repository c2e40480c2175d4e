"""Cut a chunk in two if it is too long for its model.

The model decides, whatever the estimate of the tokens was.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from embedline.chunking.chunk import Chunk, chunk_of
from embedline.chunking.graphemes import boundary_at_or_before
from embedline.core.tokens import estimated_size, weights

# Thirds of a token below which a text is not cut, because no model for texts reads less than 32 tokens.
SMALLEST_CUT = 2 * 96
# The part of a text, around its middle, within which the best boundary is taken.
_MIDDLE = (0.35, 0.65)
_BOUNDARIES = ("\n\n", "\n", ". ", "。", "! ", "? ", " ")


def cut_chunks(chunks: Sequence[Chunk], doomed: Collection[bytes]) -> list[Chunk] | None:
    """Return the chunks, those with digests in `doomed` cut in halves.

    None if one of these is too short to be cut.
    """
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
    """Return the two halves of a chunk, the same ones each time.

    None if it is too short to be cut.
    """
    if chunk.media is not None:
        return None
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
    """Return the place to cut a text, 0 if there is none.

    It is the largest boundary near the middle, else a place between two characters.
    """
    ends = weights(body).cumsum()
    low, middle, high = (int(ends.searchsorted(share * ends[-1])) for share in (_MIDDLE[0], 0.5, _MIDDLE[1]))
    for boundary in _BOUNDARIES:
        before = body.rfind(boundary, low, middle)
        after = body.find(boundary, middle, high)
        found = [place + len(boundary) for place in (before, after) if place >= 0]
        if found:
            return min(found, key=lambda place: abs(place - middle))
    return boundary_at_or_before(body, middle)
