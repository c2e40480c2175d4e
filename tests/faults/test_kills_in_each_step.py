"""A worker killed inside each of its steps: every row ends with its vector, and only what was in flight is paid for twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
import pytest

from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from killing import IN_FLIGHT, REQUEST, ROWS, Hold, assert_paid, held_worker, is_embedding, kill_backend, reconnect
from stub_provider import StubProvider
from support import scalar, settle
from working import (
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    insert_rows,
    remove_all,
    work_until_idle,
)


def _first_is_written(connection: psycopg.Connection, stub: StubProvider) -> bool:
    return stub.in_flight() > 0 and scalar(connection, f"SELECT count(*) FROM {PAGE('chunk')}") > 0


# SHARE lets everybody read and stops whoever writes. A worker waits for it a short while and then comes back again.
LIVE = {
    "claim": Hold(f"LOCK TABLE {PAGE('claim')} IN SHARE MODE", 0),
    "read": Hold(f"LOCK TABLE {PAGE('document')} IN ACCESS EXCLUSIVE MODE", 0),
    "submit": Hold(f"LOCK TABLE {PAGE.version(1)} IN ACCESS EXCLUSIVE MODE", 0),
    # In flight, and answered in the moment before.
    "embed": Hold(None, 2 * IN_FLIGHT * REQUEST, _first_is_written),
    # What is answered while the write waits is lost with it.
    "write": Hold(f"LOCK TABLE {PAGE('chunk')} IN SHARE MODE", ROWS, is_embedding),
    "finish": Hold(f"LOCK TABLE {PAGE('claim')} IN SHARE MODE", 2 * IN_FLIGHT * REQUEST, is_embedding),
}
BACKFILL = LIVE | {
    "claim": Hold("LOCK TABLE embedline.backfill_range IN SHARE MODE", 0),
    "finish": Hold("LOCK TABLE embedline.backfill_range IN SHARE MODE", 2 * IN_FLIGHT * REQUEST, is_embedding),
}


@pytest.fixture
def connection(own_cluster: Cluster, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A connection to a server of its own, which outlives kills of other sessions only if the server does."""
    # Closed, not left as a context: at the end the server may have been killed under it.
    with contextlib.closing(reconnect(own_cluster)) as opened:
        remove_all(opened)
        create_stub_model(opened, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
        yield opened


def _assert_nothing_lost(connection: psycopg.Connection, stub: StubProvider, hold: Hold) -> None:
    stub.behave(remember=True)
    work_until_idle(connection)
    settle(connection)
    assert assert_all_settled(connection, stub.dimensions) == ROWS
    assert dead_letters(connection) == {}
    assert_paid(stub, hold)


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
        worker = held_worker(own_cluster, connection, stub, hold, stack)
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
        worker = held_worker(own_cluster, connection, stub, hold, stack)
        kill_backend(worker.pid, connection)
        worker.join(20)
    with contextlib.closing(reconnect(own_cluster)) as after:
        _assert_nothing_lost(after, stub, hold)
