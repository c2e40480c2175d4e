"""Show tasks in progress: as bars by the terminal's width, or as lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from embedline.client import terminal
from embedline.client.worker_display import duration

_ENDED = "ended"
_NOTHING = "Nothing is in progress."
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
    def name(self) -> tuple[str, int | None, str]:
        """Return the part that stays the same while the task goes on."""
        return self.pipeline, self.version, self.task

    def ended(self) -> Task:
        """Return the task after it is gone from the view."""
        return Task(*self.name, _ENDED, *(None,) * 8)

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
        if self.eta_seconds is not None:
            found.append(f"{duration(self.eta_seconds)} to go")
        if self.total is not None:
            found.append(
                f"{self.total:,}{unit} wait" if self.done is None else f"{self.done:,} of {self.total:,}{unit}"
            )
        if self.rate:
            found.append(f"{self.rate:,.1f}/s" if self.rate < 10 else f"{self.rate:,.0f}/s")
        if self.tokens:
            found.append(f"{self.tokens:,} tokens")
        if self.money:
            found.append(f"money {self.money:,.2f}" if self.money >= 0.01 else "money below 0.01")
        return found


class Lines:
    """A line for each task, whenever its text has changed."""

    def show(self, tasks: Iterable[Sequence[Task]]) -> None:
        """Print tasks as they come, to the end."""
        said: dict[tuple[str, int | None, str], str] = {}
        for found in _with_ended(tasks):
            for task in found:
                line = f"{task.label}: {', '.join(task.figures())}".removesuffix(": ")
                if said.get(task.name) != line:
                    typer.echo(terminal.one_line(line))
                    # A person who reads the pipe waits for it.
                    sys.stdout.flush()
                said[task.name] = line
        if not said:
            typer.echo(_NOTHING)


class Bars:
    """A bar for each task, drawn again at each change, or once."""

    def __init__(self, once: bool) -> None:
        self._once = once

    def show(self, tasks: Iterable[Sequence[Task]]) -> None:
        """Draw tasks as they come, to the end; the last picture stays."""
        console = Console(highlight=False)
        if self._once:
            console.print(_picture(list(next(iter(tasks))), console.width))
            return
        with Live(console=console, auto_refresh=False) as live:
            for found in _with_ended(tasks):
                live.update(_picture(found, console.width), refresh=True)


def _with_ended(tasks: Iterable[Sequence[Task]]) -> Iterator[list[Task]]:
    """Yield the tasks with those that were seen before and are gone."""
    seen: dict[tuple[str, int | None, str], Task] = {}
    for found in tasks:
        seen |= {task.name: task for task in found}
        now = {task.name for task in found}
        yield [task if name in now else task.ended() for name, task in seen.items()]


def _picture(tasks: Sequence[Task], columns: int) -> RenderableType:
    """Return the picture of tasks, or the words for none.

    A wide terminal has one line for each, a narrow one the name above its bar.
    """
    if not tasks:
        return Text(_NOTHING)
    lines: list[RenderableType] = []
    for task in tasks:
        name = Text(terminal.start(terminal.one_line(task.label), columns))
        if columns >= _ONE_LINE_COLUMNS:
            name = Text(terminal.start(terminal.one_line(task.label), _NAME_COLUMNS).ljust(_NAME_COLUMNS))
            room = columns - _NAME_COLUMNS - terminal.GAP_CELLS
            lines.append(name if task.phase == _ENDED else _row([name], task, _BAR_COLUMNS, room))
        else:
            bar = _BAR_COLUMNS if columns >= 2 * _BAR_COLUMNS else _NARROW_BAR
            lines += [name] if task.phase == _ENDED else [name, _row([], task, bar, columns)]
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
    # A bar without a percentage moves, so that it does not look like one at 0.
    picture = ProgressBar(
        total=None if task.percent is None else 100,
        completed=task.percent or 0.0,
        width=bar,
        pulse=task.percent is None,
    )
    grid.add_row(*before, picture, Text("  ".join(figures)))
    return grid
