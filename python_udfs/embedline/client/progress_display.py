"""Show tasks in progress: as bars by the terminal's width, or as lines in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from embedline.client import terminal
from embedline.client.worker_display import duration

# Columns of a bar, and those from which name, bar and figures have one line.
_BAR_COLUMNS, _NARROW_BAR, _ONE_LINE_COLUMNS = 30, 14, 120
_NAME_COLUMNS = 40


@dataclass(frozen=True)
class Task:
    """A row of embedline.progress."""

    pipeline: str
    version: int | None
    task: str
    phase: str | None
    done: int | None
    total: int | None
    unit: str | None
    percent: float | None
    rate: float | None
    eta_seconds: float | None
    tokens: int | None
    money: float | None

    @property
    def is_done(self) -> bool:
        """Return True if nothing of it is left."""
        if self.percent is not None:
            return self.percent >= 100
        return self.total is not None and self.done is not None and self.done >= self.total

    @property
    def label(self) -> str:
        """Return the name of the task in words."""
        version = "" if self.version is None else f" v{self.version}"
        phase = f", {self.phase}" if self.phase else ""
        return f"{self.pipeline}{version} {self.task}{phase}"

    def figures(self) -> list[str]:
        """Return the known figures, the most important first."""
        unit = f" {self.unit}" if self.unit else ""
        found = [] if self.percent is None else [f"{self.percent:.1f} %"]
        if self.eta_seconds is not None and not self.is_done:
            found.append(f"{duration(self.eta_seconds)} to go")
        if self.done is not None:
            found.append(f"{self.done:,}{unit}" if self.total is None else f"{self.done:,} of {self.total:,}{unit}")
        if self.rate:
            found.append(f"{self.rate:,.1f}/s" if self.rate < 10 else f"{self.rate:,.0f}/s")
        if self.tokens:
            found.append(f"{self.tokens:,} tokens")
        if self.money:
            found.append(f"money {self.money:,.2f}" if self.money >= 0.01 else "money below 0.01")
        return found


class Lines:
    """A line for each task, whenever its text has changed."""

    def __init__(self, nothing: str) -> None:
        self._nothing = nothing

    def show(self, tasks: Iterable[Sequence[Task]]) -> None:
        """Print tasks as they come, to the end."""
        said: dict[tuple[str, int | None, str], str] = {}
        for number, found in enumerate(tasks):
            if not found and number == 0:
                typer.echo(self._nothing)
            for task in found:
                line = f"{task.label}: {', '.join(task.figures())}".removesuffix(": ")
                name = (task.pipeline, task.version, task.task)
                if said.get(name) != line:
                    typer.echo(terminal.one_line(line))
                said[name] = line


class Bars:
    """A bar for each task, drawn again at each change."""

    def __init__(self, nothing: str) -> None:
        self._nothing = nothing

    def show(self, tasks: Iterable[Sequence[Task]]) -> None:
        """Draw tasks as they come, to the end; the last picture stays."""
        console = Console(highlight=False)
        with Live(console=console, auto_refresh=False) as live:
            for found in tasks:
                live.update(drawn(found, console.width) if found else Text(self._nothing), refresh=True)


def drawn(tasks: Sequence[Task], columns: int) -> Group:
    """Return the picture of tasks.

    A wide terminal has one line for each, a narrow one the name above its bar.
    """
    lines: list[RenderableType] = []
    for task in tasks:
        name = Text(terminal.start(terminal.one_line(task.label), columns))
        if columns >= _ONE_LINE_COLUMNS:
            name = Text(terminal.start(terminal.one_line(task.label), _NAME_COLUMNS).ljust(_NAME_COLUMNS))
            lines.append(_row([name], task, _BAR_COLUMNS, columns - _NAME_COLUMNS - terminal.GAP_CELLS))
        else:
            bar = _BAR_COLUMNS if columns >= 2 * _BAR_COLUMNS else _NARROW_BAR
            lines += [name, _row([], task, bar, columns)]
    return Group(*lines)


def _row(before: Sequence[Text], task: Task, bar: int, columns: int) -> Table:
    """Return a line of the bar and as many figures as fit."""
    grid = Table.grid(padding=(0, terminal.GAP_CELLS, 0, 0))
    room = columns - bar - terminal.GAP_CELLS
    figures: list[str] = []
    for figure in task.figures():
        if terminal.cells("  ".join([*figures, figure])) > room:
            break
        figures.append(figure)
    known = task.percent is not None
    picture = ProgressBar(
        total=100 if known else None, completed=task.percent or 0.0, width=bar, pulse=not known and not task.is_done
    )
    grid.add_row(*before, picture, Text("  ".join(figures)))
    return grid
