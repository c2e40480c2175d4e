"""A worker killed inside each step of a version's lane: the version ends complete, and only what was in flight is paid twice."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psycopg
import pytest

from embedline.local.cluster import Cluster
from stub_provider import StubProvider, vector_of
from support import assert_exact, data_count, scalar, settle, wait_until
from upgrading import add_version, settle_versions, versions
from working import Worker, create_stub_model, create_stub_pipeline, remove_all, work_until_idle

ROWS, REQUEST, IN_FLIGHT = 400, 50, 2


@dataclass(frozen=True)
class Hold:
    """How a worker is held in a step: by a lock on a table, once `begun`; None: by the provider, which takes its time."""

    lock: str | None
    paid_twice: int
    begun: Callable[[psycopg.Connection, StubProvider], bool] = lambda _connection, _stub: True


def _is_embedding(connection: psycopg.Connection, stub: StubProvider) -> bool:
    return stub.in_flight() > 0


def _first_is_written(connection: psycopg.Connection, stub: StubProvider) -> bool:
    return stub.in_flight() > 0 and data_count(connection, "page_v2") > 0


# SHARE lets everybody read and stops whoever writes. A worker waits for it a short while and then comes back again.
STEPS = {
    "claim": Hold("LOCK TABLE embedline.version_queue IN SHARE MODE", 0),
    "read": Hold("LOCK TABLE embedline_data.page_v2 IN ACCESS EXCLUSIVE MODE", 0),
    "submit": Hold("LOCK TABLE embedline.reservation IN ACCESS EXCLUSIVE MODE", 0),
    # In flight, and answered in the moment before.
    "embed": Hold(None, 2 * IN_FLIGHT * REQUEST, _first_is_written),
    # What is answered while the write waits is lost with it.
    "write": Hold("LOCK TABLE embedline_data.page_v2 IN SHARE MODE", ROWS, _is_embedding),
    "finish": Hold("LOCK TABLE embedline.version_queue IN SHARE MODE", 2 * IN_FLIGHT * REQUEST, _is_embedding),
}


@pytest.fixture
def page(own_cluster: Cluster, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """Version 2 of a pipeline on a server of its own: all of its chunks are queued."""
    # Closed, not left as a context: at the end the server may have been killed under it.
    with contextlib.closing(_connect(own_cluster)) as opened:
        remove_all(opened)
        create_stub_model(opened, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
        create_stub_pipeline(opened, rows=ROWS, model="static-256")
        settle(opened)
        add_version(opened, "stub")
        settle_versions(opened)
        opened.execute("TRUNCATE embedline_data.page_v2")
        opened.execute("SELECT * FROM embedline.verify('page', repair => true, sample => 0)")
        assert versions(opened, "queued")[2] == ROWS
        stub.forget()
        yield opened


def _held_worker(
    cluster: Cluster, page: psycopg.Connection, stub: StubProvider, hold: Hold, stack: contextlib.ExitStack
) -> Worker:
    """Start a worker and return it once it is held in the step."""
    stub.behave(latency=0.1, remember=True)
    locker = stack.enter_context(contextlib.closing(psycopg.connect(cluster.dsn())))
    if hold.lock is not None and hold.begun is Hold.begun:
        locker.execute(hold.lock)
    worker = stack.enter_context(Worker(cluster.dsn()))
    wait_until(lambda: hold.begun(page, stub), 20, "the worker has come as far")
    if hold.lock is None:
        return worker
    locker.execute(hold.lock)
    wait_until(lambda: worker.waits_for_lock(page), 20, "the worker waits for the lock")
    return worker


def _vectors(texts: Sequence[str], dimensions: int) -> npt.NDArray[np.float32]:
    return np.stack([vector_of(text, dimensions) for text in texts])


def _assert_nothing_lost(connection: psycopg.Connection, stub: StubProvider, hold: Hold) -> None:
    stub.behave(remember=True)
    work_until_idle(connection)
    settle_versions(connection)
    embed = functools.partial(_vectors, dimensions=stub.dimensions)
    assert assert_exact(connection, embed=embed, version=2) == ROWS
    assert assert_exact(connection) == ROWS
    assert versions(connection, "missing") == {1: 0, 2: 0}
    assert scalar(connection, "SELECT count(*) FROM embedline.version_dead_letter") == 0
    assert scalar(connection, "SELECT count(*) FROM embedline.version_queue") == 0
    seen = stub.texts_seen()
    assert len(seen) == ROWS
    assert max(seen.values()) <= 2
    assert sum(count - 1 for count in seen.values()) <= hold.paid_twice


@pytest.mark.parametrize("step", STEPS)
def test_a_worker_terminated_in_a_step_of_a_versions_lane(
    own_cluster: Cluster, page: psycopg.Connection, stub: StubProvider, step: str
) -> None:
    with contextlib.ExitStack() as stack:
        worker = _held_worker(own_cluster, page, stub, STEPS[step], stack)
        page.execute("SELECT pg_terminate_backend(%s)", (worker.pid,))
        worker.join(20)
        assert worker.error is not None
    _assert_nothing_lost(page, stub, STEPS[step])


@pytest.mark.parametrize("step", STEPS)
def test_kill_9_of_a_workers_backend_in_a_step_of_a_versions_lane(
    own_cluster: Cluster, page: psycopg.Connection, stub: StubProvider, step: str
) -> None:
    with contextlib.ExitStack() as stack:
        worker = _held_worker(own_cluster, page, stub, STEPS[step], stack)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(20)
    with contextlib.closing(_connect(own_cluster)) as after:
        _assert_nothing_lost(after, stub, STEPS[step])


def _connect(cluster: Cluster) -> psycopg.Connection:
    """Return a connection once the server, which ends all sessions after kill -9 of one, accepts it."""
    opened: list[psycopg.Connection] = []

    def connected() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            opened.append(psycopg.connect(cluster.dsn(), autocommit=True))
        return bool(opened)

    wait_until(connected, 30, "the server accepts connections")
    return opened[0]
