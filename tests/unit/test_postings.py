"""Words packed into pages come back, and rank as the formula says."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedline.keywords import postings
from embedline.keywords.postings import Entries, Postings

WORDS = st.sampled_from([-(2**63), -5, 0, 1, 7, 2**40, 2**63 - 1])
# Counts below this have weights that are a step apart in the shortest chunk, too.
_TOLD_APART = 8
CHUNKS = st.lists(st.dictionaries(WORDS, st.integers(1, 12), max_size=7), min_size=1, max_size=40)


def _postings(chunks: list[dict[int, int]]) -> tuple[Postings, np.ndarray, float]:
    rows = [(word, place, count) for place, chunk in enumerate(chunks) for word, count in chunk.items()]
    columns = [np.array([row[i] for row in rows], dtype=np.int64) for i in range(3)]
    lengths = np.array([sum(chunk.values()) for chunk in chunks], dtype=np.int64)
    return Postings(*columns), lengths, max(float(lengths.mean()), 1.0)


@settings(deadline=None, max_examples=100)
@given(CHUNKS)
def test_packed_words_come_back(chunks: list[dict[int, int]]) -> None:
    given_postings, lengths, mean = _postings(chunks)
    pages = list(postings.pack(given_postings, lengths, mean))
    found = postings.unpack([page.data for page in pages], lengths, mean)
    given_triples, found_triples = _triples(given_postings), _triples(found)
    assert [triple[:2] for triple in found_triples] == [triple[:2] for triple in given_triples]
    before, after = (_weights(triples, lengths, mean) for triples in (given_triples, found_triples))
    # A weight is stored in one of 255 steps. In a short chunk a count of 12 and one of 13 are nearer to each other.
    assert np.abs(after - before).max(initial=0) < (postings.K1 + 1) / 255
    assert all(b == a for (*_, a), (*_, b) in zip(given_triples, found_triples, strict=True) if a < _TOLD_APART)
    assert [page.first for page in pages] == sorted(page.first for page in pages)
    for before, after in pairwise(pages):
        assert before.last < after.first


def _weights(triples: list[tuple[int, int, int]], lengths: np.ndarray, mean: float) -> np.ndarray:
    ordinals, counts = (np.array([triple[i] for triple in triples], dtype=np.int64) for i in (1, 2))
    return postings.weights_of(counts, lengths[ordinals], mean)


def _triples(found: Postings) -> list[tuple[int, int, int]]:
    return sorted(zip(found.words.tolist(), found.ordinals.tolist(), found.counts.tolist(), strict=True))


@pytest.mark.parametrize("share", [0.01, 0.5], ids=["a list", "a weight for each chunk"])
def test_a_word_of_many_chunks_is_found_in_its_page(share: float) -> None:
    having = [number for number in range(20_000) if number % int(1 / share) == 0]
    chunks = [
        {1: 1, 9: 2} if number in set(having[:1]) or number % int(1 / share) == 0 else {1: 1}
        for number in range(20_000)
    ]
    given_postings, lengths, mean = _postings(chunks)
    pages = list(postings.pack(given_postings, lengths, mean))
    page = next(page for page in pages if page.first <= 9 <= page.last)
    found = postings.find(page.data, 9)
    assert found is not None
    assert found.chunk_count == len(having)
    scores = np.zeros(20_000, dtype=np.float32)
    postings.add_scores(scores, found, 2.0)
    assert np.flatnonzero(scores).tolist() == having
    exact = 2.0 * postings.weights_of(np.array([2]), lengths[:1] + 0 * 2, mean)
    assert scores[having[0]] == pytest.approx(exact[0], abs=0.01)
    assert postings.find(page.data, 8) is None


def test_entries_score_as_the_formula_says() -> None:
    # Two chunks: word 3 twice in the first of four words; words 3 and 5 once each in the second.
    heads = b"".join(
        int(n).to_bytes(size, "big") for row in ((11, 4, 2), (12, 2, 2)) for n, size in zip(row, (8, 4, 4), strict=True)
    )
    words = b"".join(int(n).to_bytes(8, "big", signed=True) for n in (3, -8, 3, 5))
    entries = Entries.from_bytes(heads, words, bytes([2, 2, 1, 1]))
    matches = entries.matching(np.array([5, 3, 99]))
    assert matches.frequencies(3).tolist() == [1, 2, 0]
    scores = matches.scores(np.array([1.0, 0.5, 9.0]), mean_length=3.0)
    saturation = [1.2 * (0.25 + 0.75 * length / 3) for length in (4, 2)]
    assert scores.tolist() == pytest.approx([
        0.5 * 2 * 2.2 / (2 + saturation[0]), (0.5 + 1.0) * 2.2 / (1 + saturation[1]),
    ])  # fmt: skip


def test_idf_is_never_negative() -> None:
    assert postings.idf(10, np.array([0, 1, 10, 12])).tolist() == pytest.approx(
        [np.log(1 + 10.5 / 0.5), np.log(1 + 9.5 / 1.5), np.log(1 + 0.5 / 10.5), np.log(1 + 0.5 / 10.5)]
    )
