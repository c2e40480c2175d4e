"""Measure text in the model's own tokens, or in characters.

Characters are used if the model's tokenizer is not known.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
from embedline.chunking.parts import Parts, PartValues, parts_of
from embedline.core.tokens import CHARACTERS_PER_TOKEN, estimated_size, weights

# Candidates whose sizes a splitter keeps; it asks again for recent ones.
_REPEATED = 16


class Measure(Protocol):
    """Sizes of texts in one unit: tokens or characters."""

    def suited_to(self, text: str) -> Measure:
        """Return the measure of a text and its parts."""
        ...

    def capacity(self, tokens: int) -> int:
        """Return the size of a number of tokens."""
        ...

    def surely_fits(self, text: str, capacity: int) -> bool:
        """Return True if the text cannot be larger than `capacity`.

        It takes about a microsecond. False proves nothing.
        """
        ...

    def sizes(self, texts: Sequence[str]) -> list[int]:
        """Return the size of each text."""
        ...

    def starts(self, text: str) -> Sequence[int]:
        """Return the offset, in characters, at which each unit of the text begins."""
        ...

    def splitter(
        self, kind: type[TextSplitter] | type[MarkdownSplitter], capacity: int, overlap: int
    ) -> TextSplitter | MarkdownSplitter:
        """Return a splitter into chunks of up to `capacity`; it costs microseconds."""
        ...


class CharacterMeasure:
    """Count characters, an estimate for models whose tokenizer is not known."""

    def suited_to(self, text: str) -> Measure:
        return self if estimated_size(text) == len(text) else ScriptMeasure()

    def capacity(self, tokens: int) -> int:
        return tokens * CHARACTERS_PER_TOKEN

    def surely_fits(self, text: str, capacity: int) -> bool:
        return len(text) <= capacity

    def sizes(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    def starts(self, text: str) -> Sequence[int]:
        return range(len(text))

    def splitter(
        self, kind: type[TextSplitter] | type[MarkdownSplitter], capacity: int, overlap: int
    ) -> TextSplitter | MarkdownSplitter:
        return kind(capacity, overlap)


class ScriptMeasure(CharacterMeasure):
    """Weigh characters by their scripts.

    Latin text is left to CharacterMeasure, which leaves the counting to the splitter.
    """

    def surely_fits(self, text: str, capacity: int) -> bool:
        return estimated_size(text) <= capacity

    def sizes(self, texts: Sequence[str]) -> list[int]:
        return [estimated_size(text) for text in texts]

    def starts(self, text: str) -> Sequence[int]:
        import numpy as np

        found: list[int] = np.repeat(np.arange(len(text)), weights(text)).tolist()
        return found

    def splitter(
        self, kind: type[TextSplitter] | type[MarkdownSplitter], capacity: int, overlap: int
    ) -> TextSplitter | MarkdownSplitter:
        return kind.from_callback(estimated_size, capacity, overlap)


class TokenMeasure:
    """Count the model's own tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._part_sizes = PartValues(self._sizes_of_parts)

    @functools.cached_property
    def parts(self) -> Parts | None:
        """The division of texts into parts whose sizes add up; None if there is none."""
        # Found when the first text is measured, because most tables have none that is longer than a chunk.
        return parts_of(self.tokenizer)

    def suited_to(self, text: str) -> Measure:
        return self

    def capacity(self, tokens: int) -> int:
        return tokens

    def surely_fits(self, text: str, capacity: int) -> bool:
        # A token is at least one byte of the text as the tokenizer normalises it; one more may mark the beginning. Which
        # form that is, is not known. NFKD splits characters, and can also shorten one: U+1D400 has four bytes, its "A" one.
        if len(text) >= capacity:
            return False
        return text.isascii() or sum(map(_most_bytes, text)) < capacity

    def sizes(self, texts: Sequence[str]) -> list[int]:
        return list(map(self._size, texts)) if self.parts else self._encoded_sizes(texts)

    def starts(self, text: str) -> Sequence[int]:
        return [start for start, _ in self.tokenizer.encode(text, add_special_tokens=False).offsets]

    def splitter(
        self, kind: type[TextSplitter] | type[MarkdownSplitter], capacity: int, overlap: int
    ) -> TextSplitter | MarkdownSplitter:
        # The splitter measures 17 candidates for the four chunks of a text, 4.3 times its length. It takes a hundredth
        # of the time that the tokenizer would take for these. A quarter of them it measures more than once.
        return kind.from_callback(functools.lru_cache(_REPEATED)(self._size), capacity, overlap)

    def _size(self, text: str) -> int:
        parts = self.parts
        if parts is None or not text or not parts.is_divisible(text):
            return self._encoded_size(text)
        return sum(self._part_sizes.of(parts.divide(text)))

    def _sizes_of_parts(self, parts: Sequence[str]) -> list[int]:
        known = self.parts.known if self.parts else {}
        return [known.get(part, size) for part, size in zip(parts, self._encoded_sizes(parts), strict=True)]

    def _encoded_sizes(self, texts: Sequence[str]) -> list[int]:
        return [len(encoding) for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _encoded_size(self, text: str) -> int:
        return self._encoded_sizes([text])[0]


@functools.lru_cache(maxsize=4096)
def _most_bytes(character: str) -> int:
    """Return the larger size of a character in UTF-8: composed or decomposed."""
    forms = (character, *(unicodedata.normalize(form, character) for form in ("NFD", "NFKD")))
    return max(len(form.encode()) for form in forms)


@functools.lru_cache(maxsize=8)
def measure_of(tokenizer: str | None) -> Measure:
    """Return the measure of a model.

    `tokenizer` is its tokenizer.json (the text). Its truncation and padding are left out.
    """
    if tokenizer is None:
        return CharacterMeasure()
    # Keep the tokenizer from starting threads inside a backend. It reads this when it first splits a batch.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_str(tokenizer)
    # A file that a user names has what its model needs. Truncated to 256 tokens, each text would fit into a chunk.
    loaded.no_truncation()
    loaded.no_padding()
    return TokenMeasure(loaded)
