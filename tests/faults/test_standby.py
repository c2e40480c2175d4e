"""A standby is promoted in the middle of a drain; a backup is recovered to then.

One drain serves all tests: its server is killed with claims in flight, after the WAL of that moment was archived.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psycopg
import pytest
from psycopg import errors

from embedline.dev.cluster.server import Cluster
from embedline.dev.cluster.server_user import as_server_user
from generated_names import PAGE
from stub_fixtures import DIMENSIONS
from stub_provider import StubProvider
from support import free_port, scalar, searching, settle, wait_until
from working import Worker, assert_all_settled, create_stub_model, create_stub_pipeline, insert_rows, work_until_idle

EMBEDDED, WAITING = 20, 400


class StartCluster(Protocol):
    def __call__(self, *, settings_: Mapping[str, str]) -> Cluster: ...


@dataclass(frozen=True)
class Copies:
    """A primary, its standby, and a backup of it with the folder of archived WAL."""

    primary: Cluster
    standby: Cluster
    backup: Cluster
    archive: Path


@dataclass(frozen=True)
class Stopped:
    """The copies after the primary was killed, and the time to recover to."""

    copies: Copies
    recovery_time: str


def program(cluster: Cluster, name: str, *arguments: str) -> None:
    """Run a program of the server as its user."""
    subprocess.run(as_server_user([str(cluster.bin_dir / name), *arguments]), check=True, capture_output=True, cwd="/")


@pytest.fixture(scope="module")
def copies(start_cluster: StartCluster, running_stub: StubProvider) -> Iterator[Copies]:
    """A primary with 20 embedded rows, and a running standby."""
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))) for _ in range(3)]
        for folder in folders:
            folder.chmod(0o777)
        archive = folders[0]
        primary = start_cluster(
            settings_={"archive_mode": "on", "archive_command": f"cp %p {archive}/%f", "archive_timeout": "60"}
        )
        with psycopg.connect(primary.dsn(), autocommit=True) as connection:
            create_stub_model(connection, running_stub)
            create_stub_pipeline(connection, rows=EMBEDDED)
            settle(connection)
            running_stub.forget()
        standby, backup = (replace(primary, data_dir=folder / "data", port=free_port()) for folder in folders[1:])
        stack.callback(standby.remove)
        stack.callback(backup.remove)
        address = ("--host", str(primary.socket_dir), "--port", str(primary.port), "--username", "postgres")
        data = ("--pgdata", str(backup.data_dir))
        program(primary, "pg_basebackup", *address, *data, "--checkpoint", "fast", "--write-recovery-conf")
        subprocess.run(["cp", "-a", backup.data_dir, standby.data_dir], check=True)
        standby.start()
        yield Copies(primary, standby, backup, archive)


@pytest.fixture(scope="module")
def stopped(copies: Copies, running_stub: StubProvider) -> Iterator[Stopped]:
    """The primary dies with claims in flight, which standby and archive have seen."""
    running_stub.behave(latency=0.1, remember=True)
    chunks = f"SELECT count(*) FROM {PAGE('chunk')}"
    primary = copies.primary
    with contextlib.suppress(psycopg.Error), psycopg.connect(primary.dsn(), autocommit=True) as connection:
        connection.execute("UPDATE embedline.model SET max_batch_items = 20, concurrency = 1 WHERE name = 'stub'")
        insert_rows(connection, EMBEDDED + 1, EMBEDDED + WAITING)
        worker = Worker(primary.dsn())
        wait_until(lambda: scalar(connection, chunks) > EMBEDDED + 100, 30, "the drain is under way")
        recovery_time = str(scalar(connection, "SELECT clock_timestamp()"))
        written = scalar(connection, chunks)
        wait_until(lambda: scalar(connection, chunks) > written + 20, 30, "it went on after that time")
        segment = scalar(connection, "SELECT pg_walfile_name(pg_switch_wal())")
        wait_until(lambda: (copies.archive / segment).exists(), 30, "its WAL is archived")
        assert worker.is_running
        primary.kill()
        worker.join()
    yield Stopped(copies, recovery_time)
    running_stub.behave()


@pytest.fixture
def reader(copies: Copies) -> Iterator[psycopg.Connection]:
    """A session on the standby that has seen all that was embedded."""
    with psycopg.connect(copies.standby.dsn(), autocommit=True) as connection:
        wait_until(lambda: scalar(connection, "SELECT count(*) FROM page_embedding") == EMBEDDED, 30, "it caught up")
        yield connection


def test_a_standby_searches_and_tells_what_it_cannot_do(copies: Copies, reader: psycopg.Connection) -> None:
    with psycopg.connect(copies.primary.dsn(), autocommit=True) as primary:
        primary.execute("SELECT embedline.sample_queries('page', 1.0)")
        expected = searching(primary, "page", "a row")
    lsn = "SELECT pg_last_wal_replay_lsn() >= %s"
    with psycopg.connect(copies.primary.dsn(), autocommit=True) as primary:
        written = scalar(primary, "SELECT pg_current_wal_lsn()")
    wait_until(lambda: scalar(reader, lsn, (written,)), 30, "the standby has seen that queries are noted")
    assert searching(reader, "page", "a row") == expected
    nearest = (
        "SELECT id::text FROM page_embedding ORDER BY embedding <=> embedline.embed_query('page', 'a row') LIMIT 10"
    )
    assert sorted(reader.execute(nearest).fetchall()) == sorted((key,) for key, _, _ in expected)
    for statement in (
        *("SELECT embed_pending()", "CALL embedline.run_worker(max_seconds => 1)", "SELECT embedline.verify('page')"),
        *("SELECT embedline.pause_pipeline('page')", "SELECT embedline.publication('page')"),
    ):
        with pytest.raises(psycopg.Error) as refused:
            reader.execute(statement.encode())
        assert isinstance(refused.value, errors.ReadOnlySqlTransaction | errors.FeatureNotSupported), statement
        assert refused.value.diag.message_hint == "This server is a standby, which only reads. Run it on the primary."
        assert "File " not in (refused.value.diag.context or ""), "the frames of a defect"


def test_pipelines_go_on_after_a_standby_is_promoted_in_a_drain(stopped: Stopped, running_stub: StubProvider) -> None:
    standby = stopped.copies.standby
    program(standby, "pg_ctl", "promote", "-w", "-s", "-D", str(standby.data_dir))
    running_stub.behave(remember=True)
    assert_goes_on(standby)
    rows = [count for text, count in running_stub.texts_seen().items() if text.startswith("page row")]
    assert max(rows) <= 2, "a text was paid for more often than once by each server"


def test_pipelines_go_on_after_a_recovery_to_a_time_in_a_drain(stopped: Stopped, running_stub: StubProvider) -> None:
    backup = stopped.copies.backup
    running_stub.behave(remember=True)
    (backup.data_dir / "standby.signal").rename(backup.data_dir / "recovery.signal")
    settings = {
        "restore_command": f"cp {stopped.copies.archive}/%f %p",
        "recovery_target_time": stopped.recovery_time,
        "recovery_target_action": "promote",
        "archive_mode": "off",
        "primary_conninfo": "",
    }
    (backup.data_dir / "postgresql.auto.conf").write_text("")
    recovered = replace(backup, settings={**backup.settings, **settings})
    recovered.start()
    with psycopg.connect(recovered.dsn(), autocommit=True) as connection:
        wait_until(lambda: not scalar(connection, "SELECT pg_is_in_recovery()"), 30, "the recovery is done")
    assert_goes_on(recovered)


def assert_goes_on(cluster: Cluster) -> None:
    """Assert that a worker of the new server ends what dead ones left."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        chunks = scalar(connection, f"SELECT count(*) FROM {PAGE('chunk')}")
        assert EMBEDDED < chunks < EMBEDDED + WAITING, "the drain was not in its middle"
        claims = f"SELECT count(*) FROM {PAGE('claim')}"
        assert scalar(connection, claims) > 0, "the dead worker had no claim"
        insert_rows(connection, 1001, 1010)
        connection.execute("UPDATE page SET body = body || ' edited' WHERE id <= 5; DELETE FROM page WHERE id = 6")
        work_until_idle(connection)
        assert assert_all_settled(connection, DIMENSIONS) == EMBEDDED + WAITING + 10 - 1
        assert scalar(connection, claims) == 0
        assert connection.execute("SELECT * FROM embedline.verify('page', sample => 0)").fetchall() == []
        assert searching(connection, "page", "a row", k=1)
