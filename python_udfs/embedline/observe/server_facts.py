"""Read facts that no catalogue has: disk, memory, the package that runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import embedline
from embedline.postgres.cron import has_cron
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

# The limit of a container, in version 2 and version 1 of control groups; the file holds "max" or a huge number if none.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SCHEDULED_WORKERS = """
    SELECT count(*) FROM cron.job
    WHERE database = current_database() AND active AND jobname ~ '^embedline worker [0-9]+$'
"""


@entry_point
def server_facts(session: Session) -> list[dict[str, Any]]:
    """Return one row: disk and memory in bytes, package, scheduled workers."""
    free, total = _disk(str(session.scalar("SELECT current_setting('data_directory')")))
    return [
        {
            "disk_free_bytes": free,
            "disk_bytes": total,
            "memory_bytes": memory_bytes(),
            "package_version": embedline.__version__,
            "scheduled_workers": session.scalar(_SCHEDULED_WORKERS) if has_cron(session) else 0,
        }
    ]


def _disk(folder: str) -> tuple[int | None, int | None]:
    """Return the free and all bytes of a folder's disk, as the server's user has them."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None, None
    return disk.f_frsize * disk.f_bavail, disk.f_frsize * disk.f_blocks


def memory_bytes() -> int:
    """Return the bytes of memory that this machine or container has."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        try:
            found = min(found, int(path.read_text()))
        except (OSError, ValueError):
            continue
    return found
