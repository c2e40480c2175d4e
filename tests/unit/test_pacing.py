"""How much a worker takes on at a time, and whose turn it is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.catalog.settings import PacingLimits
from embedline.worker.batch_size import MAX_BATCH_BYTES, LiveShare, Pace, Turns

LIMITS = PacingLimits(batch_seconds=1.0, commit_seconds=0.5, min_rows=16, max_rows=4000)
FAST, SLOW = 0.1, 2.0


def full_batch(pace: Pace, batch_seconds: float = FAST, commit_seconds: float = FAST) -> int:
    """Measure a batch as large as it may be; return the size of the next."""
    pace.measured(pace.rows, batch_seconds, commit_seconds)
    return pace.rows


# Pace


def test_batches_double_until_one_is_too_slow_and_then_grow_by_steps() -> None:
    pace = Pace(LIMITS)
    first = pace.rows
    assert full_batch(pace) == 2 * first
    assert full_batch(pace) == 4 * first
    assert full_batch(pace, SLOW) == 2 * first
    steps = [full_batch(pace) for _ in range(3)]
    assert steps == [2 * first + 100 * n for n in (1, 2, 3)]


def test_a_slow_commit_halves_the_batches_however_fast_the_provider_is() -> None:
    pace = Pace(LIMITS)
    before = pace.rows
    assert full_batch(pace, FAST, commit_seconds=0.6) == before // 2


def test_a_far_provider_is_slow_at_any_size_and_does_not_shrink_the_batches() -> None:
    pace = Pace(LIMITS)
    before = pace.rows
    assert full_batch(pace, SLOW) == before // 2
    assert full_batch(pace, SLOW) == before, "the halving did not help"
    assert [full_batch(pace, SLOW) for _ in range(2)] == [before + 100, before + 200]
    assert full_batch(pace, 4 * SLOW) == (before + 200) // 2, "slower than its latency"


def test_batches_of_before_a_halving_do_not_halve_again() -> None:
    pace = Pace(LIMITS)
    before = pace.rows
    for _ in range(4):
        pace.measured(before, SLOW, FAST)
    assert pace.rows == before // 2


def test_a_first_batch_is_bounded_by_the_likely_bytes_of_its_rows() -> None:
    assert Pace(LIMITS, row_bytes=45).rows == 1000
    assert Pace(LIMITS, row_bytes=8000).rows == 32
    assert Pace(LIMITS, row_bytes=100_000).rows == 2
    assert Pace(LIMITS, row_bytes=10_000_000).rows == 1


def test_a_first_batch_is_bounded_by_its_likely_chunks() -> None:
    assert Pace(LIMITS, row_bytes=8000, chunk_bytes=80).rows == 10
    assert Pace(LIMITS, row_bytes=8000, chunk_bytes=1000).rows == 32


def test_bytes_of_a_batch_double_with_what_was_measured_and_are_bounded() -> None:
    pace = Pace(LIMITS, row_bytes=2000)
    first = pace.bytes
    # The rows are longer than they were taken for: fewer of them filled the batch.
    pace.measured(8, FAST, FAST, first)
    assert (pace.bytes, pace.rows) == (2 * first, 16)
    for _ in range(10):
        pace.measured(pace.rows, FAST, FAST, pace.bytes)
    assert pace.bytes == MAX_BATCH_BYTES
    pace.measured(pace.rows, SLOW, FAST, pace.bytes)
    assert pace.bytes == MAX_BATCH_BYTES // 2


def test_a_wrong_guess_of_the_bytes_counts_no_longer_once_rows_were_seen() -> None:
    pace = Pace(LIMITS, row_bytes=100_000)
    pace.measured(2, FAST, FAST, 2 * 50)
    assert pace.rows == 1000


def test_a_batch_that_was_not_full_says_nothing_about_larger_ones() -> None:
    pace = Pace(LIMITS)
    before = pace.rows
    pace.measured(before // 2, FAST, FAST)
    assert pace.rows == before
    # But that it was too slow, it does say.
    pace.measured(before // 2, SLOW, FAST)
    assert pace.rows == before // 2


@given(
    st.integers(1, 5000),
    st.integers(0, 5000),
    st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 10), st.floats(0, 10)), max_size=60),
)
def test_batches_keep_to_their_bounds_whatever_is_measured(
    least: int, more: int, measured: list[tuple[int, float, float]]
) -> None:
    pace = Pace(PacingLimits(min_rows=least, max_rows=least + more))
    for rows, batch_seconds, commit_seconds in measured:
        assert least <= pace.rows <= least + more
        pace.measured(rows, batch_seconds, commit_seconds)
    assert least <= pace.rows <= least + more


@given(st.floats(50, 20_000))
def test_batches_settle_around_what_fits_into_the_time(rows_a_second: float) -> None:
    pace = Pace(LIMITS)
    sizes = [full_batch(pace, pace.rows / rows_a_second) for _ in range(200)][100:]
    fits = min(max(rows_a_second * LIMITS.batch_seconds, LIMITS.min_rows), LIMITS.max_rows)
    assert max(sizes) <= fits + 101
    assert min(sizes) >= min(fits / 2, LIMITS.max_rows) - 1


# Turns


def take_turns(turns: Turns, weights: dict[int, float], count: int, rows: dict[int, int] | None = None) -> Counter[int]:
    """Let pipelines that always have work take `count` turns; return the rows that each has had."""
    had: Counter[int] = Counter()
    for _ in range(count):
        first = turns.order(list(weights))[0]
        taken = (rows or {}).get(first, 100)
        had[first] += taken
        turns.worked(first, taken, weights[first], [])
    return had


def test_work_is_shared_in_proportion_to_weight() -> None:
    had = take_turns(Turns(), {1: 1.0, 2: 3.0}, 400)
    assert had[2] / had[1] == pytest.approx(3.0, rel=0.02)


def test_shares_are_of_rows_and_not_of_batches() -> None:
    # One pipeline's batches are ten times as large: it has a tenth of the turns.
    had = take_turns(Turns(), {1: 1.0, 2: 1.0}, 1100, {1: 1000, 2: 100})
    assert had[1] / had[2] == pytest.approx(1.0, rel=0.05)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_shares_follow_any_weights(weights: list[float]) -> None:
    had = take_turns(Turns(), dict(enumerate(weights)), 4000)
    for number, weight in enumerate(weights):
        # No pipeline is further off than one batch of each.
        assert abs(had[number] / 400_000 - weight / sum(weights)) < len(weights) * 100 / 400_000 * 10


def test_a_pipeline_that_had_nothing_to_do_saves_up_no_turns() -> None:
    turns = Turns()
    for _ in range(100):
        # The second is asked, too, and has nothing.
        order = turns.order([1, 2])
        turns.worked(1, 100, 1.0, order[: order.index(1)])
    had = take_turns(turns, {1: 1.0, 2: 1.0}, 20)
    assert had == {1: 1000, 2: 1000}


def test_a_new_pipeline_has_its_turn_at_once_and_then_its_share() -> None:
    turns = Turns()
    take_turns(turns, {1: 1.0, 2: 1.0}, 100)
    had = take_turns(turns, {1: 1.0, 2: 1.0, 3: 1.0}, 30)
    assert had == {1: 1000, 2: 1000, 3: 1000}


def test_a_pipeline_that_had_to_wait_for_its_provider_keeps_its_account() -> None:
    turns = Turns()
    had: Counter[int] = Counter()
    for number in range(400):
        # The first pipeline's model is busy in every other turn: it is not asked then.
        asked = {2: 3.0} if number % 2 else {1: 1.0, 2: 3.0}
        had += take_turns(turns, asked, 1)
    # Its turns fall on every other one only, so the shares are not exact; without the account they are 1 to 1.
    assert 2.5 < had[2] / had[1] < 4.0


# LiveShare


def shares(share: float, count: int) -> float:
    """Return the part of `count` batches that live changes have while both always have work."""
    live_share, live = LiveShare(share), 0
    for _ in range(count):
        backfill = live_share.backfill_first()
        live_share.took(backfill=backfill)
        live += not backfill
    return live / count


@given(st.floats(0, 1))
def test_live_changes_have_their_share_of_the_batches(share: float) -> None:
    assert shares(share, 1000) == pytest.approx(share, abs=0.01)


def test_live_changes_come_first() -> None:
    assert not LiveShare(0.8).backfill_first()


def test_a_backfill_that_had_nothing_for_long_does_not_catch_up() -> None:
    live_share = LiveShare(0.8)
    for _ in range(1000):
        live_share.took(backfill=False)
    streak = 0
    while live_share.backfill_first():
        live_share.took(backfill=True)
        streak += 1
    assert streak <= 2
