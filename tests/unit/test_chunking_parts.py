"""The tokens of a text are those of its parts if its tokenizer works word by word."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from embedline.chunking.measure import TokenMeasure
from embedline.chunking.measured import MeasuredChunker
from embedline.chunking.parts import parts_of
from embedline.chunking.recursive import recursive_split
from embedline.chunking.sentences import sentences_split
from support import MODELS, ROOT

_SPACES = "".join(filter(str.isspace, map(chr, range(sys.maxunicode + 1))))
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = (
    *(
        "word",
        "sentence.",
        "don't",
        "I'LL",
        "3.14",
        "x" * 130,
        "##ing",
        "a/b",
        "...",
        "<s>",
        "</s>",
        "[MASK]",
        "[mask]",
    ),
    *(
        "naïve",
        "ß",
        "ΑΣ",
        "İ",
        "≠",
        "\u00a8",
        "\u0301",
        "e\u0301",
        "\ufdfa",
        "漢字。",
        "仮名",
        "か\u3099",
        "한국어",
        "ก็",
    ),
    *("👩‍👩‍👧", "👍🏽", "\u200b", "\u2581", "\u180e", "\u0600", "\0", "\ufffd", "\x7f", "<|end|>", *" \n\t"),
)
_TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=" \n\t.ab'1\u2581" + _SPACES, max_size=30),
    st.lists(st.sampled_from((*_WORDS, " ", " ", " ", "  ", "\n\n", " \n ", *_SPACES)), max_size=30).map("".join),
)


def _of_model(name: str, **changes: Any) -> Tokenizer:
    loaded = json.loads((MODELS / name / "tokenizer.json").read_text(encoding="utf-8"))
    return Tokenizer.from_str(json.dumps({**loaded, "truncation": None, "padding": None, **changes}))


def _of_bytes(*, qwen: bool) -> Tokenizer:
    """Train a small tokenizer of the form of GPT-2's, or of Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken("<|end|>", normalized=not qwen, special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator((ROOT / "README.md").read_text().splitlines(), trainer)
    return tokenizer


_DIVIDING: dict[str, Callable[[], Tokenizer]] = {
    "BERT": lambda: _of_model("minilm"),
    "BERT with cases and accents": lambda: _of_model(
        "minilm", normalizer={"type": "BertNormalizer", "clean_text": False, "handle_chinese_chars": False,
                              "strip_accents": False, "lowercase": False}
    ),
    "words after NFKC": lambda: _of_model(
        "minilm",
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        pre_tokenizer={"type": "WhitespaceSplit"},
    ),
    "Llama": lambda: _of_model("static-256"),
    "GPT-2": lambda: _of_bytes(qwen=False),
    "Qwen": lambda: _of_bytes(qwen=True),
}  # fmt: skip


@functools.cache
def _dividing(kind: str) -> TokenMeasure:
    return TokenMeasure(_DIVIDING[kind]())


class _Whole(TokenMeasure):
    """Encode each text that is measured."""

    parts = None


def _encoded(measure: TokenMeasure, text: str) -> int:
    return len(measure.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", _DIVIDING)
@settings(deadline=None, max_examples=150)
@given(text=_TEXTS)
@example(text="a\x0bb \x1cc")
@example(text="a \u2581b")
@example(text="a <s> b")
@example(text="a. \n  b  c ")
@example(text=" ")
def test_the_sizes_of_a_texts_parts_add_up_to_its_own(kind: str, text: str) -> None:
    measure = _dividing(kind)
    assert measure.sizes([text, text]) == [_encoded(measure, text)] * 2


@pytest.mark.parametrize("kind", _DIVIDING)
def test_a_text_that_is_split_is_tokenized_no_more_than_once(kind: str) -> None:
    counting = _Counting(_DIVIDING[kind]())
    text = (ROOT / "docs" / "explanation" / "chunking.md").read_text() * 3
    chunks = MeasuredChunker(TokenMeasure(counting), 64, 0, recursive_split)(text)
    assert len(chunks) > 10
    assert 0 < counting.characters < len(text)


class _Counting:
    """A tokenizer that counts the characters that it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> list[Any]:
        self.characters += sum(map(len, texts))
        return list(self.tokenizer.encode_batch_fast(texts, **options))


@pytest.mark.parametrize("split", [recursive_split, sentences_split])
@pytest.mark.parametrize("kind", _DIVIDING)
@settings(deadline=None, max_examples=40)
@given(
    text=st.lists(st.sampled_from((*_WORDS, *[" "] * 30, ". ")), max_size=400).map("".join),
    tokens=st.sampled_from([4, 16, 64]),
    overlap=st.sampled_from([0, 3]),
)
def test_chunks_are_those_of_a_tokenizer_that_encodes_each_candidate(
    kind: str, split: Any, text: str, tokens: int, overlap: int
) -> None:
    measure = _dividing(kind)
    whole = _Whole(measure.tokenizer)
    assert MeasuredChunker(measure, tokens, overlap, split)(text) == MeasuredChunker(whole, tokens, overlap, split)(
        text
    )


_UNDIVIDED: dict[str, dict[str, Any]] = {
    "a normalizer that strips the ends": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "a normalizer that replaces any pattern": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "a b"}, "content": "c"}
    },
    "a first word of its own": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
    },
    "a token of two words": {
        "added_tokens": [
            {"id": 5, "content": "two words", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", _UNDIVIDED)
def test_a_tokenizer_whose_words_depend_on_each_other_encodes_each_text(kind: str) -> None:
    tokenizer = _of_model("minilm", **_UNDIVIDED[kind])
    assert parts_of(tokenizer) is None
    measure = TokenMeasure(tokenizer)
    texts = [" a b two words ", "two words", "", "漢字 a  b"]
    assert measure.sizes(texts) == [_encoded(measure, text) for text in texts]


def test_a_vocabulary_with_tokens_across_a_space_has_no_parts() -> None:
    loaded = json.loads((MODELS / "static-256" / "tokenizer.json").read_text(encoding="utf-8"))
    model = loaded["model"]
    added = {"a▁": len(model["vocab"])}
    crossing = _of_model("static-256", model={**model, "vocab": {**model["vocab"], **added}})
    assert parts_of(_of_model("static-256")) is not None
    assert parts_of(crossing) is None


def test_what_is_kept_of_parts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedline.chunking.parts._CACHED_BYTES", 20_000)
    measure = TokenMeasure(_of_model("minilm"))
    kept = []
    for start in range(0, 3_000, 50):
        text = " ".join(f"w{n}" for n in range(start, start + 50)) + " " + "y" * 500
        assert measure.sizes([text]) == [_encoded(measure, text)]
        kept.append(len(measure._part_sizes))
    assert 100 <= max(kept) <= 20_000 // 120
