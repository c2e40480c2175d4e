"""The units for systemd, and the commands in them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psycopg
import pytest

import programs
from support import ROOT, scalar, wait_until

UNITS = ROOT / "ops" / "systemd"


def _faults(unit: str, text: str, folder: Path) -> str:
    """Return what systemd says of a unit whose program exists."""
    program = folder / "embedline"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (folder / unit).write_text(text.replace("/opt/embedline/bin/embedline", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(folder / unit)], capture_output=True, text=True, check=False
    )
    # It also reads the machine's own units.
    return "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "embedline" in line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", ["embedline-worker@.service", "embedline-metrics.service"])
def test_systemd_finds_no_fault(unit: str, tmp_path: Path) -> None:
    text = (UNITS / unit).read_text()
    assert _faults(unit, text, tmp_path) == ""
    assert _faults(unit, text.replace("Restart=always", "Restart=forever"), tmp_path) != ""


def test_a_workers_unit_runs_a_worker_and_ends_it_with_its_signal(
    database: psycopg.Connection, database_dsn: str
) -> None:
    text = (UNITS / "embedline-worker@.service").read_text()
    command = re.search(r"^ExecStart=\S+/embedline (.+)$", text, re.MULTILINE)
    assert command is not None
    environment = {**os.environ, "EMBEDLINE_DSN": database_dsn}
    process = programs.Process("embedline", command[1].split(), env=environment)
    workers = "SELECT embedline._workers_alive()"
    wait_until(lambda: scalar(database, workers) == 1, 30, "the worker works")
    assert "\nKillSignal=SIGINT\n" in text
    os.kill(process.pid, signal.SIGINT)
    process.communicate(30)
    assert f"\nSuccessExitStatus={process.returncode}\n" in text
    wait_until(lambda: scalar(database, workers) == 0, 30, "the worker has ended")
