"""The size of a slice, found by measuring: with machines whose speed is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from embedline.model_host.slicing import LEAST_CHARACTERS, MAX_SLICE_SECONDS, SliceTuner

Seconds = Callable[[int], float]
TEXT = 100


def work(tuner: SliceTuner, seconds: Seconds, slices: int = 400, noise: float = 0.0) -> list[int]:
    """Let the tuner see full slices of texts of 100 characters; returns the characters of each."""
    dice, sizes = random.Random(7), []
    for _ in range(slices):
        limits = tuner.limits
        count = max(1, min(limits.texts, limits.characters // TEXT))
        tuner.note([TEXT] * count, seconds(count * TEXT) * dice.uniform(1 - noise, 1 + noise))
        sizes.append(limits.characters)
    return sizes


def test_the_size_grows_while_a_call_costs_more_than_its_texts() -> None:
    sizes = work(SliceTuner(1024), lambda characters: 0.005 + characters * 1e-6)
    assert sizes[-1] >= 65_536
    assert len(set(sizes[:16])) == 1, "nothing is tried before the machine is warm"


def test_the_size_shrinks_where_caches_overflow_whatever_the_noise() -> None:
    sizes = work(SliceTuner(16_384), lambda characters: characters * (1e-6 + characters * 1e-10), noise=0.1)
    assert sizes[-1] <= 4096


def test_a_size_as_good_as_its_neighbours_is_kept() -> None:
    sizes = work(SliceTuner(4096), lambda characters: characters * 1e-6, slices=2000)
    assert sizes[-1] == 4096
    assert sizes.count(4096) > 1900, "trials get rare where they lead nowhere"


def test_a_query_never_waits_long_for_a_slice_of_many() -> None:
    def seconds(characters: int) -> float:
        return 0.05 + characters * 1e-5

    sizes = work(SliceTuner(4096), seconds)
    assert max(seconds(size) for size in sizes) <= MAX_SLICE_SECONDS
    assert sizes[-1] == 8192


def test_a_machine_that_turned_slow_gets_smaller_slices_at_once() -> None:
    tuner = SliceTuner(8192)
    work(tuner, lambda characters: characters * 1e-5)
    sizes = work(tuner, lambda characters: characters * 1.1e-4, slices=20)
    assert sizes[-1] * 1.1e-4 <= MAX_SLICE_SECONDS


def test_a_long_text_alone_is_no_reason_to_shrink() -> None:
    tuner = SliceTuner(4096)
    for _ in range(10):
        tuner.note([8000], 3.0)
    assert tuner.limits.characters == 4096


def test_what_did_not_fit_into_memory_is_never_tried_again() -> None:
    tuner = SliceTuner(4096)
    tuner.shrink([TEXT] * 40)
    assert tuner.limits.characters == 2000
    assert max(work(tuner, lambda characters: 0.01 + characters * 1e-6)) <= 2000
    tuner.shrink([1, 1])
    assert tuner.limits.characters == LEAST_CHARACTERS


@pytest.mark.parametrize("characters", [LEAST_CHARACTERS, 4096])
def test_slices_that_are_not_full_teach_nothing(characters: int) -> None:
    tuner = SliceTuner(characters)
    for _ in range(500):
        tuner.note([10], 0.001)
    assert tuner.limits.characters == characters
