"""Limit what a test run reads before its first test.

It reads only files with tests of its kind, and each is rewritten by one process.
Each process of a run imports every test file, and pytest rewrites its assertions first. For all files that took 33 s of CPU in
each process, 20 of them for rewriting. Pytest keeps what it has rewritten, but processes that begin together find nothing yet.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.assertion import rewrite

FAULT_FOLDERS = ("cron", "faults")
_NAME = re.compile(r"\bfaults\b")


def is_left_out(path: Path, marks: str) -> bool:
    """Return True if a file has no test for a run with `-m marks`.

    The marks are those of the Makefile. A test bears `faults` by its folder, or by that word in its file.
    """
    if path.parent.name in FAULT_FOLDERS:
        return marks == "not faults"
    return marks == "faults" and _NAME.search(path.read_text(encoding="utf-8")) is None


def rewrite_share(config: pytest.Config, number: int, count: int) -> None:
    """Rewrite a process's share of the run's files: each `count`-th, from `number` on."""
    # These are pytest's own. A release that has changed them rewrites each file in each process, as it would without this.
    with contextlib.suppress(AttributeError, TypeError, OSError):
        state = config.stash[rewrite.assertstate_key]
        for path in list(_files(config))[number::count]:
            folder = rewrite.get_cache_dir(path)
            kept = folder / f"{path.stem}{rewrite.PYC_TAIL}"
            if rewrite._read_pyc(path, kept) is None and rewrite.try_makedirs(folder):
                source, code = rewrite._rewrite_test(path, config)
                rewrite._write_pyc(state, code, source, kept)


def _files(config: pytest.Config) -> Iterator[Path]:
    for argument in config.args:
        folder = config.rootpath / argument
        if folder.is_dir():
            found = sorted(folder.rglob("test_*.py"))
            yield from (path for path in found if not is_left_out(path, config.option.markexpr))
