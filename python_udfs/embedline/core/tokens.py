"""Estimate the tokens of texts for models whose tokenizer is not known.

Each estimate has a margin of its own, for the use that it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


# Characters per token if the model's tokenizer is not known. English averages four in the vocabularies of OpenAI's
# models; three leaves a margin for other languages and for code.
CHARACTERS_PER_TOKEN = 3
# Thirds of a token for each character from a code point on, because other scripts take more tokens than Latin. The
# figures are on the safe side of the vocabularies of OpenAI's models and of BERT's Chinese one. Some vocabularies split
# Thai, Indic and rarer scripts into bytes.
_THIRDS_FROM = (
    (0x0000, 1),  # Latin
    (0x0250, 2),  # phonetic letters and marks
    (0x0370, 3),  # Greek
    (0x0400, 2),  # Cyrillic
    (0x0530, 3),  # Armenian, Hebrew, Arabic
    (0x0900, 4),  # Indic scripts, Thai, Lao, Tibetan, Burmese, Georgian
    (0x1100, 3),  # Hangul's letters
    (0x1200, 4),  # Ethiopic, Cherokee, Khmer, Mongolian
    (0x1D00, 2),  # phonetic letters, Vietnamese
    (0x1F00, 3),  # old Greek
    (0x2000, 1),  # punctuation
    (0x2070, 3),  # symbols
    (0x2C00, 4),  # rare alphabets
    (0x2E80, 3),  # Chinese, Japanese, Korean
    (0xA000, 4),  # Yi and others
    (0xAC00, 3),  # Hangul
    (0x10000, 6),  # emoji, old scripts
    (0x20000, 9),  # rare Chinese characters
)


def weights(text: str) -> npt.NDArray[np.int64]:
    """Return the estimated thirds of a token of each character, shape (characters,)."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    starts, thirds = np.array(_THIRDS_FROM, dtype=np.int64).T
    found: npt.NDArray[np.int64] = thirds[np.searchsorted(starts, points, side="right") - 1]
    return found


def estimated_size(text: str) -> int:
    """Return the estimated size of a text, in thirds of a token.

    It is used if no tokenizer is known.
    """
    return len(text) if text.isascii() else int(weights(text).sum())


def average_tokens(text: str) -> float:
    """Return the tokens that a text has on average, with no margin.

    A token has four Latin characters, and fewer of other scripts.
    """
    if text.isascii():
        return len(text) / 4
    thirds = weights(text)
    others = thirds[thirds > 1]
    return float((len(thirds) - len(others)) / 4 + others.sum() / 3)
