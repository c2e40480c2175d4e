"""A worker killed inside each of its steps: every row ends with its vector, and only what was in flight is paid for twice."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
import pytest

from embedline.local.cluster import Cluster
from stub_provider import StubProvider
from support import scalar, settle, wait_until
from working import (
    Worker,
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    insert_rows,
    remove_all,
    work_until_idle,
)

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
    return stub.in_flight() > 0 and scalar(connection, "SELECT count(*) FROM embedline_data.page_chunk") > 0


# SHARE lets everybody read and stops whoever writes. A worker waits for it a short while and then comes back again.
LIVE = {
    "claim": Hold("LOCK TABLE embedline_data.page_claim IN SHARE MODE", 0),
    "read": Hold("LOCK TABLE embedline_data.page_document IN ACCESS EXCLUSIVE MODE", 0),
    "submit": Hold("LOCK TABLE embedline_data.page_v1 IN ACCESS EXCLUSIVE MODE", 0),
    # In flight, and answered in the moment before.
    "embed": Hold(None, 2 * IN_FLIGHT * REQUEST, _first_is_written),
    # What is answered while the write waits is lost with it.
    "write": Hold("LOCK TABLE embedline_data.page_chunk IN SHARE MODE", ROWS, _is_embedding),
    "finish": Hold("LOCK TABLE embedline_data.page_claim IN SHARE MODE", IN_FLIGHT * REQUEST, _is_embedding),
}
BACKFILL = LIVE | {
    "claim": Hold("LOCK TABLE embedline.backfill_range IN SHARE MODE", 0),
    "finish": Hold("LOCK TABLE embedline.backfill_range IN SHARE MODE", IN_FLIGHT * REQUEST, _is_embedding),
}


@pytest.fixture
def connection(own_cluster: Cluster, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A connection to a server of its own, which outlives kills of other sessions only if the server does."""
    # Closed, not left as a context: at the end the server may have been killed under it.
    with contextlib.closing(_connect(own_cluster)) as opened:
        remove_all(opened)
        create_stub_model(opened, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
        yield opened


def _held_worker(
    cluster: Cluster, connection: psycopg.Connection, stub: StubProvider, hold: Hold, stack: contextlib.ExitStack
) -> Worker:
    """Start a worker and return it once it is held in the step."""
    stub.behave(latency=0.1, remember=True)
    locker = stack.enter_context(contextlib.closing(psycopg.connect(cluster.dsn())))
    if hold.lock is not None and hold.begun is Hold.begun:
        locker.execute(hold.lock)
    worker = stack.enter_context(Worker(cluster.dsn()))
    wait_until(lambda: hold.begun(connection, stub), 20, "the worker has come as far")
    if hold.lock is None:
        return worker
    locker.execute(hold.lock)
    wait_until(lambda: worker.waits_for_lock(connection), 20, "the worker waits for the lock")
    return worker


def _assert_nothing_lost(connection: psycopg.Connection, stub: StubProvider, hold: Hold) -> None:
    stub.behave(remember=True)
    work_until_idle(connection)
    settle(connection)
    assert assert_all_settled(connection, stub.dimensions) == ROWS
    assert dead_letters(connection) == {}
    seen = stub.texts_seen()
    assert len(seen) == ROWS
    assert max(seen.values()) <= 2
    assert sum(count - 1 for count in seen.values()) <= hold.paid_twice


@pytest.mark.parametrize("step", LIVE)
@pytest.mark.parametrize("kind", ["live", "backfill"])
def test_a_worker_terminated_in_a_step(
    own_cluster: Cluster, connection: psycopg.Connection, stub: StubProvider, kind: str, step: str
) -> None:
    hold = (LIVE if kind == "live" else BACKFILL)[step]
    create_stub_pipeline(connection, rows=0 if kind == "live" else ROWS)
    if kind == "live":
        settle(connection)
        insert_rows(connection, 1, ROWS)
    with contextlib.ExitStack() as stack:
        worker = _held_worker(own_cluster, connection, stub, hold, stack)
        connection.execute("SELECT pg_terminate_backend(%s)", (worker.pid,))
        worker.join(20)
        assert worker.error is not None
    _assert_nothing_lost(connection, stub, hold)


@pytest.mark.parametrize("step", LIVE)
def test_kill_9_of_a_workers_backend_in_a_step(
    own_cluster: Cluster, connection: psycopg.Connection, stub: StubProvider, step: str
) -> None:
    hold = LIVE[step]
    create_stub_pipeline(connection)
    settle(connection)
    insert_rows(connection, 1, ROWS)
    with contextlib.ExitStack() as stack:
        worker = _held_worker(own_cluster, connection, stub, hold, stack)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(20)
    with contextlib.closing(_connect(own_cluster)) as after:
        _assert_nothing_lost(after, stub, hold)


def _connect(cluster: Cluster) -> psycopg.Connection:
    """Return a connection once the server, which ends all sessions after kill -9 of one, accepts it."""
    opened: list[psycopg.Connection] = []

    def connected() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            opened.append(psycopg.connect(cluster.dsn(), autocommit=True))
        return bool(opened)

    wait_until(connected, 30, "the server accepts connections")
    return opened[0]
