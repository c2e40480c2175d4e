"""The gate: measures of rankings, and what so many queries can decide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedline.core.statistics import judge, judge_columns, mean_interval, ndcg_at_k, reciprocal_rank, score_ranking

MARGIN = 0.01
SEEDS = range(20)
scores = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def _few(value: float, count: int = 50) -> Any:
    return np.full(count, value)


@pytest.mark.parametrize(
    ("found", "grades", "k", "expected"),
    [
        ("ab", {"a": 1}, 10, 1.0),
        ("ba", {"a": 1}, 10, 1 / math.log2(3)),
        ("ba", {"a": 1}, 1, 0.0),
        ("ab", {"a": 1, "b": 3}, 10, (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))),
        ("xy", {"a": 2}, 10, 0.0),
        ("", {"a": 2}, 10, 0.0),
        ("aa", {"a": 1, "b": 1}, 10, 1 / (1 + 1 / math.log2(3))),
        ("ab", {"a": 1, "b": 0, "c": -2}, 10, 1.0),
        ("abc", dict.fromkeys("abcdef", 1), 3, 1.0),
    ],
)
def test_ndcg_discounts_grades_by_rank(found: str, grades: dict[Any, float], k: int, expected: float) -> None:
    assert ndcg_at_k(found, grades, k) == pytest.approx(expected)


def test_nothing_relevant_is_no_query() -> None:
    with pytest.raises(ValueError, match="relevant"):
        ndcg_at_k("ab", {"a": 0}, 10)


def test_the_reciprocal_rank_is_that_of_the_first_relevant() -> None:
    assert reciprocal_rank("xyab", {"a": 1, "b": 5}) == pytest.approx(1 / 3)
    assert reciprocal_rank("xy", {"a": 1}) == 0
    assert score_ranking("xya", {"a": 1}, 2) == (0, 0, 0)


@given(st.lists(st.integers(0, 9), max_size=12), st.dictionaries(st.integers(0, 9), st.floats(0.5, 9), min_size=1))
def test_every_measure_lies_between_0_and_1_and_the_ideal_ranking_has_1(
    found: list[int], grades: dict[Any, float]
) -> None:
    assert all(0 <= value <= 1 + 1e-12 for value in score_ranking(found, grades, 10))
    ideal = sorted(grades, key=lambda key: -grades[key])
    assert score_ranking(ideal, grades, 10) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("points", [-0.02, 0.02, 0.0])
def test_fifty_queries_cannot_see_two_points(seed: int, points: float) -> None:
    compared = judge(_few(0.8), _few(0.8 + points), MARGIN, seed)
    assert compared.verdict == "inconclusive"
    assert compared.difference == pytest.approx(points)
    assert compared.queries_to_decide is not None
    assert compared.queries_to_decide > 50


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_query_of_fifty_that_differs_decides_nothing(seed: int, sign: int) -> None:
    old, new = _few(0.0 if sign > 0 else 1.0), _few(0.0 if sign > 0 else 1.0)
    new[0] += sign
    assert judge(old, new, MARGIN, seed).verdict == "inconclusive"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("points", [-0.02, 0.02])
def test_noisy_queries_two_points_apart_are_inconclusive(seed: int, points: float) -> None:
    random = np.random.default_rng(seed)
    old = random.uniform(0.1, 0.9, 50)
    noise = random.normal(0, 0.05, 50)
    new = np.clip(old + points + noise - noise.mean(), 0, 1)
    assert judge(old, new, MARGIN, seed).verdict == "inconclusive"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_collapse_fails_with_fifty_queries(seed: int) -> None:
    random = np.random.default_rng(seed)
    old, new = (random.random(50) < 0.8).astype(float), (random.random(50) < 0.3).astype(float)
    assert judge(old, new, MARGIN, seed).verdict == "fail"
    assert judge(_few(0.8), _few(0.3), MARGIN, seed).verdict == "fail"


@pytest.mark.parametrize("seed", SEEDS)
def test_three_thousand_queries_without_a_difference_pass(seed: int) -> None:
    random = np.random.default_rng(seed)
    old = random.uniform(0.2, 0.8, 3000)
    assert judge(old, old, MARGIN, seed).verdict == "pass"
    compared = judge(old, old + 0.15 * random.permutation(np.tile([-1, 1], 1500)), MARGIN, seed)
    assert compared.verdict == "pass"
    assert compared.queries_to_decide is None


def test_a_clear_win_passes_with_few_queries() -> None:
    assert judge(_few(0.3), _few(0.8), MARGIN).verdict == "pass"


def test_as_many_queries_as_it_names_decide() -> None:
    needed = judge(_few(0.8), _few(0.8), MARGIN).queries_to_decide
    assert needed is not None
    assert judge(_few(0.8, needed), _few(0.8, needed), MARGIN).verdict == "pass"
    random = np.random.default_rng(3)

    def pair(count: int) -> tuple[Any, Any]:
        old = random.uniform(0.3, 0.7, count)
        return old, old + random.choice([-0.2, 0.2], count) + 0.01

    needed = judge(*pair(200), MARGIN).queries_to_decide
    assert needed is not None
    verdicts = [judge(*pair(2 * needed), MARGIN, seed).verdict for seed in range(5)]
    assert verdicts.count("pass") >= 4


@given(scores, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_old_and_new_change_places_with_the_sign(old: list[float], random: Any) -> None:
    new = [random.random() for _ in old]
    there, back = (judge(np.array(a), np.array(b), MARGIN, 1) for a, b in ((old, new), (new, old)))
    assert there.difference == pytest.approx(-back.difference)
    assert there.low <= there.high
    # Only the samples differ: the same rows in the same order, but the made-up ones have changed places.
    # Of so few queries a bound is one of few values: each samples' noise may take it to the next.
    assert there.low == pytest.approx(-back.high, abs=0.15)
    assert not (there.verdict == "fail" and back.verdict == "fail")


def test_the_seed_decides_alone() -> None:
    random = np.random.default_rng(5)
    old, new = random.random(100), random.random(100)
    assert judge(old, new, MARGIN, 7) == judge(old, new, MARGIN, 7)
    assert judge(old, new, MARGIN, 7).low != judge(old, new, MARGIN, 8).low


def test_measures_are_compared_over_the_same_samples() -> None:
    random = np.random.default_rng(6)
    old, new = random.random((80, 3)), random.random((80, 3))
    assert judge_columns(old, new, MARGIN, 2)[1] == judge(old[:, 1], new[:, 1], MARGIN, 2)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(9)
    covered = 0
    for seed in range(200):
        low, high = mean_interval((random.random(60) < 0.7).astype(float), seed)
        covered += low <= 0.7 <= high
    assert covered >= 184  # 95 % of 200 is 190, with a standard deviation of 3


def test_no_query_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one query"):
        judge(np.array([]), np.array([]), MARGIN)
