"""Split where the subject changes.

The subject changes where the cosine distance of neighbouring sentences jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedline.chunking.chunk import OnPiece, Span, closed_spans
from embedline.chunking.measure import Measure
from embedline.chunking.measured import Room
from embedline.chunking.sentences import Unit, pack, sentence_units

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from embedline.core.vectors import FloatMatrix

# Embeds sentences with the pipeline's own model, one row for each text; calls its second argument from time to time.
EmbedSentences = Callable[[Sequence[str], OnPiece], "FloatMatrix"]

DEFAULT_PERCENTILE = 95.0
# Sentences whose vectors are held at a time.
_SENTENCES_PER_BLOCK = 1024
# Difference below which distances count as equal. A sentence's vector differs by about 1e-6 with the batch it is in.
_NOISE = 1e-3


@dataclass(frozen=True)
class SemanticSplit:
    """Split after sentences whose distance to the next is above a percentile.

    Distance i is 1 - cos(sentence i, sentence i + 1); the percentile is of the text's distances. Source: Greg Kamradt,
    "5 Levels of Text Splitting" (2024), level 4, whose percentile is 95 too; also LangChain's SemanticChunker. Unlike
    there, sentences are embedded alone, without their neighbours. The text between two cuts is packed into chunks of
    whole sentences, so that no chunk is larger than the model reads.
    """

    embed: EmbedSentences
    percentile: float = DEFAULT_PERCENTILE

    def __call__(self, measure: Measure, text: str, room: Room, on_piece: OnPiece) -> Sequence[tuple[Span, str]]:
        units = sentence_units(measure, text, room.capacity, on_piece)
        # White space alone has nothing to embed.
        units = [unit for unit in units if not text[unit.start : unit.end].isspace()]
        spans: list[Span] = []
        first = 0
        for cut in [*cuts(self._distances(text, units, on_piece), self.percentile), len(units)]:
            spans += pack(measure, text, units[first:cut], room, on_piece)
            first = cut
        return [(span, "") for span in closed_spans(text, spans)]

    def _distances(self, text: str, units: Sequence[Unit], on_piece: OnPiece) -> npt.NDArray[np.float64]:
        import numpy as np

        found: list[npt.NDArray[np.float64]] = []
        last: npt.NDArray[np.float64] | None = None
        for first in range(0, len(units), _SENTENCES_PER_BLOCK):
            block = units[first : first + _SENTENCES_PER_BLOCK]
            matrix = self.embed([text[unit.start : unit.end].strip() for unit in block], on_piece).astype(np.float64)
            joined = matrix if last is None else np.vstack([last, matrix])
            found.append(neighbour_distances(joined))
            last = matrix[-1:]
        return np.concatenate(found) if found else np.empty(0)


def neighbour_distances(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return 1 - cos of each row and the next, shape (n - 1,).

    The distance is 0 if a vector is zero or not finite, because no jump is known.
    """
    import numpy as np

    norms = np.linalg.norm(matrix, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.einsum("ij,ij->i", matrix[:-1], matrix[1:]) / (norms[:-1] * norms[1:])
    distances: npt.NDArray[np.float64] = np.where(np.isfinite(cosines), 1 - cosines, 0.0)
    return distances


def cuts(distances: npt.NDArray[np.float64], percentile: float) -> list[int]:
    """Return the sentences that begin a new chunk.

    They follow a distance above the percentile.
    """
    import numpy as np

    if not len(distances):
        return []
    threshold = float(np.percentile(distances, percentile)) + _NOISE
    return [int(i) + 1 for i in np.flatnonzero(distances > threshold)]
