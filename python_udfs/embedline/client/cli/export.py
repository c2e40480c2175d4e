"""`embedline export`: chunks and vectors into a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from embedline.client import terminal
from embedline.client.cli.application import INT4, TRANSFER, AsJson, Dsn, Pipeline, app, fail, session
from embedline.client.connection import lines


@app.command(rich_help_panel=TRANSFER)
def export(
    dsn: Dsn,
    pipeline: Pipeline,
    file: Annotated[Path, typer.Argument(help="File to write: NAME.parquet or NAME.npz.", dir_okay=False)],
    version: Annotated[
        int | None, typer.Option(min=1, max=INT4, help="Number of the version; the serving one without it.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Column of the source to write, too; may be repeated, * is all.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write keys, chunks and vectors of a version, and its recipe, into one file.

    Only rows that your role may read.
    """
    from embedline.client.transfer import export as exporting

    console = Console(stderr=True, highlight=False)
    with session(dsn) as connection, writing(file), counted(console) as show:
        done = exporting.export(
            connection, pipeline, version, column or [], file, lambda rows, total: show("exporting", rows, total)
        )
    if json:
        typer.echo(terminal.as_json(asdict(done)))
        return
    typer.echo(f"{done.file}: {done.rows:,} chunks of version {done.version} of pipeline {done.pipeline}.")
    if done.missing:
        typer.echo(f"{done.missing:,} chunks of the version have no vector and are not in it.", err=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """End the command with the system's reason if the file cannot be read or written."""
    try:
        yield
    except OSError as error:
        fail(lines(f"{path}: {error.strerror or error}", None, None))


@contextlib.contextmanager
def counted(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function that shows a phase and its count.

    A terminal has a bar, a pipe a line for each phase.
    """
    said = ""
    if not console.is_terminal:

        def tell(phase: str, done: int, total: int | None) -> None:
            nonlocal said
            if phase != said:
                typer.echo(phase, err=True)
            said = phase

        yield tell
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda phase, done, total: progress.update(task, description=phase, completed=done, total=total)
