"""Files with changed bytes crash no decoder, and end as segments or as a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent.parent


def run_child(*arguments: str) -> dict[str, object]:
    """Decode in a process of its own, because a decoder in C may end its process."""
    environment = {**os.environ, "PYTHONPATH": f"{_TESTS}:{_TESTS.parent / 'python_udfs'}"}
    command = [sys.executable, str(_TESTS / "media_child.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"the child ended with {done.returncode}: {done.stderr[-2000:]}"
    ends: dict[str, object] = json.loads(done.stdout)
    return ends


def test_changed_bytes_end_as_segments_or_as_a_reason() -> None:
    tries = 400
    ends = run_child("fuzz", str(tries))
    assert len(ends) == 18
    for name, counts in ends.items():
        assert isinstance(counts, dict)
        assert counts["decoded"] + counts["rejected"] == tries, name
        assert counts["rejected"] > 0, name


@pytest.mark.faults
def test_small_files_of_many_pixels_stay_within_memory() -> None:
    ends = run_child("bombs")
    assert len(ends) == 10
    too_large = {"png of 3.6 billion pixels", "flac of three hours"}
    assert {name for name, end in ends.items() if end == "rejected"} == too_large
