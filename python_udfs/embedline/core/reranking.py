"""Define a reranker's input, its output, and its protocol."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from embedline.errors import InvalidScores

if TYPE_CHECKING:
    from embedline.core.embedding import ModelInfo


@dataclass(frozen=True)
class Pair:
    """A query and a text, which a reranker reads together.

    Its length is that of both, by which the model host cuts its work.
    """

    query: str
    text: str

    def __len__(self) -> int:
        return len(self.query) + len(self.text)


@dataclass(frozen=True)
class RerankScores:
    """The scores that a reranker gave for one query, one for each text.

    `data` holds float32 values, little-endian. `units` is what the provider charges: tokens, or search units in
    Cohere's form. It is None if the provider names no number.
    """

    count: int
    data: bytes
    units: int | None = None

    def values(self) -> list[float]:
        """Return the scores.

        Raises InvalidScores if one is not a finite number.
        """
        scores = struct.unpack(f"<{self.count}f", self.data)
        wrong = [number for number, score in enumerate(scores) if not math.isfinite(score)]
        if wrong:
            raise InvalidScores(detail=f"The score of text {wrong[0] + 1} of {self.count} is {scores[wrong[0]]}.")
        return list(scores)


def pack_scores(scores: Sequence[float], units: int | None = None) -> RerankScores:
    """Return the scores as float32.

    Raises InvalidScores for a number beyond its range.
    """
    try:
        return RerankScores(len(scores), struct.pack(f"<{len(scores)}f", *scores), units)
    except OverflowError:
        raise InvalidScores(detail="A score is beyond the range of float32.") from None


class Reranker(Protocol):
    """A provider of scores, bound to one model.

    Its threads run with all signals blocked and never touch the database.
    """

    def submit_rerank(self, query: str, texts: Sequence[str]) -> Future[RerankScores]:
        """Start scoring the texts for the query; the future raises ProviderError.

        A higher score means a better answer. The scale is the model's own.
        """

    def probe(self) -> Future[ModelInfo]:
        """Return the model's limits and fingerprint."""

    def close(self) -> None:
        """Release connections and threads."""
