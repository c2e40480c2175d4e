"""The parts of a page: sections of sentences, tables and figures.

All text in them is plain; the template escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from embedline.client.report import words

Tone = Literal["bad", "warn", "good", "plain"]
_VERDICTS: dict[str, Tone] = {"pass": "good", "fail": "bad", "inconclusive": "warn", "alarm": "warn"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, a badge, or a statement to copy.

    A small chart may stand before the text.
    """

    text: str
    kind: Literal["text", "badge", "code"] = "text"
    tone: Tone = "plain"
    chart: Markup | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers stand at the right."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `left_out` counts the rows that a long one does not show."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    left_out: int = 0


@dataclass(frozen=True)
class Figure:
    """A chart with the marks of its lines, and its values as a table."""

    title: str
    chart: Markup
    table: Table
    legend: Sequence[tuple[Markup, str]] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    groups: Sequence[Group] = ()


@dataclass(frozen=True)
class Group:
    """A part of a section with a heading of its own."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Tile:
    """A figure of the page's head; its tone says whether it needs attention."""

    label: str
    value: str
    tone: Tone = "plain"


def text_cells(*texts: str) -> tuple[Cell, ...]:
    """Return cells of plain text."""
    return tuple(Cell(text) for text in texts)


def verdict_cell(verdict: str | None) -> Cell:
    """Return the verdict of a gate."""
    return Cell(words.ABSENT) if verdict is None else Cell(verdict, "badge", _VERDICTS.get(verdict, "plain"))
