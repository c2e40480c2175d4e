"""Recall at k."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.core.retrieval_metrics import recall_at_k


@pytest.mark.parametrize(
    ("found", "relevant", "k", "recall"),
    [
        ("abc", "a", 3, 1.0),
        ("abc", "c", 2, 0.0),
        ("abc", "cz", 3, 0.5),
        ("abc", "abcdef", 3, 1.0),
        ("abc", "abcdef", 2, 1.0),
        ("xyz", "abc", 3, 0.0),
        ("", "a", 3, 0.0),
        ("aab", "ab", 2, 0.5),
        ("a", "aaa", 5, 1.0),
    ],
)
def test_recall_is_the_share_of_what_could_be_found(found: str, relevant: str, k: int, recall: float) -> None:
    assert recall_at_k(found, list(relevant), k) == recall


def test_the_share_of_nothing_is_no_number() -> None:
    with pytest.raises(ValueError, match="relevant"):
        recall_at_k(["a"], [], 10)


@given(st.lists(st.integers(0, 20)), st.sets(st.integers(0, 20), min_size=1), st.integers(1, 30))
def test_recall_lies_between_none_and_all(found: list[int], relevant: set[int], k: int) -> None:
    recall = recall_at_k(found, relevant, k)
    assert 0 <= recall <= 1
    assert recall_at_k(sorted(relevant) + found, relevant, k) == 1
    assert (recall == 0) == (not relevant & set(found[:k]))
