"""Score what the best chunks of a query have of its answers.

Arithmetic on offsets and distances; no database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedline.chunking.chunk import Span

# Queries that are ranked at a time: with 100,000 chunks their distances take 26 MB.
_QUERIES = 32


@dataclass(frozen=True)
class Place:
    """A chunk's document, by its number in the sample, and its range of characters."""

    document: int
    span: Span


# The answers of one query: in which documents, and where in them. An empty list is the whole document.
Answers = Mapping[int, Sequence[Span]]


def found_share(best: Sequence[Place], answers: Answers) -> float:
    """Return the share of a query's answers that its best chunks have, from 0 to 1.

    Of answers with places it is the share of their characters, because an answer may lie across two chunks. Any chunk
    of a document has an answer without a place. Documents count alike.
    """
    return sum(_share_of(best, document, places) for document, places in answers.items()) / len(answers)


def _share_of(best: Sequence[Place], document: int, places: Sequence[Span]) -> float:
    spans = sorted(place.span for place in best if place.document == document)
    if not places:
        return float(bool(spans))
    return sum(_covered(spans, place) for place in places) / sum(end - start for start, end in places)


def _covered(spans: Sequence[Span], answer: Span) -> int:
    """Return how many characters of an answer the spans, in order, have."""
    covered, reached = 0, answer[0]
    for start, end in spans:
        left, right = max(start, reached), min(end, answer[1])
        covered += max(right - left, 0)
        reached = max(reached, right)
    return covered


def joined(pieces: Sequence[tuple[int, str]]) -> str | None:
    """Return the text whose chunks these are: offsets and texts, in order.

    They may overlap. None if a part of the text is in no chunk.
    """
    text = ""
    for start, piece in pieces:
        if start > len(text):
            return None
        text += piece[len(text) - start :]
    return text


def best_places(distances: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.int64]:
    """Return the places of the k smallest distances of each row, in order.

    Equal distances come in the order of the chunks.
    """
    found: npt.NDArray[np.int64] = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return found


def query_blocks(count: int) -> list[slice]:
    """Return the slices in which so many queries are ranked."""
    return [slice(start, start + _QUERIES) for start in range(0, count, _QUERIES)]
