"""The number of lists by pgvector's rule."""

from __future__ import annotations

import pytest

from embedline.core.ivfflat import default_lists


@pytest.mark.parametrize(
    ("rows", "lists"),
    [(0, 1), (999, 1), (10_000, 10), (1_000_000, 1_000), (4_000_000, 2_000), (10**12, 32_768)],
)
def test_lists_are_a_thousandth_of_the_rows_and_their_root_above_a_million(rows: int, lists: int) -> None:
    assert default_lists(rows) == lists
