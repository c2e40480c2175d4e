"""The table that `make test-faults` ends with: each fault, and what was counted after it.

A test calls `note` once it has compared every row. Its own asserts say that nothing was missing, stale, orphaned, twice or
left: a test that finds something fails and has no line. What was paid for in vain is counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pytest

_PROPERTY = "fault"
_noted: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Noted:
    """What a test has counted: `over` texts were paid for in vain, of `allowed`; None where nothing is paid for."""

    fault: str
    rows: int
    over: int | None
    allowed: int | None


def note(rows: int, over: int | None = None, allowed: int | None = None) -> None:
    """Note that a fault was survived; its name is that of the test."""
    _noted.append(asdict(Noted(_running_test(), rows, over, allowed)))


def _running_test() -> str:
    name = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
    return re.sub(r"\[.*", "", name).removeprefix("test_").replace("_", " ")


def hand_over(report: pytest.TestReport) -> None:
    """Put what a test has noted into its report, which reaches the process that prints."""
    if report.when == "call":
        report.user_properties += [(_PROPERTY, noted) for noted in _noted]
        _noted.clear()


def lines(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Return the table of passed tests, one line a test function; none if nothing was noted."""
    found: dict[str, list[Noted]] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == _PROPERTY:
                noted = Noted(**value)  # type: ignore[arg-type]
                found.setdefault(noted.fault, []).append(noted)
    if not found:
        return []
    head = ("fault", "runs", "rows", "missing", "stale", "orphaned", "twice", "left", "paid in vain", "may be")
    rows = [head]
    for fault, all_noted in sorted(found.items()):
        counted = [noted for noted in all_noted if noted.over is not None]
        over = str(sum(noted.over or 0 for noted in counted)) if counted else ""
        allowed = str(sum(noted.allowed or 0 for noted in counted)) if counted else ""
        rows.append((fault, str(len(all_noted)), str(sum(n.rows for n in all_noted)), *"00000", over, allowed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
