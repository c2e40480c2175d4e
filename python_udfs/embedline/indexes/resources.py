"""Compare memory, /dev/shm and disk with the needs of an index build.

`choose` is arithmetic alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from embedline.errors import InsufficientDisk
from embedline.postgres.session import Session

_MIB = 1024 * 1024
# Error of the graph's estimate (measured: 2 %), and the bytes that pgvector reserves of it in a parallel build.
_MEMORY_SLACK = 1.05
_PARALLEL_RESERVE = 8 * _MIB
# Share of the memory available now; the rest is for the machine's other sessions and the page cache.
_MEMORY_SHARE = 0.5
# Bytes of maintenance_work_mem for each process of a build, the leader included. PostgreSQL starts no more parallel
# workers than that.
#
# pgvector before 0.8.2 overflows a buffer in parallel builds (CVE-2026-3172) because a length wraps round. The length is "area
# - 1 MB" in HnswBeginParallel, which is below zero only if maintenance_work_mem is between 3 and 4 MB (its commit
# b7e680d). Our builds never get so little, so they are parallel with these versions, too.
_MEMORY_PER_PROCESS = 32 * _MIB
_SMALLEST = 64 * _MIB

_MACHINE = """
    SELECT (SELECT setting::bigint * 1024 FROM pg_settings WHERE name = 'maintenance_work_mem') AS maintenance_work_mem,
        current_setting('max_parallel_maintenance_workers')::integer AS parallel_workers,
        current_setting('dynamic_shared_memory_type') AS shared_memory_type,
        coalesce(nullif(pg_tablespace_location(coalesce(
                (SELECT t.oid FROM pg_tablespace AS t WHERE t.spcname = current_setting('default_tablespace')),
                (SELECT d.dattablespace FROM pg_database AS d WHERE d.datname = current_database()))), ''),
            current_setting('data_directory')) AS directory
"""


@dataclass(frozen=True)
class Need:
    """The needs of a build, in bytes: the graph in memory, the index on disk."""

    memory: float
    disk: float


@dataclass(frozen=True)
class Machine:
    """The resources of the server now, in bytes; None if one is not known."""

    maintenance_work_mem: int
    parallel_workers: int
    shared_memory_type: str
    available_memory: int | None
    free_shared_memory: int | None
    free_disk: int | None
    directory: str = ""


@dataclass(frozen=True)
class BuildSettings:
    """The settings of the session that builds, and notices about them."""

    maintenance_work_mem_kb: int
    parallel_workers: int
    notices: tuple[str, ...]


def choose(need: Need, machine: Machine, parallel_workers: int | None = None) -> BuildSettings:
    """Return how to build.

    `parallel_workers` replaces the server's own setting; 0 is a serial build. Raises InsufficientDisk. Too little
    memory only gives a notice, because such a build is many times slower but ends.
    """
    if machine.free_disk is not None and need.disk > machine.free_disk:
        raise InsufficientDisk(
            f"the index takes about {_size(need.disk)}, {machine.directory} has {_size(machine.free_disk)} free",
            hint="Make room there, or name another place: SET default_tablespace = ...;",
        )
    workers = machine.parallel_workers if parallel_workers is None else parallel_workers
    wanted = max(_rounded(need.memory * _MEMORY_SLACK), _SMALLEST)
    allowed = _allowed(machine)
    notices: list[str] = []
    if workers > 0:
        shared = max(wanted + _PARALLEL_RESERVE, _MEMORY_PER_PROCESS * (workers + 1))
        taken = shared if allowed is None else min(shared, allowed)
        obstacle = _obstacle_to_parallel(machine, taken)
        if obstacle is None:
            notices += _too_little(need, taken, wanted, machine)
            return BuildSettings(taken // 1024, workers, tuple(notices))
        notices.append(obstacle)
    taken = max(wanted, machine.maintenance_work_mem)
    if allowed is not None:
        taken = min(taken, allowed)
    notices += _too_little(need, taken, wanted, machine)
    return BuildSettings(taken // 1024, 0, tuple(notices))


def _allowed(machine: Machine) -> int | None:
    """Return the most memory that a build may take.

    A setting of the administrator counts, even if it seems large.
    """
    if machine.available_memory is None:
        return None
    share = int(machine.available_memory * _MEMORY_SHARE) // _MIB * _MIB
    return max(share, machine.maintenance_work_mem, _SMALLEST)


def _obstacle_to_parallel(machine: Machine, shared: int) -> str | None:
    # A parallel build allocates all of maintenance_work_mem at once as dynamic shared memory. With "posix" that is a
    # file in /dev/shm, which a container often limits to 64 MB.
    free = machine.free_shared_memory
    if machine.shared_memory_type != "posix" or free is None or shared <= free:
        return None
    return (
        f"the build is serial: in parallel it would take {_size(shared)} of shared memory, /dev/shm has {_size(free)} free"
        " (in containers: --shm-size)"
    )


def _too_little(need: Need, taken: int, wanted: int, machine: Machine) -> list[str]:
    if taken >= wanted:
        return []
    available = (
        "" if machine.available_memory is None else f" ({_size(machine.available_memory)} of memory are available)"
    )
    return [
        f"the graph takes about {_size(need.memory)} of memory, the build gets {_size(taken)}{available}:"
        " once that is full the rest is many times slower, and its progress seems to stand still"
    ]


def look_at_machine(session: Session) -> Machine:
    """Read the server's resources from inside it; a client may be another machine."""
    row = session.query(_MACHINE)[0]
    directory = str(row["directory"])
    return Machine(
        maintenance_work_mem=int(row["maintenance_work_mem"]),
        parallel_workers=int(row["parallel_workers"]),
        shared_memory_type=str(row["shared_memory_type"]),
        available_memory=available_memory(),
        free_shared_memory=_free("/dev/shm"),  # noqa: S108  the kernel's, not a file of ours
        free_disk=_free(directory),
        directory=directory,
    )


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the memory that could be allocated now.

    The limit of a container counts, too.
    """
    found = [value for value in (_of_machine(meminfo), _of_container(cgroup)) if value is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    values = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return int(values["MemAvailable"][0]) * 1024 if values.get("MemAvailable") else None


def _of_container(cgroup: Path) -> int | None:
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Page cache that is not in use now is freed when memory is needed.
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


def _free(directory: str) -> int | None:
    try:
        disk = os.statvfs(directory)
    except OSError:
        return None
    return disk.f_frsize * disk.f_bavail


def _rounded(size: float) -> int:
    return -(-int(size) // _MIB) * _MIB


def _size(size: float) -> str:
    return f"{size / 1024**3:,.1f} GB" if size >= 1024**3 else f"{size / _MIB:,.0f} MB"
