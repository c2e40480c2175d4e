"""Estimate the tokens of a text whose model's tokenizer is not known, each estimate with its margin."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


# Bounds of what a provider may count. A token of the usual tokenizers has about four bytes and hardly ever this many.
_LONGEST_TOKEN_BYTES = 64
# Tokens that a server may count for each text beside one for each byte: an instruction of its own, or padding.
_ADDED_TOKENS = 512


def most_tokens(text: str) -> int:
    """What requests are packed by: two bytes of UTF-8 a token. English has about four; Chinese, at three bytes, two to three."""
    return (len(text) if text.isascii() else len(text.encode())) // 2 + 1


def likely_tokens(text: str) -> int:
    """An estimate on the safe side that is reserved before the call: three bytes of UTF-8 a token."""
    return (len(text) if text.isascii() else len(text.encode())) // 3 + 1


def plausible_tokens(counted: int | None, texts: Collection[str], prefix: str) -> int | None:
    """Return what a provider counted for texts that were sent with a prefix; None if they cannot have so few or so many."""
    size = sum(len(text.encode()) for text in texts) + len(texts) * len(prefix.encode())
    fewest = max(len(texts), size // _LONGEST_TOKEN_BYTES)
    most = size + len(texts) * _ADDED_TOKENS
    return counted if counted is not None and fewest <= counted <= most else None


# Without the model's tokenizer a token is taken for this many characters. English averages four in the vocabularies
# of OpenAI's models; three leaves a margin for other languages and for code.
CHARACTERS_PER_TOKEN = 3
# Other scripts take more: thirds of a token for each character from a code point on. On the safe side of the vocabularies of
# OpenAI's models and of BERT's Chinese one; those of Thai, Indic and rarer scripts are split into bytes by some.
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
    """Return the thirds of a token that each character is taken for, shape (characters,)."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    starts, thirds = np.array(_THIRDS_FROM, dtype=np.int64).T
    found: npt.NDArray[np.int64] = thirds[np.searchsorted(starts, points, side="right") - 1]
    return found


def estimated_size(text: str) -> int:
    """Return the thirds of a token that a text is taken for where no tokenizer is known."""
    return len(text) if text.isascii() else int(weights(text).sum())


def average_tokens(text: str) -> float:
    """Return the tokens that a text has on average, with no margin: four Latin characters each, fewer of other scripts."""
    if text.isascii():
        return len(text) / 4
    thirds = weights(text)
    others = thirds[thirds > 1]
    return float((len(thirds) - len(others)) / 4 + others.sum() / 3)
