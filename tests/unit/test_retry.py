"""How long a row waits after a failure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.core.retry import (
    MAX_ATTEMPTS,
    MAX_CRASHES,
    ROWS_PER_CLAIM_AFTER_CRASHES,
    backoff_seconds,
    circuit_seconds,
)


@pytest.mark.parametrize(("attempts", "ceiling"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 16), (100, 16)])
def test_the_ceiling_doubles_and_then_stays(attempts: int, ceiling: int) -> None:
    assert backoff_seconds(attempts, draw=0.0) == 0
    assert backoff_seconds(attempts, draw=0.5) == ceiling / 2
    assert backoff_seconds(attempts, draw=0.999999) == pytest.approx(ceiling, rel=1e-5)


@given(st.integers(1, 20))
def test_jitter_is_full(attempts: int) -> None:
    ceiling = min(2.0 ** (attempts - 1), 16.0)
    draws = [backoff_seconds(attempts) for _ in range(50)]
    assert all(0 <= draw <= ceiling for draw in draws)
    assert len(set(draws)) > 1


@given(st.integers(1, 10), st.floats(0, 1000))
def test_the_providers_own_wish_is_a_floor(attempts: int, retry_after: float) -> None:
    assert backoff_seconds(attempts, retry_after) >= retry_after
    assert circuit_seconds(attempts, retry_after) >= retry_after


def test_an_attempt_below_one_counts_as_the_first() -> None:
    assert backoff_seconds(0, draw=0.5) == backoff_seconds(1, draw=0.5)


def test_a_broken_provider_is_left_alone_longer_and_longer_up_to_a_minute() -> None:
    pauses = [circuit_seconds(failures) for failures in range(20)]
    assert pauses == sorted(pauses)
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(pauses) == 60.0


def test_a_row_is_tried_five_times_and_stands_alone_before_it_is_quarantined() -> None:
    assert MAX_ATTEMPTS == 5
    assert ROWS_PER_CLAIM_AFTER_CRASHES[MAX_CRASHES - 1] == 1
