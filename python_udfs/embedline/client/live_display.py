"""Show a command's progress while the server works.

It shows bars on a terminal and plain lines in a pipe, both on stderr, apart from results.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from embedline.client.build_index import Client, Execute

# Seconds between two queries on a terminal, and between two lines in a pipe.
_LOOK_SECONDS, _LINE_SECONDS = 0.3, 10.0
# Largest share of the time for expensive queries, because a long queue is counted.
_COST_SHARE = 0.1


@dataclass(frozen=True)
class Line:
    """One running task: its name, a text, and the finished share.

    The share is None if it is not known.
    """

    name: str
    text: str
    share: float | None = None


# Asks a second session for the progress.
Look = Callable[[Execute], Sequence[Line]]


@contextmanager
def shown(client: Client, look: Look, console: Console, *, lines: bool = True) -> Iterator[Callable[[str], None]]:
    """Show the results of `look` while the block runs.

    Yields a function that prints a message beside them. With `lines`, a pipe gets them every ten seconds. A failure of
    `look` ends the display, not the block.
    """
    if console.is_terminal:
        with _bars(console) as progress, _followed(client, look, _Bars(progress).update, _LOOK_SECONDS):
            yield lambda text: progress.console.print(text, markup=False, soft_wrap=True)
        return

    def tell(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    said: dict[str, str] = {}

    def print_lines(found: Sequence[Line]) -> None:
        for line in found:
            if said.get(line.name) != line.text:
                tell(f"{line.name}: {line.text}")
            said[line.name] = line.text

    if not lines:
        yield tell
        return
    with _followed(client, look, print_lines, _LINE_SECONDS):
        yield tell


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[label]}"), BarColumn(bar_width=24), TaskProgressColumn(),
        TextColumn("{task.fields[text]}"), TimeElapsedColumn(), console=console, transient=True,
    )  # fmt: skip


class _Bars:
    """Bars by name; the bar of a name that is no longer found is removed."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, found: Sequence[Line]) -> None:
        for line in found:
            if line.name not in self._tasks:
                self._tasks[line.name] = self._progress.add_task("", total=None, label=escape(line.name), text="")
            self._progress.update(
                self._tasks[line.name],
                total=None if line.share is None else 1.0, completed=line.share or 0.0, text=escape(line.text),
            )  # fmt: skip
        for name in set(self._tasks) - {line.name for line in found}:
            self._progress.remove_task(self._tasks.pop(name))


@contextmanager
def _followed(client: Client, look: Look, show: Callable[[Sequence[Line]], None], seconds: float) -> Iterator[None]:
    finished = threading.Event()

    def follow() -> None:
        # There may be no connection free for one more session.
        with contextlib.suppress(Exception), client.another() as execute:
            pause = 0.0
            while not finished.wait(pause):
                began = time.monotonic()
                found = look(execute)
                if not finished.is_set():
                    show(found)
                pause = max(seconds, (time.monotonic() - began) / _COST_SHARE)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
