"""Keep token ids of many texts in two flat arrays, and cut them into batches.

Nothing here makes lists of lists, as transformers does for sentence-transformers. With a model that computes nothing,
`SentenceTransformer.encode` takes 61 to 95 µs of CPU for a text of 18 tokens. The whole model host takes 43 µs, on the
same 2 cores (tests/bench/bench_model_host.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

# Characters that count as one token where the size of a slice is in characters: the mean of English texts.
CHARACTERS_PER_TOKEN = 4
# Least share of a padded batch that is tokens and no padding. Below it the batch is cut, unless it is small.
_LEAST_FILLED = 0.85
# Most texts and characters of one call of the tokenizer, because its result takes many times the memory of the ids.
_MOST_TEXTS, _MOST_CHARACTERS = 1024, 1 << 18


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts.

    `lengths` has one int32 for each text. `ids` is int32 and flat: the ids of the first text, then those of the next.
    """

    lengths: NDArray[np.int32]
    ids: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Return the place of each text's first id."""
        import numpy as np

        starts = np.zeros(len(self.lengths), dtype=np.int64)
        np.cumsum(self.lengths[:-1], out=starts[1:])
        return starts

    def select(self, indexes: Sequence[int]) -> Tokens:
        """Return the tokens of some texts, in that order."""
        import numpy as np

        chosen = np.asarray(indexes, dtype=np.int64)
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(self.starts[chosen] - (ends - lengths), lengths)
        return Tokens(lengths, self.ids[places])

    @staticmethod
    def joined(parts: Sequence[Tokens]) -> Tokens:
        """Return the tokens of several texts as one value."""
        import numpy as np

        if len(parts) == 1:
            return parts[0]
        return Tokens(np.concatenate([part.lengths for part in parts]), np.concatenate([part.ids for part in parts]))


class FlatTokenizer:
    """A tokenizer that truncates, does not pad, and returns flat arrays.

    It may be called from several threads: the work is done without the interpreter's lock.
    """

    def __init__(self, tokenizer: Tokenizer, longest: int | None) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        if longest is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(longest)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of the texts, with special tokens."""
        return Tokens.joined([self._piece(piece) for piece in _pieces(texts)])

    def _piece(self, texts: Sequence[str]) -> Tokens:
        import numpy as np

        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
        return Tokens(lengths, np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum())))


def _pieces(texts: Sequence[str]) -> list[Sequence[str]]:
    pieces: list[Sequence[str]] = []
    first = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if index > first and (characters > _MOST_CHARACTERS or index - first >= _MOST_TEXTS):
            pieces.append(texts[first:index])
            first, characters = index, len(text)
    return [*pieces, texts[first:]]


def padded_batches(lengths: NDArray[np.int32], least_tokens: int) -> list[tuple[int, int]]:
    """Return the bounds of batches to pad, of texts that are sorted longest first.

    A batch grows while 85 % of it are tokens, or while it is smaller than `least_tokens` with its padding.
    """
    import numpy as np

    totals = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    batches, first, count = [], 0, len(lengths)
    while first < count:
        padded = int(lengths[first]) * np.arange(1, count - first + 1)
        tokens = totals[first + 1 :] - totals[first]
        # Both conditions hold for the first texts of a batch and, once broken, for no longer batch.
        fits = (tokens >= _LEAST_FILLED * padded) | (padded <= least_tokens)
        last = first + max(1, int(np.count_nonzero(fits)))
        batches.append((first, last))
        first = last
    return batches
