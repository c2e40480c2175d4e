"""The fleet of Ray's actors: every vector once and none stale, though one actor is killed and another one's network is lost."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import psycopg
import pytest

from embedline.remote.ray_backfill import Fleet, backfill
from stub_provider import StubProvider
from support import scalar, wait_until
from working import assert_all_settled, insert_rows

pytest.importorskip("ray")
pytestmark = pytest.mark.faults

ROWS, REQUEST, IN_FLIGHT = 600, 10, 4


def _client_process(port: int) -> int:
    """Return the process that has a TCP connection from a port of this machine."""
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if int(line.split()[1].rpartition(":")[2], 16) == port
    )
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if f"socket:[{inode}]" in links:
            return int(process.name)
    raise AssertionError(f"no process has the connection from port {port}")


def test_a_killed_actor_is_started_again_and_edits_win(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    insert_rows(page, 26, ROWS)
    stub.behave(latency=0.2, remember=True)
    fleet = Fleet(remote_dsn, "page", workers=2, cpus=0.1, requests=IN_FLIGHT)
    said: list[str] = []
    left: list[int] = []
    thread = threading.Thread(target=lambda: left.append(backfill(fleet, say=said.append)), daemon=True)
    thread.start()
    actors = "SELECT a.client_port FROM embedline.worker AS w JOIN pg_stat_activity AS a USING (pid) WHERE w.login IS NOT NULL"
    wait_until(lambda: len(page.execute(actors).fetchall()) == 2 and stub.in_flight() > 0, 90, "two actors embed")
    page.execute("UPDATE page SET body = 'an edit of ' || id WHERE id % 5 = 0")
    (port,) = page.execute(actors).fetchall()[0]
    os.kill(_client_process(port), signal.SIGKILL)
    thread.join(120)
    assert not thread.is_alive()
    assert left == [0]
    assert assert_all_settled(page, stub.dimensions) == ROWS
    assert scalar(page, "SELECT count(*) FROM embedline.dead_letter") == 0
    paid = stub.texts_seen()
    edited = ROWS // 5
    in_vain = sum(paid.values()) - ROWS
    assert in_vain <= 2 * IN_FLIGHT * REQUEST + edited, "more was paid for than what was in flight and what was edited"
    assert len(said) == 2
