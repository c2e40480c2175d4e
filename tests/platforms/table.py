"""The table of what was tried: in the terminal, and in docs/platforms.md, which keeps a row until it is measured again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "platforms.md"
_HEADER = "| platform | user | step | result | seconds | installed | commit |\n|---|---|---|---|---:|---:|---|\n"
_ROWS = re.compile(re.escape(_HEADER) + r"((?:\|.*\n)*)")


@dataclass(frozen=True)
class Row:
    """What one step gave; all are as they are printed."""

    platform: str
    user: str
    step: str
    result: str
    seconds: str
    installed: str
    commit: str

    def __str__(self) -> str:
        return f"| {' | '.join(astuple(self))} |\n"


def save(rows: Sequence[Row], order: Sequence[str]) -> None:
    """Put the rows into the page: each in the place of the row of the same platform, user and step."""
    text = PAGE.read_text(encoding="utf-8")
    found = _ROWS.search(text)
    if found is None:
        raise SystemExit(f"{PAGE} has no table to put the rows into")
    kept = {}
    for line in found.group(1).splitlines():
        row = Row(*(cell.strip() for cell in line.strip("|").split("|")))
        kept[_place(row)] = row
    kept |= {_place(row): row for row in rows}
    ordered = sorted(kept.values(), key=lambda row: (row.platform, row.user, order.index(row.step)))
    PAGE.write_text(
        text[: found.start()] + _HEADER + "".join(map(str, ordered)) + text[found.end() :], encoding="utf-8"
    )


def _place(row: Row) -> tuple[str, str, str]:
    # The release's name: a newer PostgreSQL in the same suite takes the row of the older one.
    return row.platform.partition(",")[0], row.user, row.step
