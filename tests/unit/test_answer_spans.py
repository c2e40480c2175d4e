"""What the best chunks have of an answer, and a content put together from its chunks."""

from __future__ import annotations

import pytest

from embedline.chunking.chunk import Span
from embedline.estimate.answer_spans import Place, found_share, joined


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(0, 100)], 1.0),
        ([(0, 20)], 0.5),
        ([(0, 15), (15, 40)], 1.0),
        ([(20, 40), (10, 25)], 1.0),  # an overlap counts once, in any order
        ([(12, 14), (18, 20)], 0.2),
        ([(30, 90)], 0.0),
        ([], 0.0),
    ],
)
def test_an_answer_counts_by_its_characters(spans: list[Span], share: float) -> None:
    best = [Place(3, span) for span in spans]
    assert found_share([*best, Place(4, (0, 100))], {3: [(10, 30)]}) == pytest.approx(share)


def test_answers_of_several_documents_count_alike() -> None:
    best = [Place(1, (0, 50)), Place(2, (0, 5))]
    assert found_share(best, {1: [], 2: [(0, 10)], 3: []}) == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_longer_answer_of_a_document_counts_for_more() -> None:
    assert found_share([Place(1, (0, 10))], {1: [(0, 10), (50, 80)]}) == pytest.approx(10 / 40)


def test_a_content_is_put_together_from_overlapping_chunks() -> None:
    assert joined([(0, "Knead the"), (6, "the dough"), (15, " well")]) == "Knead the dough well"
    assert joined([(0, "Knead"), (9, " dough")]) is None
    assert joined([(5, " the")]) is None
