"""The key of a lock that says how far a statement is."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.catalog.progress import Step, Task, pack, unpack


@given(st.sampled_from(get_args(Task)), st.sampled_from(get_args(Step)), st.floats(0, 1))
def test_a_key_gives_back_task_step_and_share(task: Task, step: Step, share: float) -> None:
    unpacked = unpack(pack(task, step, share))
    assert unpacked is not None
    assert unpacked[:2] == (task, step)
    assert unpacked[2] == pytest.approx(100 * share, abs=0.051)


def test_an_unknown_share_stays_unknown() -> None:
    assert unpack(pack("evaluate", "reading all vectors", None)) == ("evaluate", "reading all vectors", None)


def test_a_share_outside_its_bounds_is_cut() -> None:
    assert unpack(pack("evaluate", "ranking the queries", 1.5)) == ("evaluate", "ranking the queries", 100.0)


def test_a_lock_of_somebody_else_is_none_of_ours() -> None:
    assert unpack(2**31 - 1) is None
