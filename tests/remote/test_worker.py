"""The remote worker itself: in flight, lost connections, ends, and pools."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from embedline.remote import Totals, Worker
from embedline.remote.session import SessionNotKept
from generated_names import Generated
from monitors import get
from pooler import pooled
from stub_provider import StubProvider
from support import assert_exact, free_port, scalar, wait_until
from working import assert_all_settled, create_stub_pipeline, dead_letters, insert_rows, make_reading_deadly


class _Running:
    """A worker in a thread."""

    def __init__(self, worker: Worker, *, until_empty: bool = False) -> None:
        self.worker = worker
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(until_empty,), daemon=True)
        self._thread.start()

    def _run(self, until_empty: bool) -> None:
        try:
            self.worker.run(until_empty=until_empty)
        except Exception as error:
            self.error = error

    def end(self, seconds: float = 30) -> Totals:
        self.worker.stop()
        return self.join(seconds)

    def join(self, seconds: float = 30) -> Totals:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the worker has not ended"
        assert self.error is None, self.error
        return self.worker.totals


def test_a_worker_embeds_all_and_ends(page: psycopg.Connection, remote_dsn: str, stub: StubProvider) -> None:
    totals = Worker(remote_dsn, "page").run(until_empty=True)
    assert (totals.rows, totals.texts, totals.failed_requests, totals.lost_requests) == (25, 25, 0, 0)
    assert assert_all_settled(page, stub.dimensions) == 25
    assert scalar(page, "SELECT count(*) FROM embedline.worker") == 0


def test_several_workers_pay_for_each_text_once(page: psycopg.Connection, remote_dsn: str, stub: StubProvider) -> None:
    insert_rows(page, 26, 600)
    stub.behave(latency=0.05, remember=True)
    running = [_Running(Worker(remote_dsn, "page"), until_empty=True) for _ in range(3)]
    embedded = [worker.join(60).rows for worker in running]
    assert sum(embedded) == 600
    assert min(embedded) > 0
    assert assert_all_settled(page, stub.dimensions) == 600
    assert set(stub.texts_seen().values()) == {1}


def test_edits_win(page: psycopg.Connection, remote_dsn: str, stub: StubProvider) -> None:
    insert_rows(page, 26, 300)
    stub.behave(latency=0.1)
    running = _Running(Worker(remote_dsn, "page"), until_empty=True)
    for number in range(30):
        page.execute("UPDATE page SET body = 'edit ' || %s || ' of ' || id WHERE id %% 30 = %s", (number, number))
    running.join(60)
    Worker(remote_dsn, "page").run(until_empty=True)
    assert assert_all_settled(page, stub.dimensions) == 300


def test_a_lost_connection_is_opened_again(page: psycopg.Connection, remote_dsn: str, stub: StubProvider) -> None:
    insert_rows(page, 26, 200)
    stub.behave(latency=0.3)
    running = _Running(Worker(remote_dsn, "page"))
    ended = "SELECT count(pg_terminate_backend(pid)) FROM embedline.worker WHERE login IS NOT NULL"
    wait_until(lambda: stub.in_flight() > 0, 20, "requests are in flight")
    assert scalar(page, ended) == 1
    wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 60, "nothing waits")
    totals = running.end()
    assert totals.connections == 2
    assert totals.lost_requests > 0
    assert assert_all_settled(page, stub.dimensions) == 200


@pytest.mark.parametrize("end", ["pg_terminate_backend(pg_backend_pid())", "pg_cancel_backend(pg_backend_pid())"])
def test_rows_that_end_the_session_that_reads_them_are_given_up_alone(
    page: psycopg.Connection, remote_dsn: str, login: str, stub: StubProvider, end: str
) -> None:
    make_reading_deadly(page, login, f"PERFORM {end}")
    page.execute(
        "INSERT INTO page SELECT g, CASE WHEN g IN (7, 39) THEN 'deadly ' ELSE 'text ' END || g FROM generate_series(1, 45) AS g"
    )
    totals = Worker(remote_dsn, "page").run(until_empty=True)
    assert {key: letter[:2] for key, letter in dead_letters(page).items()} == {
        7: ("claim", "EL020"),
        39: ("claim", "EL020"),
    }
    assert assert_all_settled(page, stub.dimensions) == 43
    assert 1 + 3 <= totals.connections <= 1 + 6


def test_a_worker_that_is_stopped_writes_what_is_in_flight(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    stub.behave(latency=1.0, remember=True)
    running = _Running(Worker(remote_dsn, "page"))
    wait_until(lambda: stub.in_flight() == 25, 20, "requests are in flight")
    totals = running.end()
    assert totals.lost_requests == 0
    assert totals.rows == 25
    assert scalar(page, "SELECT count(*) FROM embedline.worker") == 0


def test_faults_of_the_provider_are_told_by_the_worker(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    page.execute("UPDATE page SET body = 'poisonous' WHERE id IN (3, 17)")
    stub.behave(poison="poisonous")
    totals = Worker(remote_dsn, "page").run(until_empty=True)
    assert totals.rows == 23
    assert assert_all_settled(page, stub.dimensions) == 23
    assert scalar(page, "SELECT count(*) FROM embedline.dead_letter") == 2


@pytest.mark.parametrize("answer", ["nan", "zero", "narrow", "few"])
def test_a_model_that_answers_wrongly_for_one_text_loses_that_one(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider, answer: str
) -> None:
    page.execute("UPDATE page SET body = 'oddity' WHERE id = 3")
    stub.behave(rules=[{"match": "oddity", "answer": answer}])
    Worker(remote_dsn, "page").run(until_empty=True)
    assert assert_all_settled(page, stub.dimensions) == 24
    assert scalar(page, "SELECT count(*) FROM embedline.dead_letter") == 1


@contextlib.contextmanager
def _killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    """Let a test that fails not wait for its process."""
    try:
        yield
    finally:
        process.kill()


def test_a_command_serves_its_counts_and_ends_in_order(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    port = free_port()
    command = [str(Path(sys.executable).with_name("embedline")), "remote-worker", "page", "--dsn", remote_dsn]
    command += ["--listen", f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, _killed_at_the_end(process):
        chunks = f"SELECT count(*) = 25 FROM {Generated('page')('chunk')}"
        wait_until(lambda: scalar(page, chunks), 30, "the rows are embedded")
        url = f"http://127.0.0.1:{port}/metrics"
        wait_until(lambda: b"embedline_remote_rows_total 25\n" in get(url)[2], 10, "the rows are counted")
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=30)
        assert process.returncode == 0
    assert told.startswith("25 rows embedded, 25 texts in")
    assert scalar(page, "SELECT count(*) FROM embedline.worker") == 0


def test_a_pool_in_between_is_refused(page: psycopg.Connection, remote_dsn: str) -> None:
    with pooled(remote_dsn) as pool, pytest.raises(SessionNotKept) as refused:
        Worker(pool, "page").run(until_empty=True)
    assert "Connect to the server itself" in (refused.value.hint or "")


def test_a_local_model_is_run_by_the_worker(
    database: psycopg.Connection, login: str, remote_dsn: str, stub: StubProvider
) -> None:
    create_stub_pipeline(database, model="static-256", rows=40)
    database.execute("SELECT embedline.grant_remote('page', %s, true)", (login,))
    totals = Worker(remote_dsn, "page").run(until_empty=True)
    assert totals.rows == 40
    assert assert_exact(database) == 40
