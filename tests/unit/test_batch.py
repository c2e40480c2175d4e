"""Packing documents into requests: nothing is left out, nothing is asked for twice, no request is over its limits."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.chunking import Chunk
from embedline.chunking.chunk import content_digest
from embedline.core.request_tokens import likely_tokens, most_tokens, plausible_tokens
from embedline.documents.values import Document
from embedline.queue.outbox import ClaimedRow
from embedline.worker.batch import Unit, pack, request_items, unit_of

VECTOR = np.zeros(2, dtype=np.float32)


def pipeline(items: int = 10, tokens: int = 1000, provider: str = "openai") -> Any:
    """Return what packing asks a pipeline for: its model's limits."""
    config = SimpleNamespace(provider=provider, max_batch_items=items, max_batch_tokens=tokens)
    model = SimpleNamespace(config=config, request_items=items)
    return SimpleNamespace(version=SimpleNamespace(model=model, dimensions=2))


def document(number: int, texts: list[str]) -> Document:
    """Return a document of these chunks."""
    chunks = [Chunk(i, 0, len(text), text, content_digest(text)) for i, text in enumerate(texts)]
    return Document(ClaimedRow((str(number),)), content_hash=b"", chunks=chunks)


# Few different texts, so that they often occur twice; now and then one that is longer than a request may be.
TEXTS = st.text(alphabet="ab", min_size=1, max_size=6) | st.integers(1, 400).map(lambda n: "long " * n)
DOCUMENTS = st.lists(st.lists(TEXTS, max_size=25), max_size=20).map(
    lambda found: [document(number, texts) for number, texts in enumerate(found)]
)


def texts_of(unit: Unit) -> list[bytes]:
    return [digest for request in unit.requests for digest in request.texts]


@given(DOCUMENTS, st.integers(1, 12), st.integers(5, 600), st.sets(st.integers(0, 30)))
def test_packing_leaves_nothing_out_and_keeps_to_the_limits(
    documents: list[Document], items: int, tokens: int, known_places: set[int]
) -> None:
    target = pipeline(items, tokens)
    digests = list(dict.fromkeys(chunk.digest for found in documents for chunk in found.chunks))
    known = {digest: VECTOR for place, digest in enumerate(digests) if place in known_places}
    units = pack(target, documents, known)
    # Every document is in exactly one unit, in order.
    assert [member.key for unit in units for member in unit.documents] == [found.key for found in documents]
    for unit in units:
        wanted = {chunk.digest for member in unit.documents for chunk in member.chunks}
        asked = texts_of(unit)
        assert len(asked) == len(set(asked)), "a text is asked for twice in a unit"
        assert set(asked) == wanted - known.keys()
        assert set(unit.vectors) == wanted & known.keys()
        for request in unit.requests:
            assert 1 <= len(request.texts) <= items
            most = sum(map(most_tokens, request.texts.values()))
            assert most <= tokens or len(request.texts) == 1
            assert request.tokens == sum(map(likely_tokens, request.texts.values()))


@given(DOCUMENTS, st.integers(1, 12))
def test_a_unit_is_about_one_request(documents: list[Document], items: int) -> None:
    for unit in pack(pipeline(items, tokens=10_000), documents, {}):
        # More than one request only where a single document needs it.
        assert len(unit.requests) <= 1 or len(unit.documents) == 1


@given(DOCUMENTS)
def test_texts_go_with_the_digest_under_which_their_vector_is_looked_for(documents: list[Document]) -> None:
    embedded = {chunk.digest: chunk.embedded_text for found in documents for chunk in found.chunks}
    for unit in pack(pipeline(), documents, {}):
        for request in unit.requests:
            assert all(embedded[digest] == text for digest, text in request.texts.items())


def test_a_document_without_chunks_and_one_whose_vectors_are_known_need_no_request() -> None:
    empty, known = document(1, []), document(2, ["a text"])
    (unit,) = pack(pipeline(), [empty, known], {known.chunks[0].digest: VECTOR})
    assert unit.documents == [empty, known]
    assert unit.requests == []
    assert unit.is_answered


def test_rows_with_the_same_text_ask_for_it_once() -> None:
    units = pack(pipeline(items=100), [document(number, ["the same"]) for number in range(100)], {})
    assert Counter(digest for unit in units for digest in texts_of(unit)) == {content_digest("the same"): 1}


def test_a_document_of_600_000_tokens_is_split_over_requests() -> None:
    chunk = "word " * 300
    large = document(1, [f"{number} {chunk}" for number in range(2000)])
    units = pack(pipeline(items=2048, tokens=300_000), [large, document(2, ["small"])], {})
    assert [len(unit.documents) for unit in units] == [1, 1]
    sizes = [sum(map(most_tokens, request.texts.values())) for request in units[0].requests]
    assert len(sizes) >= 2
    assert max(sizes) <= 300_000


# A Chinese character has three bytes and one to two tokens in OpenAI's vocabularies, an emoji four and two to three.
@given(st.text(min_size=1, max_size=50))
def test_requests_are_packed_by_bytes_and_not_by_characters(text: str) -> None:
    assert most_tokens(text) >= len(text.encode()) / 2
    assert likely_tokens(text) >= len(text.encode()) / 3


def test_a_local_model_gets_small_requests_so_that_writing_overlaps_embedding() -> None:
    assert request_items(pipeline(2048, provider="sentence-transformers")) == 64
    assert request_items(pipeline(2048)) == 2048
    assert request_items(pipeline(16, provider="sentence-transformers")) == 16


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_unit_of_part_of_the_documents_keeps_what_is_known(count: int) -> None:
    members = [document(number, [f"text {number}", "shared"]) for number in range(count)]
    known = {content_digest("shared"): VECTOR}
    wanted = {chunk.digest: chunk.content for member in members for chunk in member.chunks if chunk.content != "shared"}
    unit = unit_of(pipeline(items=2), members, known)
    assert set(unit.vectors) == known.keys()
    assert set(texts_of(unit)) == wanted.keys()
    assert max(len(request.texts) for request in unit.requests) <= 2


@pytest.mark.parametrize("counted", [2, 25, 125, 1000])
def test_counts_that_texts_can_have_are_believed(counted: int) -> None:
    assert plausible_tokens(counted, ["a" * 50, "b" * 50], "") == counted


@pytest.mark.parametrize("counted", [None, 0, -1, 1, 1125, 10**30])
def test_counts_that_texts_cannot_have_are_unknown(counted: int | None) -> None:
    assert plausible_tokens(counted, ["a" * 50, "b" * 50], "") is None


def test_a_prefix_and_long_texts_move_the_bounds() -> None:
    assert plausible_tokens(1125, ["a" * 50, "b" * 50], "passage: ") == 1125
    assert plausible_tokens(99, ["a" * 6400], "") is None
    assert plausible_tokens(100, ["a" * 6400], "") == 100
    assert plausible_tokens(30, ["字" * 10], "") == 30
