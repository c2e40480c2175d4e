"""Format the command line's output.

Text is aligned to fit the terminal. A program gets one line per row.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

import typer
from rich.cells import cell_len, set_cell_size

from embedline.client.doctor.server import Finding, Verdict

_COLOURS: dict[Verdict, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}
_GAP = "  "
GAP_CELLS = len(_GAP)
# Columns of a line of prose that can be read in one go.
_READABLE = 100


def width() -> int | None:
    """Return the columns of the terminal, None without one.

    Without a terminal lines may have any length.
    """
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], columns_wide: int | None) -> str:
    """Return rows as a table, or as lists of values if it is too wide.

    psql does so with \\x auto.
    """
    texts = [["" if value is None else one_line(value) for value in row] for row in rows]
    widths = [max(map(cells, column)) for column in zip(columns, *texts, strict=True)]
    if columns_wide is None or sum(widths) + len(_GAP) * (len(widths) - 1) <= columns_wide:
        lines = (
            _GAP.join(cell + " " * (w - cells(cell)) for cell, w in zip(row, widths, strict=True))
            for row in [columns, *texts]
        )
        return "\n".join(line.rstrip() for line in lines)
    label = max(map(len, columns))
    return "\n\n".join(
        "\n".join(
            hanging(f"{name.ljust(label)}{_GAP}", value, columns_wide)
            for name, value in zip(columns, row, strict=True)
            if value
        )
        for row in texts
    )


def findings(found: Iterable[Finding], columns_wide: int | None) -> str:
    """Return doctor's findings: prose by the width, commands whole, to be copied."""
    wide = min(columns_wide or _READABLE, _READABLE)
    lines: list[str] = []
    for finding in found:
        verdict = finding.verdict.ljust(len("warning"))
        if columns_wide is not None:
            verdict = typer.style(verdict, fg=_COLOURS[finding.verdict])
        indent = " " * len("warning  ")
        told = hanging(indent, f"{finding.check}: {finding.found}", wide)
        lines.append(f"{verdict}{_GAP}{told[len(indent) :]}")
        lines += [hanging(indent, finding.advice, wide)] if finding.advice else []
        lines += [f"{indent}  {command}" for command in finding.commands]
    return "\n".join(lines)


def cells(text: str) -> int:
    """Return the columns that a text takes; an ideograph takes two."""
    return cell_len(text)


def one_line(value: object) -> str:
    """Return a value as one line, a list or an object as JSON.

    White space is folded, other control characters are left out, because they could steer the terminal.
    """
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def start(text: str, columns: int) -> str:
    """Return as much of a line as fits, with three dots if it is cut."""
    return text if cells(text) <= columns else set_cell_size(text, max(columns - 3, 0)).rstrip() + "..."


def as_json(values: object) -> str:
    """Return values for a program to read."""
    return json.dumps(values, indent=2, ensure_ascii=False, default=str)


def hanging(label: str, text: str, columns_wide: int) -> str:
    """Return text after a label, with its further lines indented as deep.

    A word that is too long is left whole.
    """
    return textwrap.fill(
        text,
        width=max(columns_wide, len(label) + 20),
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
