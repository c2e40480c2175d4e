"""The benches: each of them can be loaded, so that a name that moved is noticed before somebody measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "tests" / "bench"


def test_every_bench_can_be_loaded_and_has_a_run() -> None:
    names = sorted(path.stem for path in BENCHES.glob("bench_*.py"))
    assert len(names) > 10
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name).run"
    path = os.pathsep.join(map(str, (BENCHES, ROOT / "tests", ROOT / "python_udfs")))
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
