"""The arithmetic of costs, and the crossover by both of its sides."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from embedline.estimate.costs import HOURS_A_MONTH, Hosted, Load, Own, crossover, hybrid_month

# 10,000 documents of 200 tokens on each of 30.4375 days, 90 % of them in bulk.
_LOAD = Load(documents=60_875_000, queries=0, bulk_share=0.9)
# 0.10 for 1,000,000 tokens, batches at half of it; 0.50 an hour at 20,000 tokens a second.
_HOSTED = Hosted(price=0.10, batch_discount=0.5)
_OWN = Own(price_an_hour=0.50, tokens_per_second=20_000)


def test_the_worked_example_of_a_service() -> None:
    # 54,787,500 tokens at 0.05 and 6,087,500 at 0.10 the million.
    assert _HOSTED.month(_LOAD) == pytest.approx(2.739375 + 0.60875)
    assert Hosted(0.10, 0).month(_LOAD) == pytest.approx(6.0875)
    # 100,000,000 tokens that may all wait.
    assert _HOSTED.generation(100_000_000) == pytest.approx(5.0)


def test_the_worked_example_of_a_machine() -> None:
    assert HOURS_A_MONTH == 730.5
    assert _OWN.month(_LOAD) == pytest.approx(365.25)
    assert _OWN.machines(_LOAD) == 1
    # 100,000,000 tokens take 5,000 s, 1.3889 hours.
    assert _OWN.generation(100_000_000) == pytest.approx(0.694444, abs=1e-6)
    assert _OWN.month_capacity == 20_000 * 730.5 * 3600


def test_the_worked_example_of_both() -> None:
    # 54,787,500 tokens take 2,739.375 s; that part of an hour costs 0.38046875. The rest is hosted.
    assert hybrid_month(_LOAD, _HOSTED, _OWN) == pytest.approx(0.38046875 + 0.60875)


def test_queries_are_paid_in_full_and_keep_a_machine_running() -> None:
    # 2 a second of 16 tokens: 84,153,600 tokens a month.
    load = Load(0, 2 * 16 * HOURS_A_MONTH * 3600, bulk_share=1)
    assert load.queries == 84_153_600
    assert _HOSTED.month(load) == pytest.approx(8.41536)
    assert _OWN.month(load) == pytest.approx(365.25)


def test_a_machine_that_has_only_bulk_stops_in_between() -> None:
    load = Load(72_000_000, 0, bulk_share=1)
    assert _OWN.machines(load) == 0
    # One hour.
    assert _OWN.month(load) == pytest.approx(0.50)


def test_a_load_above_one_machine_takes_two() -> None:
    assert _OWN.machines(Load(_OWN.month_capacity, 0, 0)) == 1
    assert _OWN.machines(Load(_OWN.month_capacity + 1, 0, 0)) == 2


def test_the_crossover_by_hand() -> None:
    # 365.25 / (0.10 × 0.55 / 1,000,000)
    assert crossover(_LOAD, _HOSTED, _OWN) == pytest.approx(6_640_909_090.909, rel=1e-9)


def test_a_service_that_is_cheaper_than_a_busy_machine_has_no_crossover() -> None:
    # A machine that is never idle embeds 1,000,000 tokens for 0.50 / 72 = 0.00694.
    assert crossover(Load(1, 0, 0), Hosted(0.006, 0), _OWN) is None
    assert crossover(Load(1, 0, 0), Hosted(0.007, 0), _OWN) == pytest.approx(365.25 / 0.007 * 1e6)
    assert crossover(Load(1, 0, 1), Hosted(0.006, 0), _OWN) is None
    assert crossover(Load(1, 0, 1), Hosted(0.007, 0), _OWN) == 0


@given(
    queries=st.floats(0, 1e12),
    bulk_share=st.floats(0, 0.99),
    price=st.floats(0.001, 10),
    discount=st.floats(0, 0.9),
    hour=st.floats(0.01, 50),
    rate=st.floats(100, 1e6),
)
def test_both_sides_cost_the_same_at_the_crossover(
    queries: float, bulk_share: float, price: float, discount: float, hour: float, rate: float
) -> None:
    hosted, own = Hosted(price, discount), Own(hour, rate)
    found = crossover(Load(1, queries, bulk_share), hosted, own)
    if found is None:
        # Nowhere cheaper: not with the machines that the queries need, nor with full ones beside them.
        least = max(1, math.ceil(queries / own.month_capacity))
        for count in (least, least + 1, 10 * least):
            load = Load(count * own.month_capacity - queries, queries, bulk_share)
            assert own.month(load) >= hosted.month(load) * (1 - 1e-9)
        return
    at = Load(found - queries, queries, bulk_share)
    if found == queries:
        assert own.month(at) <= hosted.month(at) * (1 + 1e-9)
        return
    # The documents were computed by a subtraction that loses digits if there are far more queries.
    assume(found - queries > 1e-3 * queries)
    if abs(found / own.month_capacity - round(found / own.month_capacity)) > 1e-6:
        assert own.month(at) == pytest.approx(hosted.month(at), rel=1e-6)
    before = Load((found - queries) * 0.99, queries, bulk_share)
    assert hosted.month(before) < own.month(before)
