"""What a worker claims next: turns, changes and backfill, suspects, circuits and budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from embedline.postgres.claims import CALLERS_TRANSACTION, WorkerClaims
from embedline.worker import procedure
from embedline.worker.batch import Batch
from embedline.worker.claim import Claimant
from fake_work import FakePermits, Work

WORKER = WorkerClaims(1)


def keys(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def claim(
    claimant: Claimant, works: Sequence[Work], *, is_idle: bool = True, embed_backfill: bool = True
) -> Batch | None:
    return claimant.claim(works, lambda _: 10, is_idle=is_idle, embed_backfill=embed_backfill)


def test_sources_have_rows_in_proportion_to_their_weights() -> None:
    works = [Work(1, changes=keys("a", 900), weight=2.0), Work(2, changes=keys("b", 900))]
    claimant, claimed = Claimant(WORKER, FakePermits(), 0.8), Counter[int]()
    for _ in range(60):
        batch = claim(claimant, works)
        assert batch is not None
        claimed[batch.source.key.number] += len(batch.rows)
    assert claimed == {1: 400, 2: 200}


def test_changes_come_before_the_backfill_and_leave_it_a_share() -> None:
    work = Work(1, changes=keys("a", 1000), unread=keys("b", 1000))
    claimant = Claimant(WORKER, FakePermits(), 0.8)
    kinds = []
    for _ in range(50):
        batch = claim(claimant, [work])
        assert batch is not None
        kinds.append(batch.claim.of_backfill)
    assert not kinds[0]
    assert sum(kinds) in (9, 10)


def test_a_backfill_that_is_not_asked_for_is_left_alone() -> None:
    work = Work(1, unread=["a"])
    assert claim(Claimant(WORKER, FakePermits(), 0.8), [work], embed_backfill=False) is None
    assert work.unread == ["a"]


def test_suspects_are_claimed_alone_and_other_rows_have_a_turn_in_between() -> None:
    work = Work(1, changes=keys("a", 100), suspects=keys("s", 20))
    claimant, suspected = Claimant(WORKER, FakePermits(), 0.8), list[bool]()
    for _ in range(4):
        batch = claim(claimant, [work])
        assert batch is not None
        suspected.append(batch.claim.is_suspect)
    assert suspected == [True, False, True, False]


def test_suspects_wait_for_a_worker_without_other_batches() -> None:
    work = Work(1, changes=["a"], suspects=["s"])
    claimant = Claimant(WORKER, FakePermits(), 0.8)
    assert claim(claimant, [work], is_idle=False) is None
    assert work.suspects == ["s"]
    assert claimant.is_isolating


def test_while_another_session_tries_suspects_their_neighbours_go_on() -> None:
    work = Work(1, changes=["a"], suspects=["s"])
    claimant = Claimant(WORKER, FakePermits(others_isolate=True), 0.8)
    batch = claim(claimant, [work])
    assert batch is not None
    assert [row.key for row in batch.rows] == [("a",)]
    assert not claimant.is_isolating


def test_a_callers_transaction_tries_suspects_without_the_right_to_them() -> None:
    work = Work(1, suspects=["s"])
    claimant = Claimant(CALLERS_TRANSACTION, FakePermits(others_isolate=True), 0.8)
    batch = claim(claimant, [work])
    assert batch is not None
    assert batch.claim.is_suspect
    assert not claimant.is_isolating


def test_rows_of_dead_workers_are_reclaimed_before_they_are_claimed() -> None:
    work = Work(1, orphans=["s"])
    batch = claim(Claimant(WORKER, FakePermits(), 0.8), [work])
    assert batch is not None
    assert batch.claim.is_suspect
    assert work.calls == ["peek", "reclaim", "peek", "suspects"]


@pytest.mark.parametrize("permits", [FakePermits(open_circuits={1}), FakePermits(without_money={1})])
def test_a_blocked_source_is_not_read_and_the_others_go_on(permits: FakePermits) -> None:
    blocked, other = Work(1, changes=["a"]), Work(2, changes=["b"])
    claimant = Claimant(WORKER, permits, 0.8)
    batch = claim(claimant, [blocked, other])
    assert batch is not None
    assert batch.source is other
    assert blocked.calls == []
    assert claimant.out_of_money == {blocked.key for _ in permits.without_money}


def test_a_hidden_source_says_so_once_and_loses_no_row() -> None:
    work = Work(1, changes=["a"], is_hidden=True)
    claimant = Claimant(WORKER, FakePermits(), 0.8)
    assert claim(claimant, [work]) is None
    assert claim(claimant, [work]) is None
    assert work.errors == ["rows are hidden"]
    assert work.changes == ["a"]


def test_only_empty_sources_with_signals_are_quiet() -> None:
    empty, unsignalled, locked = Work(1), Work(2, has_signals=False), Work(3, is_locked=True)
    claimant = Claimant(WORKER, FakePermits(), 0.8)
    assert claim(claimant, [empty, unsignalled, locked]) is None
    assert claimant.quiet == [empty]
    assert claimant.asked == [work.key for work in (empty, unsignalled, locked)]
    assert claimant.asking is None


def test_a_step_that_is_gone_ends_the_worker_whichever_source_came_last() -> None:
    """Embedline may be removed while workers run: then no source is at fault, and nothing is left to go on with."""
    claimant = Claimant(WORKER, FakePermits(), 0.8)
    claimant.asking = Work(1)

    class Gone(Exception):
        sqlstate = "42883"

    def execute(*_: object) -> object:
        raise Gone

    plpy = SimpleNamespace(execute=execute, prepare=lambda *_: None, rollback=lambda: None, commit=lambda: None)
    with pytest.raises(Gone):
        procedure._claim(plpy, {}, SimpleNamespace(claimant=claimant))
