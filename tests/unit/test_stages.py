"""The stages of a batch, without a server: halving, circuits, grants, and what a worker leaves alone."""

from __future__ import annotations

import pytest

from embedline.errors import TransientProviderError
from embedline.postgres.sqlstates import DISK_FULL, LOCK_NOT_AVAILABLE
from embedline.queue.claim import Claim
from embedline.worker.batch import Batch, pack
from embedline.worker.capacity import Capacity
from embedline.worker.stages.embed import Embed
from embedline.worker.stages.failures import Failures
from embedline.worker.stages.write import Write
from embedline.worker.troubles import Troubles
from fake_work import Clock, FakeModels, FakePermits, Work, document, pipeline

KEYS = [f"text {number}" for number in range(8)]


def batch_of(work: Work) -> Batch:
    documents = [document(key) for key in KEYS]
    batch = Batch(work, Claim([found.row for found in documents]))
    batch.units = pack(work.pipeline, documents, {})
    return batch


def embed(batch: Batch, models: FakeModels, permits: FakePermits, clock: Clock, patience: float = 2.0) -> None:
    """Take a batch through embedding and writing, as the engine does."""
    stage = Embed(models, permits, patience, clock)
    write = Write(stage, Failures(models, clock))
    stage.grant(batch)
    while batch.units:
        clock.now += 1.0
        stage.start(batch)
        if not write.write_ready(batch):
            break


def test_a_refused_text_is_found_by_halves_and_its_neighbours_are_written() -> None:
    work, models = Work(1), FakeModels(poison={"text 5"})
    embed(batch_of(work), models, FakePermits(), Clock())
    assert sorted(work.written) == sorted(set(KEYS) - {"text 5"})
    assert work.quarantined == ["text 5"]
    assert work.requeued == {}
    # The batch, its halves, theirs, and theirs: the text that is refused alone was refused before, so it is given up.
    assert [len(request) for request in models.requests][:3] == [8, 4, 4]
    assert models.requests.count(["text 5"]) == 1
    assert models.paused == []


def test_two_refused_texts_of_one_request_are_both_found() -> None:
    work = Work(1)
    embed(batch_of(work), FakeModels(poison={"text 0", "text 7"}), FakePermits(), Clock())
    assert sorted(work.quarantined) == ["text 0", "text 7"]
    assert len(work.written) == 6


def test_a_provider_that_limits_its_rate_charges_no_row() -> None:
    error = TransientProviderError("slow down")
    error.throttled, error.retry_after = True, 7.0
    work, models = Work(1), FakeModels(failure=error)
    embed(batch_of(work), models, FakePermits(), Clock())
    assert models.paused == [7.0]
    assert models.asked == 0, "a rate limit is the provider's for certain"
    assert work.requeued == dict.fromkeys(KEYS, False)
    assert work.written == []
    assert work.quarantined == []


def test_a_provider_that_fails_a_harmless_text_too_charges_no_row() -> None:
    work, models = Work(1), FakeModels(failure=TransientProviderError("out of order"))
    embed(batch_of(work), models, FakePermits(), Clock())
    assert len(models.paused) == 1
    assert work.requeued == dict.fromkeys(KEYS, False)


@pytest.mark.parametrize(("wait", "are_requeued"), [(1.0, False), (3.0, True)])
def test_a_batch_waits_for_a_grant_as_long_as_its_patience(wait: float, are_requeued: bool) -> None:
    work, clock = Work(1), Clock(100.0)
    batch = batch_of(work)
    embed(batch, FakeModels(), FakePermits(granted=0, wait_seconds=wait), clock, patience=2.0)
    assert work.requeued == (dict.fromkeys(KEYS, False) if are_requeued else {})
    assert batch.grant_at == 100.0 + wait
    assert bool(batch.units) is not are_requeued


def test_a_model_takes_one_batch_more_than_it_works_on_at_a_time() -> None:
    capacity, work = Capacity({1: 1, 2: 1}), Work(1)
    batches: list[Batch] = []
    for expected in ({1, 2}, {1, 2}, {2}):
        assert capacity.models_with_room(batches, None) == expected
        batches.append(batch_of(work))
    assert [source.key.number for source in capacity.with_room([work, Work(2), Work(3)], batches, None)] == [2, 3]


def test_a_batch_of_many_requests_keeps_its_model_busy_alone() -> None:
    capacity, work = Capacity({1: 2}), Work(1)
    work.pipeline = pipeline(1, items=2)
    batch = batch_of(work)
    assert batch.first_requests == 4
    assert capacity.models_with_room([batch], None) == set()
    batch.units.pop()
    assert capacity.models_with_room([batch], None) == {1}


def test_a_failing_source_is_left_alone_for_longer_each_time() -> None:
    clock, work = Clock(), Work(1)
    troubles, pauses = Troubles(clock), list[float]()
    for _ in range(8):
        at, _ = troubles.put_off_write(work.key, LOCK_NOT_AVAILABLE, is_ending=False)
        pauses.append(round(at - clock.now, 3))
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    troubles.forget(work.key)
    troubles.put_off(work.key)
    assert troubles.is_asleep(work.key)
    clock.now += 0.3
    assert not troubles.is_asleep(work.key)


@pytest.mark.parametrize(("sqlstate", "is_ending"), [("53200", False), (DISK_FULL, True), (LOCK_NOT_AVAILABLE, True)])
def test_writes_that_fail_for_a_minute_end_a_batch(sqlstate: str, is_ending: bool) -> None:
    clock, work = Clock(), Work(1)
    troubles = Troubles(clock)
    waited, has_patience = 0.0, True
    while has_patience:
        at, has_patience = troubles.put_off_write(work.key, sqlstate, is_ending=is_ending)
        waited += at - clock.now
        clock.now = at
    assert 60.0 <= waited < 70.0


@pytest.mark.parametrize("sqlstate", [DISK_FULL, LOCK_NOT_AVAILABLE])
def test_what_lasts_as_long_as_someone_else_makes_it_last_ends_no_batch(sqlstate: str) -> None:
    troubles, work = Troubles(Clock()), Work(1)
    assert all(troubles.put_off_write(work.key, sqlstate, is_ending=False)[1] for _ in range(1000))


def test_only_faults_that_do_not_pass_are_lasting() -> None:
    troubles, work = Troubles(Clock()), Work(1)
    for _ in range(5):
        troubles.count(work.key, LOCK_NOT_AVAILABLE)
    assert troubles.lasting == set()
    for _ in range(3):
        troubles.count(work.key, "22012")
    assert troubles.lasting == {work.key}
    troubles.forget_answered([work], {work.key})
    assert troubles.lasting == set()
