"""Check whether a model can read a chunk.

If a model knows few tokens of a text, its vector is that of any other such text. A tokenizer makes one unknown token of
a word that is longer than it reads (100 characters with BERT's). It does the same with letters that it lacks. A base64
dump in one line may be a single unknown token. Such chunks crowd together and answer any query alike.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from embedline.chunking.measure import TokenMeasure, measure_of
from embedline.chunking.parts import Parts, PartValues
from embedline.errors import UnreadableText

if TYPE_CHECKING:
    from embedline.documents.values import Document

# Chunks that are tokenized between two checks for a cancel: 20 ms of BERT's tokenizer.
_COUNTED_AT_ONCE = 64


@dataclass(frozen=True)
class Readability:
    """A model's tokenizer with its unknown token.

    `limit` is the largest share of unknown tokens in a chunk that is embedded. `parts` divides texts into words, and
    `are_known` tells whether all tokens of a word are known.
    """

    tokenizer: Any
    unknown_id: int
    limit: float
    parts: Parts | None
    are_known: PartValues[bool]

    def shares(self, texts: Sequence[str]) -> list[float]:
        """Return the share of unknown tokens of each text.

        Tokens without letters and digits do not count.
        """
        # Few texts have an unknown token at all, and words that were seen before need no tokenizer.
        doubtful = set(texts).difference(self._known(texts))
        found = dict(zip(doubtful, map(self._share, _encoded(self.tokenizer, doubtful)), strict=True))
        return [found.get(text, 0.0) for text in texts]

    def _known(self, texts: Sequence[str]) -> Iterator[str]:
        """Yield the texts whose words are all known for certain."""
        if self.parts is None:
            return
        divided = [(text, self.parts.divide(text)) for text in texts if self.parts.is_divisible(text)]
        # All new words at once, because each call of the tokenizer has a cost of its own.
        are_known = iter(self.are_known.of([word for _, words in divided for word in words]))
        for text, words in divided:
            if all(list(itertools.islice(are_known, len(words)))):
                yield text

    def _share(self, encoding: Any) -> float:
        unknown = int(encoding.ids.count(self.unknown_id))
        if not unknown:
            return 0.0
        others = (number for number in encoding.ids if number != self.unknown_id)
        # The fast encoding leaves the tokens' own words empty.
        known = [number for number in others if any(map(str.isalnum, self.tokenizer.id_to_token(number) or ""))]
        return unknown / (unknown + len(known))


def readability(tokenizer: str | None, limit: float) -> Readability | None:
    """Return the check of a model's chunks, None if there is nothing to check.

    That is so if no token is unknown to the model, or the limit allows all. `tokenizer` is its tokenizer.json (the
    text), None if it is not known here.
    """
    found = _readability(tokenizer) if tokenizer is not None and limit < 1 else None
    return None if found is None else replace(found, limit=limit)


@functools.lru_cache(maxsize=8)
def _readability(tokenizer: str) -> Readability | None:
    model = json.loads(tokenizer).get("model", {})
    # Bytes spell out characters that have no token of their own.
    if model.get("byte_fallback"):
        return None
    # The chunker's own tokenizer, because a second one of a large vocabulary would take as much memory again.
    measure = measure_of(tokenizer)
    if not isinstance(measure, TokenMeasure):
        return None
    number = model.get("unk_id")
    if number is None and model.get("unk_token") is not None:
        number = measure.tokenizer.token_to_id(model["unk_token"])
    if number is None:
        return None
    unknown_id, own = int(number), measure.tokenizer

    def are_known(words: Sequence[str]) -> list[bool]:
        return [unknown_id not in encoding.ids for encoding in _encoded(own, words)]

    return Readability(own, unknown_id, 1.0, measure.parts, PartValues(are_known))


def _encoded(tokenizer: Any, texts: Iterable[str]) -> Sequence[Any]:
    found: Sequence[Any] = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return found


def mark_unreadable(found: Sequence[Document], check: Readability, breathe: Callable[[], None]) -> None:
    """Mark the chunks of documents that the model cannot read.

    A document without a readable chunk gets an UnreadableText.
    """
    for document in found:
        if document.problem is not None or not document.chunks:
            continue
        shares: list[float] = []
        for start in range(0, len(document.chunks), _COUNTED_AT_ONCE):
            part = document.chunks[start : start + _COUNTED_AT_ONCE]
            shares += check.shares([chunk.content.strip() for chunk in part])
            breathe()
        unreadable = {
            chunk.digest: share for chunk, share in zip(document.chunks, shares, strict=True) if share > check.limit
        }
        if all(chunk.digest in unreadable for chunk in document.chunks):
            document.problem = UnreadableText(message_of(min(unreadable.values())))
        document.unreadable = unreadable


def message_of(share: float) -> str:
    """Return the reason why a chunk with this share of unknown tokens is left out."""
    return (
        f"the model does not know {share:.0%} of the tokens: a word longer than it reads, such as base64 or hex,"
        " or a script that it never learnt"
    )
