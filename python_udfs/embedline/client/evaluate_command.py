"""`embedline evaluate`: run the gate from a shell.

It shows the progress and the rows, and returns the verdict as exit code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from embedline.client import terminal
from embedline.client.build_index import Execute, PsycopgClient
from embedline.client.live_display import Line, shown
from embedline.core.sql_text import quote_literal

EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 2}
# 1 and 2 are verdicts here, so a failed measurement and a usage error have a code of their own.
EXIT_NOT_MEASURED = 3
_USAGE_ERROR = 2

_EVALUATE = """
    SELECT measure, old, new, difference, low, high, verdict, detail
    FROM embedline.evaluate(%s, %s, %s::text::regclass, k => %s::integer, margin => %s::float8, query_count => %s::integer,
        breakdown => %s::name, seed => %s::bigint, min_recall => %s::float8)
"""
_COLUMNS = ("measure", "old", "new", "difference", "low", "high", "verdict", "detail")
_HEAD = ("measure", "old", "new", "difference", "95 % interval", "verdict", "detail")
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "alarm": "yellow"}


@dataclass(frozen=True)
class Request:
    """The parameters of a gate; the names are those of embedline.evaluate."""

    pipeline: str
    version: int
    canaries: str | None
    k: int
    margin: float
    query_count: int
    breakdown: str | None
    seed: int
    min_recall: float

    @property
    def label(self) -> str:
        """Return the measured version in words."""
        return f"version {self.version} of {self.pipeline}"


class VerdictCommand(TyperCommand):
    """A command whose exit codes 1 and 2 are verdicts; a wrong option ends it with 3."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            if getattr(error, "exit_code", None) == _USAGE_ERROR:
                error.exit_code = EXIT_NOT_MEASURED  # type: ignore[attr-defined]
            raise


def measure(connection: psycopg.Connection[Any], request: Request, console: Console) -> list[dict[str, Any]]:
    """Run the gate and show its progress on the console.

    Returns its rows, the verdict first.
    """
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    pid = None if row is None else int(row[0])
    is_bar = console.is_terminal
    with shown(PsycopgClient(connection), _look(request, pid), console, lines=False) as tell:
        if not is_bar:
            tell(f"measuring {request.label}")

        def hear(notice: psycopg.errors.Diagnostic) -> None:
            # On a terminal the bar shows the content of the server's notices of progress.
            if not is_bar or notice.severity_nonlocalized != "NOTICE":
                tell(f"{notice.severity}: {notice.message_primary}")

        connection.add_notice_handler(hear)
        cursor = connection.execute(_EVALUATE, (
            request.pipeline, request.version, request.canaries, request.k, request.margin, request.query_count,
            request.breakdown, request.seed, request.min_recall,
        ))  # fmt: skip
        return [dict(zip(_COLUMNS, found, strict=True)) for found in cursor]


def _look(request: Request, pid: int | None) -> Callable[[Execute], Sequence[Line]]:
    # A pooler in between may have given another backend by now. Then any gate of this version will do.
    statement = (
        "SELECT step, percent FROM embedline.evaluation_progress"
        f"({quote_literal(request.pipeline)}) WHERE task = 'evaluate' AND version = {request.version}"
        f" ORDER BY pid = {pid or 0} DESC LIMIT 1"
    )

    def look(execute: Execute) -> Sequence[Line]:
        found = execute(statement)
        step, percent = found[0] if found else ("starting", None)
        return [Line(request.label, str(step), None if percent is None else float(percent) / 100)]

    return look


def verdict_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return the verdict of a gate's rows."""
    return next(str(row["verdict"]) for row in rows if row["measure"] == "verdict")


def print_json(rows: Sequence[dict[str, Any]], request: Request) -> None:
    """Print the rows and the verdict as one JSON object."""
    print(json.dumps(
        {"pipeline": request.pipeline, "version": request.version, "verdict": verdict_of(rows), "rows": list(rows)},
        indent=2,
    ))  # fmt: skip


def print_table(rows: Sequence[dict[str, Any]], request: Request) -> None:
    """Print the rows as a table, then the verdict and its consequence."""
    console = Console(highlight=False)
    measures = [_cells(row) for row in rows if row["measure"] != "verdict"]
    if measures and console.is_terminal:
        table = Table(*_HEAD)
        for *cells, verdict, detail in measures:
            table.add_row(*map(escape, cells), _coloured(verdict), escape(detail))
        console.print(table)
    elif measures:
        print(terminal.table(_HEAD, measures, None))
    verdict = verdict_of(rows)
    detail = next(row["detail"] for row in rows if row["measure"] == "verdict")
    console.print(f"{escape(request.label)}: {_coloured(verdict)} ({escape(detail)})", soft_wrap=True)
    if verdict == "pass":
        console.print(
            f"SELECT embedline.cutover({quote_literal(request.pipeline)}, {request.version});", soft_wrap=True
        )


def _cells(row: dict[str, Any]) -> list[str]:
    interval = "" if row["low"] is None else f"{_figure(row['low'])} to {_figure(row['high'])}"
    figures = (_figure(row[name]) for name in ("old", "new", "difference"))
    return [row["measure"], *figures, interval, row["verdict"] or "", row["detail"] or ""]


def _coloured(verdict: str) -> str:
    colour = _COLOURS.get(verdict)
    return verdict if colour is None else f"[{colour}]{verdict}[/{colour}]"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
