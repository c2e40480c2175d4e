"""kill -9 of the model host, of a worker's backend and of the server, during a drain: every row ends with its current vectors."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import psycopg
import pytest

from embedline.dev.cluster.server import Cluster
from fault_table import note
from generated_names import PAGE
from killing import kill_backend, model_host_pids, reconnect
from support import assert_exact, create_pages, create_pipeline, data_count, scalar, settle, take_inbox, wait_until

ROWS = 4000


@pytest.fixture
def page(own_cluster: Cluster) -> psycopg.Connection:
    """A pipeline on a table of its own on a server of its own."""
    with reconnect(own_cluster) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM embedline.pipeline")]
        for name in names:
            connection.execute("SELECT embedline.drop_pipeline(%s)", (name,))
        connection.execute("DROP TABLE IF EXISTS page")
        create_pages(connection, ROWS)
        create_pipeline(connection)
        connection.execute("UPDATE page SET body = body || ' edited' WHERE id % 4 = 0")
    return psycopg.connect(own_cluster.dsn(), autocommit=True)


def _work(dsn: str) -> threading.Thread:
    def call() -> None:
        with contextlib.suppress(psycopg.Error), psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SET application_name = 'victim'")
            connection.execute("CALL embedline.run_worker(max_seconds => 60, until_idle => true)")

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def _half_done(page: psycopg.Connection) -> None:
    wait_until(lambda: data_count(page, "document") >= 500, 60, "the drain is under way")


def test_kill_9_of_the_model_host_during_a_drain(own_cluster: Cluster, page: psycopg.Connection) -> None:
    with page:
        thread = _work(own_cluster.dsn())
        _half_done(page)
        hosts = model_host_pids(own_cluster)
        assert len(hosts) == 1, "one model host serves all backends"
        os.kill(hosts[0], signal.SIGKILL)
        thread.join(90)
        assert not thread.is_alive()
        settle(page, 60)
        assert assert_exact(page) == ROWS
        note(ROWS)
        assert scalar(page, "SELECT count(*) FROM embedline.dead_letter") == 0


def test_kill_9_of_a_workers_backend_during_a_drain(own_cluster: Cluster, page: psycopg.Connection) -> None:
    thread = _work(own_cluster.dsn())
    _half_done(page)
    pid = scalar(page, "SELECT pid FROM pg_stat_activity WHERE application_name = 'victim'")
    host = model_host_pids(own_cluster)
    # The postmaster restarts every backend after a crash; the model host is none of them.
    kill_backend(int(pid), page)
    thread.join(30)
    after = reconnect(own_cluster)
    with after:
        settle(after, 60)
        assert assert_exact(after) == ROWS
        note(ROWS)
        assert scalar(after, "SELECT count(*) FROM embedline.dead_letter") == 0
        assert model_host_pids(own_cluster) == host, "the model host outlives a crash of a backend"


def test_kill_9_of_the_server_during_a_drain(own_cluster: Cluster, page: psycopg.Connection) -> None:
    thread = _work(own_cluster.dsn())
    _half_done(page)
    postmaster = own_cluster.postmaster_pid()
    own_cluster.kill()
    page.close()
    thread.join(30)
    own_cluster.start()
    after = reconnect(own_cluster)
    with after:
        settle(after, 60)
        assert assert_exact(after) == ROWS
        note(ROWS)
        assert scalar(after, "SELECT count(*) FROM embedline.dead_letter") == 0
    wait_until(lambda: not model_host_pids(own_cluster, postmaster), 10, "the model host of the killed server is gone")


def test_terminated_backend_is_taken_over_at_once(own_cluster: Cluster, page: psycopg.Connection) -> None:
    with page:
        thread = _work(own_cluster.dsn())
        _half_done(page)
        page.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'victim'")
        thread.join(30)
        settle(page, 60)
        assert assert_exact(page) == ROWS
        note(ROWS)


def test_a_row_that_crashes_its_workers_is_quarantined_alone(own_cluster: Cluster, page: psycopg.Connection) -> None:
    with page:
        settle(page, 60)
        page.execute("UPDATE page SET body = body || ' crash' WHERE id <= 100")
        take_inbox(page)
        # As three dead workers leave it: claimed by ids whose locks nobody holds.
        for crash in range(3):
            page.execute(
                f"UPDATE {PAGE('outbox')} SET claimed_by = nextval('embedline.worker_id_seq'), crash_count = %s"
                " WHERE key_id = 42",
                (crash,),
            )
        page.execute(f"UPDATE {PAGE('outbox')} SET claimed_by = nextval('embedline.worker_id_seq') WHERE key_id = 43")
        settle(page, 60)
        letters = page.execute("SELECT key, stage, error_code FROM embedline.dead_letter").fetchall()
        assert letters == [({"id": "42"}, "claim", "EL020")]
        assert data_count(page, "chunk") == ROWS - 1
