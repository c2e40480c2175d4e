"""The server of a test run: made for it, in memory where there is room, without fsync and without pg_cron.

734 tests clone a database and drop it again. On the developer's own server, which is durable and has pg_cron, that takes
1.3 s; on this one 0.11 s. Tests of durability and of pg_cron start servers of their own.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import support
import warm
from embedline.dev.cluster.bootstrap import local_cluster
from embedline.dev.cluster.server import Cluster
from embedline.dev.cluster.settings import load_settings

# Where files live in memory, and the room that a run may need there: a WAL of 1 GB and some dozen databases.
_MEMORY = Path("/dev/shm")
_ROOM = 4 * 2**30
# See sitecustomize.py there.
_MEASURING = Path(__file__).resolve().parent / "measuring"
_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "1GB",
    "max_connections": "200",
    "shared_buffers": "256MB",
}


def server_python_path() -> str:
    """Return the PYTHONPATH of a server of the tests; while coverage is measured, the folder that counts comes first."""
    path = load_settings().server_python_path
    return f"{_MEASURING}{os.pathsep}{path}" if str(_MEASURING) in sys.path else path


def start_server(settings_: Mapping[str, str] | None = None) -> Cluster:
    """Make and start a server on a free port; `remove_server` ends it. `settings_` go before those of here."""
    settings = load_settings()
    given = {**_SETTINGS, **(settings_ or {})}
    in_memory = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM
    folder = Path(tempfile.mkdtemp(prefix="embedline-", dir=_MEMORY if in_memory else None))
    folder.chmod(0o755)  # the server's OS user has to reach its data directory
    bin_dir = local_cluster(settings).bin_dir
    # Coverage counts what a session runs from its start on.
    library = None if str(_MEASURING) in sys.path else warm.library(int(bin_dir.parent.name))
    cluster = Cluster(
        data_dir=folder / "data",
        port=support.free_port(),
        bin_dir=bin_dir,
        python_path=server_python_path(),
        cron_database=None,
        settings=given if library is None else {**given, "shared_preload_libraries": str(library)},
        environment={} if library is None else {"EMBEDLINE_WARM": warm.script()},
    )
    cluster.init()
    cluster.start()
    return cluster


def remove_server(cluster: Cluster) -> None:
    """Stop the server and delete its files."""
    cluster.remove()
    shutil.rmtree(cluster.data_dir.parent, ignore_errors=True)
