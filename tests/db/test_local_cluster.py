"""The checkout's own cluster when the checkout is moved or copied."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from conftest import StartCluster
from embedline.dev.cluster.cluster import Cluster
from embedline.dev.cluster.install import register
from support import MODELS, free_port, install, scalar

_IMPORT = """
    CREATE OR REPLACE FUNCTION pg_temp.path() RETURNS text LANGUAGE plpython3u AS $$
        import os
        return os.environ["PYTHONPATH"]
    $$
"""


@pytest.fixture
def moved_to() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="embedline-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "data"


def _new(cluster: Cluster, data_dir: Path, **changes: object) -> Cluster:
    return replace(cluster, data_dir=data_dir, python_path=f"{cluster.python_path}:/moved", **changes)  # type: ignore[arg-type]


def test_a_cluster_that_was_moved_while_it_ran_is_started_with_its_new_path(
    new_cluster: StartCluster, moved_to: Path
) -> None:
    old = new_cluster()
    old.init()
    old.start()
    with psycopg.connect(old.dsn(), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    assert not old.is_moved()
    old.data_dir.rename(moved_to)
    new = _new(old, moved_to)
    try:
        assert new.running_port() == new.port
        assert new.is_moved()
        new.stop("immediate")
        new.start()
        assert not new.is_moved()
        with psycopg.connect(new.dsn()) as connection:
            assert scalar(connection, "SELECT answer FROM kept") == 42
            connection.execute("CREATE EXTENSION IF NOT EXISTS plpython3u")
            connection.execute(_IMPORT)
            assert scalar(connection, "SELECT pg_temp.path()") == new.python_path
            assert scalar(connection, "SHOW unix_socket_directories") == str(new.socket_dir)
    finally:
        new.remove()


def test_a_copy_of_a_running_cluster_starts_beside_it(new_cluster: StartCluster, moved_to: Path) -> None:
    old = new_cluster()
    old.init()
    old.start()
    with psycopg.connect(old.dsn(), autocommit=True) as connection:
        connection.execute("CHECKPOINT")
    subprocess.run(["cp", "-a", old.data_dir, moved_to], check=True)
    new = _new(old, moved_to, port=free_port())
    try:
        assert new.running_port() is None
        new.start()
        assert {old.running_port(), new.running_port()} == {old.port, new.port}
    finally:
        new.remove()
    assert old.running_port() == old.port


def test_models_of_a_moved_checkout_are_found_at_their_new_path(empty_database_dsn: str) -> None:
    install(empty_database_dsn, models=("static-256",))
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        before = connection.execute("SELECT model_id, fingerprint FROM embedline.model").fetchone()
        connection.execute("UPDATE embedline.model SET model = '/old/checkout/.models/static-256'")
        connection.execute(
            "SELECT embedline.create_model('minilm', 'sentence-transformers', %s)", (str(MODELS / "static-256"),)
        )
        assert register(empty_database_dsn, MODELS) == []
        # Of that name, but a person's own.
        assert scalar(connection, "SELECT model FROM embedline.model WHERE name = 'minilm'") == str(
            MODELS / "static-256"
        )
        row = connection.execute(
            "SELECT model_id, fingerprint FROM embedline.model WHERE name = 'static-256'"
        ).fetchone()
        assert row == before
        assert scalar(connection, "SELECT model FROM embedline.model WHERE name = 'static-256'") == str(
            MODELS / "static-256"
        )
        assert scalar(connection, "SELECT count(*) FROM embedline.model") == 2
