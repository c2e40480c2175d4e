"""A fingerprint changes with everything that decides what a vector means, and with nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.core.fingerprint import recipe_fingerprint

RECIPE = {"model": "m", "dimensions": 256, "normalised": True, "prefix": "", "chunk_tokens": None}
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.floats(allow_nan=False))


def test_a_fingerprint_is_a_sha256_that_stays_the_same_between_releases() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", recipe_fingerprint(RECIPE))
    assert recipe_fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


@given(st.dictionaries(st.text(), _VALUES), st.randoms())
def test_the_order_of_the_recipe_does_not_matter(recipe: dict[str, object], random: object) -> None:
    items = list(recipe.items())
    random.shuffle(items)
    assert recipe_fingerprint(dict(items)) == recipe_fingerprint(recipe)


@pytest.mark.parametrize(
    "change",
    [{"model": "n"}, {"dimensions": 257}, {"normalised": False}, {"prefix": " "}, {"chunk_tokens": 0}, {"new": None}],
)
def test_every_change_of_the_recipe_changes_it(change: dict[str, object]) -> None:
    assert recipe_fingerprint({**RECIPE, **change}) != recipe_fingerprint(RECIPE)


def test_a_number_is_not_its_text() -> None:
    assert recipe_fingerprint({"a": 1}) != recipe_fingerprint({"a": "1"})
