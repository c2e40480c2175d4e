"""Cut texts where their tokens do not depend on each other.

Most tokenizers work word by word, so a word has the same tokens in each text. The size of a text is then exactly the
sum of the sizes of its parts. A part whose size is known is not tokenized again. A tokenizer whose definition does not
prove this has no parts. Texts to which it does not apply are told by `is_divisible`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Divide = Callable[[str], Sequence[str]]
Value = TypeVar("Value")

# Bytes that the values of a tokenizer's parts may take, about 60,000 words, and those of an entry beside its characters.
_CACHED_BYTES = 8_000_000
_BYTES_PER_PART = 120
# Longest part that is kept, in characters. A longer one is no word of a language, and not likely to come again.
_LONGEST_CACHED = 128

# Normalizers that never look across white space.
_WORDWISE_NORMALIZERS = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents")
# Pre-tokenizers that cut at white space and drop it.
_WORDWISE_PRETOKENIZERS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
# Characters that are words of their own for BERT: Chinese ones and their punctuation. Such texts have no spaces.
_ALONE = "\u3001\u3002\u300c\u300d\u3400-\u4dbf\u4e00-\u9fff\uff01\uff0c\uff1a\uff1b\uff1f"
_BERT_ALONE = re.compile(f"[{_ALONE}]")
_BERT_WORDS = re.compile(rf"[{_ALONE}]|[^\s{_ALONE}]++")
# Expressions for tokens that never go on from a word into a space: those of Qwen and of Llama 3. GPT-2's is built into
# ByteLevel.
_SPACE_FIRST_EXPRESSIONS = frozenset(
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
_SPACE_AFTER_WORD = re.compile(r"(?<=\S) ")
_SPACE_AFTER_SPACE = re.compile(r"\s ")
# A space in SentencePiece's vocabularies.
_METASPACE = "\u2581"
# Characters of a special token by which texts with it are told.
_BEGINNING = 4
# White space in some editions of Unicode only.
_MONGOLIAN_SEPARATOR = "\u180e"


@dataclass(frozen=True)
class Parts:
    """The division of texts for one tokenizer.

    `known` has the sizes of parts that have another one alone. A text with one of `exceptions` is not divided.
    """

    divide: Divide
    exceptions: tuple[str, ...] = ()
    known: Mapping[str, int] = field(default_factory=dict)

    def is_divisible(self, text: str) -> bool:
        """Return True if the text's tokens are those of its parts."""
        return all(exception not in text for exception in self.exceptions)


class PartValues(Generic[Value]):
    """What `compute` found for parts, kept within 8 MB."""

    def __init__(self, compute: Callable[[Sequence[str]], Iterable[Value]]) -> None:
        self._compute = compute
        self._values: dict[str, Value] = {}
        self._room = _CACHED_BYTES

    def __len__(self) -> int:
        return len(self._values)

    def of(self, parts: Sequence[str]) -> list[Value]:
        """Return the value of each part; only those that are not kept are computed."""
        try:
            return list(map(self._values.__getitem__, parts))
        except KeyError:
            new = list(set(parts).difference(self._values))
        self._values.update(zip(new, self._compute(new), strict=True))
        found = list(map(self._values.__getitem__, parts))
        for part in new:
            if len(part) > _LONGEST_CACHED:
                del self._values[part]
            else:
                self._room -= _BYTES_PER_PART + len(part)
        if self._room < 0:
            self._values.clear()
            self._room = _CACHED_BYTES
        return found


def parts_of(tokenizer: Any) -> Parts | None:
    """Return the division of texts for a tokenizer, None if none is known."""
    normalizers = list(_steps(tokenizer.normalizer))
    pretokenizers = list(_steps(tokenizer.pre_tokenizer))
    added = [token for token in tokenizer.get_added_tokens_decoder().values() if token.content]
    if any(not token.content.isascii() or not token.content.isprintable() or " " in token.content for token in added):
        return None
    if pretokenizers and pretokenizers[0]["type"] in _WORDWISE_PRETOKENIZERS:
        return _words(tokenizer, normalizers, pretokenizers)
    # Their beginnings are fewer, because some vocabularies have hundreds of such tokens that are much alike.
    beginnings = sorted({token.content[:_BEGINNING] for token in added})
    if not pretokenizers:
        return _metaspace_pieces(tokenizer, normalizers, beginnings)
    # A special token may appear only when its text is normalized.
    if normalizers and any(token.normalized for token in added):
        return None
    return _space_first_pieces(normalizers, pretokenizers, beginnings)


def _steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the definitions of a normalizer's or a pre-tokenizer's steps."""
    if component is None:
        return
    definition = json.loads(component.__getstate__())
    if definition["type"] == "Sequence":
        yield from definition.get("normalizers") or definition.get("pretokenizers") or ()
    else:
        yield definition


def _words(
    tokenizer: Any, normalizers: Sequence[Mapping[str, Any]], pretokenizers: Sequence[Mapping[str, Any]]
) -> Parts | None:
    """Return the division into words between white space.

    A model takes each word that a pre-tokenizer gives it on its own.
    """
    if any(step["type"] not in _WORDWISE_NORMALIZERS for step in normalizers):
        return None
    # The first word of a text would be another one than elsewhere.
    if any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") == "first" for step in pretokenizers):
        return None
    is_bert = (
        bool(normalizers)
        and normalizers[0]["type"] == "BertNormalizer"
        and bool(normalizers[0]["handle_chinese_chars"])
        and pretokenizers[0]["type"] == "BertPreTokenizer"
    )
    return Parts(_bert_words if is_bert else str.split, tuple(_joining_spaces(tokenizer)))


def _bert_words(text: str) -> Sequence[str]:
    if text.isascii() or not _BERT_ALONE.search(text):
        return text.split()
    return _BERT_WORDS.findall(text)


def _joining_spaces(tokenizer: Any) -> Iterator[str]:
    """Yield white space by Python's rules that does not end a word for the tokenizer.

    BERT's leaves out vertical tabs, form feeds and other control characters.
    """
    spaces = _white_space()
    texts = [f"a{space}b" for space in spaces]
    apart = tokenizer.encode("a b", add_special_tokens=False).ids
    for space, encoding in zip(spaces, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        if encoding.ids != apart:
            yield space


@functools.cache
def _white_space() -> str:
    return "".join(filter(str.isspace, map(chr, range(sys.maxunicode + 1))))


def _metaspace_pieces(tokenizer: Any, normalizers: Sequence[Mapping[str, Any]], added: Sequence[str]) -> Parts | None:
    """Return the division of a BPE model without pre-tokenizer, such as Llama 2's.

    A merge there may cross a space. None does if no token of the vocabulary has a space after another character.
    """
    from tokenizers.models import BPE

    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _METASPACE}
    if normalizers != [{"type": "Prepend", "prepend": _METASPACE}, replace]:
        return None
    model = tokenizer.model
    if not isinstance(model, BPE) or model.dropout or model.ignore_merges:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if _METASPACE not in vocabulary:
        return None
    inner = (token for token in vocabulary if _METASPACE in token[1:])
    if any(_METASPACE in token.lstrip(_METASPACE) for token in inner):
        return None
    # The normalizer puts back the space that the division takes. It puts none before an empty text.
    return Parts(_after_spaces, (_METASPACE, *added), {"": 1})


def _after_spaces(text: str) -> Sequence[str]:
    """Divide a text at each space that follows a word, and leave this space out."""
    if text.startswith(" ") or _SPACE_AFTER_SPACE.search(text):
        return _SPACE_AFTER_WORD.split(text)
    return text.split(" ")  # the same in a quarter of the time


def _before_spaces(text: str) -> Sequence[str]:
    """Divide a text before each space that follows a word."""
    first, *others = _after_spaces(text)
    return [first, *(" " + part for part in others)]


def _space_first_pieces(
    normalizers: Sequence[Mapping[str, Any]], pretokenizers: Sequence[Mapping[str, Any]], added: Sequence[str]
) -> Parts | None:
    """Return the division for vocabularies of bytes, such as GPT-2's and Qwen's.

    A word's tokens begin with the space before it.
    """
    if any(step["type"] != "NFC" for step in normalizers):
        return None
    if any(step["type"] not in ("Split", "ByteLevel") or step.get("add_prefix_space") for step in pretokenizers):
        return None
    *splits, last = pretokenizers
    if last["type"] != "ByteLevel" or len(splits) > 1 or (not splits and not last["use_regex"]):
        return None
    for split in splits:
        if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
            return None
        if split["pattern"].get("Regex") not in _SPACE_FIRST_EXPRESSIONS:
            return None
    return Parts(_before_spaces, (_MONGOLIAN_SEPARATOR, *added))
