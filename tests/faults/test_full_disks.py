"""Full disks: where tables lie, where the WAL lies, and where COPY's files lie if the system has no files in memory.

Each is a file system of its own, of a size that a test can fill. Mounting it needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from conftest import StartCluster
from embedline.dev.cluster.server import Cluster
from embedline.postgres.sqlstates import DISK_FULL
from killing import IN_FLIGHT, REQUEST, ROWS, assert_nothing_lost, reconnect
from stub_provider import StubProvider
from support import data_count, scalar, settle, wait_until
from torture.sessions import Worker, running
from working import create_stub_model, create_stub_pipeline, insert_rows

# Rows whose tables need more room than their last pages have.
_MANY = 5 * ROWS
# What PostgreSQL says in its log.
_FULL = "No space left on device"
# Removes the one function without which Python has no files in memory, as in a system that has none.
_WITHOUT_MEMORY_FILES = "import os\n\ndel os.memfd_create\n"

# Lets a worker lose its patience in a second, not in a minute.
_IMPATIENT = "from embedline.worker import troubles\n\ntroubles._PATIENCE_SECONDS = 1.0\n"


@contextlib.contextmanager
def _mounted(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a small file system in memory on a folder; skip the test if this machine does not allow it."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0777", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder: Path, left: int = 0) -> Path:
    """Fill a file system but for so many bytes; the space is free again once the file is removed."""
    path = folder / "filler"
    size = shutil.disk_usage(folder).free - left
    with path.open("wb") as file, contextlib.suppress(OSError):
        while size > 0:
            size -= os.write(file.fileno(), b"\0" * min(size, 65536))
    return path


@pytest.fixture
def prepared(own_cluster: Cluster, new_cluster: StartCluster, stub: StubProvider) -> Iterator[Cluster]:
    """A stopped server with rows that wait, to be moved onto a small disk."""
    sizes = {"max_wal_size": "32MB", "min_wal_size": "32MB", "shared_buffers": "16MB"}
    cluster = new_cluster(settings_=sizes)
    # Not on the disk that is filled.
    logs = cluster.data_dir.parent / "logs"
    logs.mkdir()
    logs.chmod(0o777)
    cluster = dataclasses.replace(cluster, settings={**cluster.settings, "log_directory": str(logs)})
    own_cluster.stop()
    subprocess.run(["cp", "-a", own_cluster.data_dir, cluster.data_dir], check=True)
    cluster.start()
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        create_stub_model(connection, stub, max_batch_items=REQUEST, concurrency=IN_FLIGHT)
        create_stub_pipeline(connection)
        settle(connection)
        insert_rows(connection, 1, ROWS)
        connection.execute("CHECKPOINT")
    cluster.stop()
    yield cluster
    cluster.stop("immediate")


@pytest.fixture
def small_disk(prepared: Cluster) -> Iterator[Path]:
    """The folder of the server's data, on a file system that has 40 MB more than it needs."""
    aside = prepared.data_dir.with_name("aside")
    prepared.data_dir.rename(aside)
    size = int(subprocess.run(["du", "-sm", aside], check=True, capture_output=True, text=True).stdout.split()[0])
    with _mounted(prepared.data_dir, size + 40) as folder:
        subprocess.run(["cp", "-a", f"{aside}/.", folder], check=True)
        yield folder
        prepared.stop("immediate")


def _starting_with(cluster: Cluster, code: str) -> Cluster:
    """Have the server's Python run some code when it starts."""
    folder = cluster.data_dir.parent / "code"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return dataclasses.replace(cluster, python_path=f"{folder}:{cluster.python_path}")


def _start_with_room_for_the_wal(cluster: Cluster, disk: Path) -> None:
    """Start a server whose tables lie on a small disk, and whose WAL does not: without WAL it could not go on."""
    wal = cluster.data_dir.parent / "wal"
    subprocess.run(["mv", disk / "pg_wal", wal], check=True)
    (disk / "pg_wal").symlink_to(wal)
    cluster.start()


def _log(cluster: Cluster) -> str:
    return (cluster.data_dir.parent / "logs" / "postgresql.log").read_text(errors="replace")


@contextlib.contextmanager
def _workers(cluster: Cluster) -> Iterator[list[Worker]]:
    """Two workers, one of them scheduled, that are started again when the full disk ends them."""
    ended = threading.Event()
    workers = [Worker(cluster.dsn(), ended, passing=(DISK_FULL,), slot=slot) for slot in (None, 1)]
    with running(workers, ended):
        yield workers


def test_a_full_disk_of_the_tables_delays_the_work(prepared: Cluster, small_disk: Path, stub: StubProvider) -> None:
    _start_with_room_for_the_wal(prepared, small_disk)
    stub.behave(latency=0.3, remember=True)
    with contextlib.closing(reconnect(prepared)) as connection:
        insert_rows(connection, ROWS + 1, _MANY)
        with _workers(prepared):
            # A session could not even begin on a full disk.
            wait_until(lambda: data_count(connection, "chunk") > 0, 20, "the first rows are written")
            filler = _fill(small_disk)
            wait_until(lambda: _log(prepared).count(_FULL) >= 3, 30, "the disk was found full")
            filler.unlink()
            wait_until(lambda: scalar(connection, "SELECT pending = 0 FROM embedline.status"), 60, "nothing waits")
        assert_nothing_lost(connection, stub, _MANY, 0)


def test_a_scheduled_worker_outstays_a_full_disk_with_what_it_has_paid_for(
    prepared: Cluster, small_disk: Path, stub: StubProvider
) -> None:
    cluster = _starting_with(prepared, _IMPATIENT)
    _start_with_room_for_the_wal(cluster, small_disk)
    stub.behave(latency=0.3, remember=True)
    ended = threading.Event()
    worker = Worker(cluster.dsn(), ended, seconds=4, slot=1)
    with contextlib.closing(reconnect(cluster)) as connection:
        insert_rows(connection, ROWS + 1, _MANY)
        with running([worker], ended):
            wait_until(lambda: data_count(connection, "chunk") > 0, 20, "the first rows are written")
            filler = _fill(small_disk)
            # After pauses that take longer than the worker was to run, and than it has patience.
            wait_until(lambda: _log(cluster).count(_FULL) >= 6, 40, "the write was tried again")
            filler.unlink()
            wait_until(lambda: scalar(connection, "SELECT pending = 0 FROM embedline.status"), 60, "nothing waits")
        assert_nothing_lost(connection, stub, _MANY, 0)


def test_a_full_disk_of_the_wal_ends_the_server_and_loses_nothing(
    prepared: Cluster, small_disk: Path, stub: StubProvider
) -> None:
    prepared.start()
    stub.behave(latency=0.3, remember=True)
    with _workers(prepared):
        with contextlib.suppress(psycopg.Error), contextlib.closing(reconnect(prepared)) as connection:
            wait_until(lambda: data_count(connection, "chunk") > 0, 20, "the first rows are written")
            filler = _fill(small_disk)
            # Until the segments are used up that lie ready.
            for _ in range(1000):
                connection.execute("SELECT pg_logical_emit_message(false, 'test', repeat('x', 1000000))")
        wait_until(lambda: _log(prepared).count("PANIC:") > 0, 30, "the WAL was found full")
        filler.unlink()
        prepared.stop("immediate")
        prepared.start()
        with contextlib.closing(reconnect(prepared)) as connection:
            wait_until(lambda: scalar(connection, "SELECT pending = 0 FROM embedline.status"), 60, "nothing waits")
    with contextlib.closing(reconnect(prepared)) as connection:
        assert_nothing_lost(connection, stub, ROWS, 2 * 2 * IN_FLIGHT * REQUEST)


def test_a_full_disk_of_the_copy_files_delays_the_work(prepared: Cluster, stub: StubProvider) -> None:
    with _mounted(prepared.data_dir.parent / "copies", 1) as copies:
        cluster = dataclasses.replace(
            _starting_with(prepared, _WITHOUT_MEMORY_FILES), environment={"TMPDIR": str(copies)}
        )
        cluster.start()
        stub.behave(latency=0.3, remember=True)
        with _workers(cluster), contextlib.closing(reconnect(cluster)) as connection:
            # A session that finds the folder full when it first needs it takes another one.
            wait_until(lambda: data_count(connection, "chunk") > 0, 20, "the first rows are written")
            filler = _fill(copies)
            insert_rows(connection, ROWS + 1, 2 * ROWS)
            wait_until(lambda: _log(cluster).count(_FULL) >= 3, 30, "writes were put off")
            filler.unlink()
            wait_until(lambda: scalar(connection, "SELECT pending = 0 FROM embedline.status"), 60, "nothing waits")
        with contextlib.closing(reconnect(cluster)) as connection:
            assert_nothing_lost(connection, stub, 2 * ROWS, 0)
        assert not list(copies.glob("embedline-copy-*")), "a file of COPY was left behind"
