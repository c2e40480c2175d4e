"""Chunks are slices of the text, within the model's own tokens."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedline.chunking import Chunk
from embedline.chunking.chunk import Chunker, content_digest, whole_text
from embedline.chunking.factory import recursive_chunker
from embedline.core.tokens import CHARACTERS_PER_TOKEN
from embedline.errors import InvalidParameter
from embedline.estimate.measure import count_tokens
from support import MODELS

_MODELS = ("static-256", "minilm")
_TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="ab \n.", max_size=600),
    st.lists(
        st.sampled_from(["word", "sentence.", "\n\n", " ", "漢字", "👩‍👩‍👧", "naïve", "\r\n", "\u200b", "x" * 50])
    ).map("".join),
    st.lists(
        st.sampled_from(["one ", "two. ", "three\n", "four\n\n", "é ", "# head\n"]), min_size=20, max_size=200
    ).map("".join),
)


@functools.cache
def _tokenizer_text(model: str) -> str:
    """tokenizer.json as the model host hands it over: without truncation and padding, which would hide tokens."""
    loaded = json.loads((MODELS / model / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps({**loaded, "truncation": None, "padding": None})


@functools.cache
def _tokenizer(model: str) -> Tokenizer:
    return Tokenizer.from_str(_tokenizer_text(model))


@functools.cache
def _chunker(model: str | None, tokens: int, overlap: int = 0) -> Chunker:
    return recursive_chunker(_tokenizer_text(model) if model else None, tokens, overlap)


def _assert_slices(text: str, chunks: list[Chunk]) -> None:
    assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.content
        assert chunk.content
        assert chunk.digest == hashlib.sha256(chunk.content.encode()).digest()[:16]


@pytest.mark.parametrize("model", [*_MODELS, None])
@settings(deadline=None, max_examples=60)
@given(text=_TEXTS, tokens=st.sampled_from([1, 2, 7, 32, 256]))
def test_slices_without_overlap_rebuild_the_text(model: str | None, text: str, tokens: int) -> None:
    chunks = _chunker(model, tokens)(text)
    _assert_slices(text, chunks)
    assert "".join(chunk.content for chunk in chunks) == (text if chunks else "")
    if text.strip():
        assert chunks


@pytest.mark.parametrize("model", [*_MODELS, None])
@settings(deadline=None, max_examples=60)
@given(text=_TEXTS, tokens=st.sampled_from([8, 32]), overlap=st.sampled_from([1, 4, 7]))
def test_slices_with_overlap_cover_the_text_in_order(model: str | None, text: str, tokens: int, overlap: int) -> None:
    chunks = _chunker(model, tokens, overlap)(text)
    _assert_slices(text, chunks)
    if not chunks:
        return
    assert chunks[0].start == 0
    assert chunks[-1].end == len(text)
    for before, after in itertools.pairwise(chunks):
        assert before.start < after.start <= before.end


@pytest.mark.parametrize("model", _MODELS)
@settings(deadline=None, max_examples=80)
@given(text=_TEXTS, tokens=st.sampled_from([32, 64, 256]))
def test_no_chunk_is_longer_than_its_limit_in_the_models_own_tokens(model: str, text: str, tokens: int) -> None:
    tokenizer = _tokenizer(model)
    for chunk in _chunker(model, tokens)(text):
        # White space at the end of a chunk is stored, and stripped before the model sees it.
        assert len(tokenizer.encode(chunk.content.strip(), add_special_tokens=False).ids) <= tokens


def test_a_tokenizers_own_truncation_and_padding_do_not_count() -> None:
    loaded = json.loads((MODELS / "minilm" / "tokenizer.json").read_text(encoding="utf-8"))
    assert loaded["truncation"]
    padding = {**loaded["padding"], "strategy": {"Fixed": 300}}
    truncation = {**loaded["truncation"], "max_length": 32}
    own = json.dumps({**loaded, "padding": padding, "truncation": truncation})
    text = "A sentence of six words stands here. " * 100
    assert recursive_chunker(own, 64)(text) == _chunker("minilm", 64)(text)
    texts = [text, "short"]
    assert count_tokens(own, texts) == count_tokens(_tokenizer_text("minilm"), texts)


def test_without_a_tokenizer_characters_are_counted() -> None:
    chunks = recursive_chunker(None, 10)("word " * 100)
    assert all(len(chunk.content.strip()) <= 10 * CHARACTERS_PER_TOKEN for chunk in chunks)


def test_offsets_count_characters_not_bytes() -> None:
    text = "äöü " * 40 + "\n\n" + "漢字 " * 40
    chunks = recursive_chunker(None, 10)(text)
    assert len(chunks) > 2
    _assert_slices(text, chunks)


def test_a_paragraph_is_not_torn_where_it_fits() -> None:
    paragraphs = [f"Paragraph {n} has a few words in it." for n in range(20)]
    chunks = recursive_chunker(_tokenizer_text("minilm"), 12)("\n\n".join(paragraphs))
    assert [chunk.content.strip() for chunk in chunks] == paragraphs


def test_chunking_none_gives_the_whole_text() -> None:
    assert whole_text("a b\nc") == [Chunk(0, 0, 5, "a b\nc", content_digest("a b\nc"))]


@pytest.mark.parametrize(("tokens", "overlap"), [(10, 10), (10, 11), (10, -1)])
def test_an_overlap_that_is_not_smaller_than_the_chunk_is_refused(tokens: int, overlap: int) -> None:
    with pytest.raises(InvalidParameter, match="overlap"):
        recursive_chunker(None, tokens, overlap)


def test_a_large_text_is_chunked_completely() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20_000
    chunks = recursive_chunker(_tokenizer_text("static-256"), 256)(text)
    assert "".join(chunk.content for chunk in chunks) == text
