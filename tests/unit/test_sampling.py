"""Totals from samples: exact where all was read, and within their interval as often as promised elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from embedline.estimate.estimators import Amount, Sample, block_total


def test_a_whole_table_has_no_error() -> None:
    sample = Sample(Amount(3), [(1, 0), (1, 0), (1, 1)], every_block=True)
    assert sample.total([1, 2, 6]) == Amount(9, 0)
    assert Sample(Amount(1), [(1, 0)], every_block=True).total([5]) == Amount(5, 0)


def test_an_empty_table_totals_nothing() -> None:
    assert Sample(Amount(0), [], every_block=True).total([]) == Amount(0)
    assert block_total([], 10) == Amount(0)


def test_one_sampled_row_tells_nothing_of_the_error() -> None:
    total = Sample(Amount(100), [(1, 0)], every_block=True).total([7])
    assert total.value == 700
    assert total.high == float("inf")


@pytest.mark.parametrize("every_block", [True, False])
def test_the_interval_holds_the_truth_about_95_times_of_100(every_block: bool) -> None:
    random = np.random.default_rng(7)
    rows_a_block, blocks = 20, 500
    # Rows of a block are alike, as rows written together are; lengths are as skewed as those of documents.
    mood = np.repeat(random.lognormal(0, 0.4, blocks), rows_a_block)
    values = mood * random.lognormal(3, 0.7, blocks * rows_a_block)
    places = np.repeat(np.arange(blocks), rows_a_block)
    held = 0
    for _ in range(400):
        if every_block:
            chosen = random.random(len(values)) < 0.05
        else:
            chosen = (random.random(blocks) < 0.4)[places] & (random.random(len(values)) < 0.2)
        sample = Sample(Amount(len(values)), [(1, int(place)) for place in places[chosen]], every_block)
        total = sample.total(list(values[chosen]))
        held += total.low <= values.sum() <= total.high
    assert 0.91 * 400 <= held <= 0.99 * 400


def test_an_uncertain_number_of_rows_widens_the_interval() -> None:
    values, clusters = [10.0] * 50, [(1, place) for place in range(50)]
    assert Sample(Amount(1000), clusters, every_block=False).total(values).margin == 0
    assert Sample(Amount(1000, 100), clusters, every_block=False).total(values) == Amount(10_000, 1000)


def test_blocks_tell_the_rows_of_a_table() -> None:
    random = np.random.default_rng(3)
    rows = random.integers(80, 120, 20_000)
    total = block_total([int(n) for n in rows[random.random(20_000) < 0.05]], 20_000)
    assert total.low <= rows.sum() <= total.high
    assert total.margin < 0.02 * total.value
