"""How a build is to be done, from figures alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from embedline.errors import InsufficientDisk, InsufficientMemory
from embedline.indexes import resources
from embedline.indexes.build import require_memory
from embedline.indexes.resources import BuildSettings, Machine, Need, choose

MB, GB = 1024**2, 1024**3
ROOMY = Machine(
    maintenance_work_mem=64 * MB,
    parallel_workers=2,
    shared_memory_type="posix",
    available_memory=16 * GB,
    free_shared_memory=8 * GB,
    free_disk=100 * GB,
    directory="/data",
)
NEED = Need(memory=1 * GB, disk=2 * GB)


def _megabytes(settings: BuildSettings) -> int:
    return settings.maintenance_work_mem_kb // 1024


def test_a_build_gets_the_memory_of_its_graph_and_the_server_s_workers() -> None:
    chosen = choose(NEED, ROOMY)
    assert 1024 * 1.05 <= _megabytes(chosen) < 1024 * 1.1
    assert (chosen.parallel_workers, chosen.notices) == (2, ())


def test_a_parallel_build_takes_no_more_shared_memory_than_the_graph() -> None:
    assert _megabytes(choose(NEED, replace(ROOMY, maintenance_work_mem=4 * GB))) < 1200
    assert _megabytes(choose(NEED, replace(ROOMY, maintenance_work_mem=4 * GB), 0)) == 4096


def test_every_process_of_a_small_build_has_what_postgresql_asks_for() -> None:
    chosen = choose(Need(memory=1000, disk=1000), ROOMY, 3)
    assert _megabytes(chosen) == 128
    assert chosen.parallel_workers == 3


def test_a_small_dev_shm_makes_the_build_serial_and_says_why() -> None:
    chosen = choose(NEED, replace(ROOMY, free_shared_memory=64 * MB))
    assert chosen.parallel_workers == 0
    assert _megabytes(chosen) >= 1024
    assert "/dev/shm has 64 MB free" in chosen.notices[0]
    assert choose(NEED, replace(ROOMY, free_shared_memory=64 * MB, shared_memory_type="sysv")).parallel_workers == 2


def test_too_little_memory_is_told_with_figures() -> None:
    chosen = choose(Need(memory=12 * GB, disk=1), ROOMY)
    assert _megabytes(chosen) == 8 * 1024
    assert chosen.parallel_workers == 2
    assert chosen.notices == (
        "the graph takes about 12.0 GB of memory, the build gets 8.0 GB (16.0 GB of memory are available):"
        " once that is full the rest is many times slower, and its progress seems to stand still",
    )


def test_what_an_administrator_has_set_counts_above_our_share() -> None:
    chosen = choose(Need(memory=12 * GB, disk=1), replace(ROOMY, maintenance_work_mem=14 * GB), 0)
    assert (_megabytes(chosen), chosen.notices) == (14 * 1024, ())


def test_no_build_of_ours_gets_so_little_memory_that_an_old_pgvector_overflows() -> None:
    starved = replace(ROOMY, maintenance_work_mem=3 * MB, available_memory=8 * MB)
    for workers in (0, 1, 2, 8):
        assert _megabytes(choose(Need(memory=100 * GB, disk=1), starved, workers)) >= 64


def test_a_full_disk_is_refused_with_figures() -> None:
    with pytest.raises(InsufficientDisk, match=r"about 2.0 GB, /data has 512 MB free"):
        choose(NEED, replace(ROOMY, free_disk=512 * MB))


def test_what_cannot_be_found_out_stops_nothing() -> None:
    blind = replace(ROOMY, available_memory=None, free_shared_memory=None, free_disk=None)
    assert choose(NEED, blind) == choose(NEED, ROOMY)


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    available = resources.available_memory
    assert available(tmp_path / "meminfo", tmp_path / "none") == 2 * MB
    for name, text in {
        "memory.max": "3145728",
        "memory.current": "2097152",
        "memory.stat": "inactive_file 524288\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert available(tmp_path / "meminfo", tmp_path) == 1.5 * MB
    (tmp_path / "memory.max").write_text("max\n")
    assert available(tmp_path / "meminfo", tmp_path) == 2 * MB
    assert available(tmp_path / "none", tmp_path) is None


def test_lists_are_not_built_in_less_memory_than_k_means_takes() -> None:
    settings = BuildSettings(maintenance_work_mem_kb=512 * 1024, parallel_workers=0, notices=())
    require_memory(settings, Need(memory=512 * 1024**2, disk=0), 1_000)
    with pytest.raises(InsufficientMemory, match=r"1,000 lists takes 513 MB of memory, the build gets 512 MB"):
        require_memory(settings, Need(memory=513 * 1024**2, disk=0), 1_000)
