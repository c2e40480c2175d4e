"""What tests of kills share: a worker held in a step, kill -9 of a backend, and the server that comes back after it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg

from embedline.dev.cluster.server import Cluster
from embedline.models.health_check import PROBE_TEXT
from fault_table import note
from stub_provider import StubProvider
from support import settle, wait_until
from working import Worker, assert_all_settled, dead_letters, work_until_idle

ROWS, REQUEST, IN_FLIGHT = 400, 50, 2


@dataclass(frozen=True)
class Hold:
    """How a worker is held in a step: by a lock on a table, once `begun`; None: by the provider, which takes its time."""

    lock: str | None
    paid_twice: int
    begun: Callable[[psycopg.Connection, StubProvider], bool] = lambda _connection, _stub: True


def is_embedding(_connection: psycopg.Connection, stub: StubProvider) -> bool:
    """Whether a request is in flight."""
    return stub.in_flight() > 0


def held_worker(
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


def assert_paid(stub: StubProvider, hold: Hold) -> None:
    """Assert that each row was paid for, none more than twice, and no more twice than were in flight."""
    seen = stub.texts_seen()
    assert len(seen) == ROWS
    assert max(seen.values()) <= 2
    over = sum(count - 1 for count in seen.values())
    assert over <= hold.paid_twice
    note(ROWS, over, hold.paid_twice)


def assert_nothing_lost(connection: psycopg.Connection, stub: StubProvider, rows: int, may_be_over: int) -> None:
    """Have everything embedded; assert that each row of table page is, and that few texts were paid for in vain."""
    stub.behave(remember=True)
    work_until_idle(connection)
    settle(connection)
    assert assert_all_settled(connection, stub.dimensions) == rows
    assert dead_letters(connection) == {}
    over = sum(count - 1 for text, count in stub.texts_seen().items() if text != PROBE_TEXT)
    assert over <= may_be_over
    note(rows, over, may_be_over)


def kill_backend(pid: int, bystander: psycopg.Connection) -> None:
    """Kill -9 a backend and wait until the postmaster has ended all sessions, the bystander's among them.

    A session of before the postmaster noticed the death would be ended with all others.
    """
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: _is_ended(bystander), 30, "the postmaster has ended all sessions")


def _is_ended(connection: psycopg.Connection) -> bool:
    with contextlib.suppress(psycopg.OperationalError):
        connection.execute("SELECT 1")
    return connection.broken


def reconnect(cluster: Cluster) -> psycopg.Connection:
    """Return a connection once the server accepts it."""
    opened: list[psycopg.Connection] = []

    def connected() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            opened.append(psycopg.connect(cluster.dsn(), autocommit=True))
        return bool(opened)

    wait_until(connected, 30, "the server accepts connections")
    return opened[0]


def model_host_pids(cluster: Cluster, postmaster: int | None = None) -> list[int]:
    """Return the model hosts of a server, or of its earlier postmaster.

    Their command line names the socket's folder, which names the postmaster.
    """
    owner = postmaster or cluster.postmaster_pid()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = entry.read_bytes().decode(errors="replace")
            if "embedline.model_host" in command and f"/{owner}-" in command:
                found.append(int(entry.parent.name))
    return found
