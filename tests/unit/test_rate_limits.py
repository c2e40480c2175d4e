"""What a window lets go, and how long the next request waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.spending.rate_limits import BURST_SECONDS, MINIMUM_WAIT_SECONDS, RateState, Window


def test_without_limits_all_goes() -> None:
    assert RateState(None, None).admit([1, 2, 3]) == (3, None, None)


def test_a_fresh_window_lets_a_second_of_it_go() -> None:
    count, wait, reason = RateState(Window("requests", 600), None).admit([1] * 50)
    assert (count, reason) == (11, "rate limit of 600 requests a minute")
    assert wait == MINIMUM_WAIT_SECONDS


def test_a_full_bucket_waits_until_it_has_drained() -> None:
    # 600 tokens a minute drain at 10 a second; 200 in the bucket are 19 s above one second's worth.
    count, wait, _ = RateState(None, Window("tokens", 600, used=200, level=200)).admit([5])
    assert (count, wait) == (0, pytest.approx(19))


def test_a_full_minute_waits_until_its_oldest_request_leaves() -> None:
    count, wait, _ = RateState(None, Window("tokens", 600, used=590, first_leaves_in=12)).admit([20])
    assert (count, wait) == (0, 12)


def test_the_longer_wait_is_told() -> None:
    state = RateState(Window("requests", 60, used=5, level=5), Window("tokens", 600, used=300, level=300))
    assert state.admit([1]) == (0, pytest.approx(29), "rate limit of 600 tokens a minute")


@given(
    limit=st.integers(1, 10**6),
    tokens=st.lists(st.integers(1, 10**5), min_size=1, max_size=30),
    used=st.integers(0, 10**6),
    level=st.floats(0, 10**6),
)
def test_a_minute_never_holds_more_than_the_limit_except_one_request_alone(
    limit: int, tokens: list[int], used: int, level: float
) -> None:
    count, wait, _ = RateState(None, Window("tokens", limit, used, min(level, used))).admit(tokens)
    granted = sum(tokens[:count])
    assert used + granted <= max(limit, used) or (used == 0 and count == 1)
    assert (wait is None) == (count == len(tokens))
    assert wait is None or wait >= MINIMUM_WAIT_SECONDS
    # Nothing but the last granted request may go beyond what a second carries.
    assert count < 2 or sum(tokens[: count - 1]) <= limit / 60 * BURST_SECONDS
