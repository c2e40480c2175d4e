"""Files that a run leaves out hold none of its tests; processes share rewriting."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import collecting
from support import ROOT

# Folders with files of both kinds of tests, and of one.
_FOLDERS = ("tests/cron", "tests/observe", "tests/keywords")


def _collected(marks: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--collect-only", "-m", marks, *_FOLDERS]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_a_run_that_leaves_files_out_has_the_same_tests() -> None:
    # The other form means the same, and leaves no file out.
    assert _collected("faults") == _collected("(faults)") != []


def test_a_mark_that_stands_in_another_file_is_seen() -> None:
    marks = re.compile(r"\bmark\.faults\b")
    for path in (ROOT / "tests").rglob("*.py"):
        if not path.name.startswith("test_") and path != ROOT / "tests" / "conftest.py":
            assert not marks.search(path.read_text(encoding="utf-8")), path


def test_files_are_left_out_by_their_folder_or_by_their_text(tmp_path: Path) -> None:
    (tmp_path / "cron").mkdir()
    texts = {"cron/test_a.py": "", "test_b.py": "defaults = 1", "test_c.py": "pytestmark = pytest.mark.faults"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    left_out = {
        marks: [name for name in texts if collecting.is_left_out(tmp_path / name, marks)]
        for marks in ("faults", "not faults", "torch", "")
    }
    assert left_out == {"faults": ["test_b.py"], "not faults": ["cron/test_a.py"], "torch": [], "": []}


def test_processes_share_the_rewriting(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for number in range(5):
        (tmp_path / f"test_{number}.py").write_text(f"def test_it() -> None:\n    assert {number} >= 0\n")
    shares = []
    for process in range(2):
        config = pytest.Config.fromdictargs({"markexpr": "faults or not faults"}, [])
        config.args, config.stash = [str(tmp_path)], request.config.stash
        before = set(tmp_path.rglob("*.pyc"))
        collecting.rewrite_share(config, process, 2)
        shares.append(len(set(tmp_path.rglob("*.pyc")) - before))
    assert shares == [3, 2]
    # Without a second rewriting: the dates stay.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pyc")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pyc")} == written
