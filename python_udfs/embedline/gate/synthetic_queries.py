"""Make queries for a corpus without labels, each from one text.

The text's document is the answer. Simulated known-item topics: Azzopardi, de Rijke and Balog, "Building Simulated
Queries for Known-Item Topics", SIGIR 2007.

Such queries measure how well documents are told apart. They use the texts' own words, so they do not measure synonyms.
Queries of real users are always the better canaries.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

_WORDS_OF_A_QUERY = 6
_FEWEST_WORDS = 3
# Characters from the middle of a text that make the query if it has no words between spaces, such as Chinese.
_PIECE = 24
# A letter first, because numbers alone tell little of a text's subject.
_WORD = re.compile(r"[^\W\d_][\w'-]*[^\W_]")


def known_item_queries(texts: Sequence[str]) -> list[str]:
    """Return a query for each text: its most characteristic words.

    They have the largest term frequency times inverse document frequency among the texts, and are in the text's order.
    """
    words = [_WORD.findall(text) for text in texts]
    frequency = Counter(word for found in words for word in {word.lower() for word in found})
    return [_query(text, found, frequency, len(texts)) for text, found in zip(texts, words, strict=True)]


def _query(text: str, words: Sequence[str], frequency: Counter[str], texts: int) -> str:
    counts = Counter(word.lower() for word in words)
    if len(counts) < _FEWEST_WORDS:
        return _middle(text)
    weights = {word: count * math.log((1 + texts) / frequency[word]) for word, count in counts.items()}
    chosen = set(sorted(weights, key=lambda word: (-weights[word], word))[:_WORDS_OF_A_QUERY])
    return " ".join(_first_of_each(words, chosen))


def _first_of_each(words: Sequence[str], chosen: set[str]) -> Iterator[str]:
    left = set(chosen)
    for word in words:
        if word.lower() in left:
            left.remove(word.lower())
            yield word


def _middle(text: str) -> str:
    stripped = " ".join(text.split())
    start = max(len(stripped) - _PIECE, 0) // 2
    return stripped[start : start + _PIECE]
