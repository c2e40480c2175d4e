"""A worker killed inside each step of filling a version: it ends complete, and only what was in flight is paid twice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import psycopg
import pytest

from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from killing import IN_FLIGHT, REQUEST, ROWS, Hold, assert_paid, held_worker, is_embedding, kill_backend, reconnect
from stub_provider import StubProvider, vector_of
from support import assert_exact, data_count, scalar, settle
from upgrading import add_version, settle_versions, versions
from working import create_stub_model, create_stub_pipeline, remove_all, work_until_idle


def _first_is_written(connection: psycopg.Connection, stub: StubProvider) -> bool:
    return stub.in_flight() > 0 and data_count(connection, "v2") > 0


# SHARE lets everybody read and stops whoever writes. A worker waits for it a short while and then comes back again.
STEPS = {
    "claim": Hold("LOCK TABLE embedline.version_queue IN SHARE MODE", 0),
    "read": Hold(f"LOCK TABLE {PAGE.version(2)} IN ACCESS EXCLUSIVE MODE", 0),
    "submit": Hold("LOCK TABLE embedline.reservation IN ACCESS EXCLUSIVE MODE", 0),
    # In flight, and answered in the moment before.
    "embed": Hold(None, 2 * IN_FLIGHT * REQUEST, _first_is_written),
    # What is answered while the write waits is lost with it.
    "write": Hold(f"LOCK TABLE {PAGE.version(2)} IN SHARE MODE", ROWS, is_embedding),
    "finish": Hold("LOCK TABLE embedline.version_queue IN SHARE MODE", 2 * IN_FLIGHT * REQUEST, is_embedding),
}


@pytest.fixture
def page(own_cluster: Cluster, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """Version 2 of a pipeline on a server of its own: all of its chunks are queued."""
    # Closed, not left as a context: at the end the server may have been killed under it.
    with contextlib.closing(reconnect(own_cluster)) as opened:
        remove_all(opened)
        create_stub_model(opened, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
        create_stub_pipeline(opened, rows=ROWS, model="static-256")
        settle(opened)
        add_version(opened, "stub")
        settle_versions(opened)
        opened.execute(f"TRUNCATE {PAGE.version(2)}")
        opened.execute("SELECT * FROM embedline.verify('page', repair => true, sample => 0)")
        assert versions(opened, "queued")[2] == ROWS
        stub.forget()
        yield opened


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
    assert_paid(stub, hold)


@pytest.mark.parametrize("step", STEPS)
def test_a_worker_terminated_in_a_step_of_a_version_fill(
    own_cluster: Cluster, page: psycopg.Connection, stub: StubProvider, step: str
) -> None:
    with contextlib.ExitStack() as stack:
        worker = held_worker(own_cluster, page, stub, STEPS[step], stack)
        page.execute("SELECT pg_terminate_backend(%s)", (worker.pid,))
        worker.join(20)
        assert worker.error is not None
    _assert_nothing_lost(page, stub, STEPS[step])


@pytest.mark.parametrize("step", STEPS)
def test_kill_9_of_a_workers_backend_in_a_step_of_a_version_fill(
    own_cluster: Cluster, page: psycopg.Connection, stub: StubProvider, step: str
) -> None:
    with contextlib.ExitStack() as stack:
        worker = held_worker(own_cluster, page, stub, STEPS[step], stack)
        kill_backend(worker.pid, page)
        worker.join(20)
    with contextlib.closing(reconnect(own_cluster)) as after:
        _assert_nothing_lost(after, stub, STEPS[step])
