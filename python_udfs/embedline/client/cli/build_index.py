"""`embedline build-index`: build a vector index and show its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from embedline.client import build_index, terminal
from embedline.client.cli.application import INT4, OPERATE, AsJson, Dsn, Pipeline, app, fail, session
from embedline.client.connection import lines
from embedline.errors import EmbedlineError

# PostgreSQL's own limit of max_parallel_maintenance_workers.
_PARALLEL_WORKERS = 1024


@app.command("build-index", rich_help_panel=OPERATE)
def build_index_command(
    dsn: Dsn,
    pipeline: Pipeline,
    version: Annotated[
        int | None, typer.Option(min=1, max=INT4, help="Number of the version; the serving one without it.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Name of a precision index instead of the column's own.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, max=_PARALLEL_WORKERS, help="Parallel workers; max_parallel_maintenance_workers without it, 0: none."
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Build a vector index of a pipeline CONCURRENTLY and show its progress.

    It refuses while vectors are missing.
    """
    console = Console(stderr=True, highlight=False)
    with session(dsn) as connection:
        try:
            with _progress(console) as show:
                statement = build_index.build(
                    build_index.PsycopgClient(connection),
                    pipeline,
                    version,
                    precision,
                    parallel_workers=workers,
                    listener=build_index.Listener(
                        show, lambda notice: console.print(f"NOTICE: {notice}", markup=False, soft_wrap=True)
                    ),
                )
        except EmbedlineError as error:
            fail(lines(error.message, error.detail, error.hint))
    if json:
        built = {"pipeline": pipeline, "version": version, "precision": precision, "statement": statement}
        typer.echo(terminal.as_json(built))
    elif statement is None:
        typer.echo(f"The index of pipeline {pipeline} is valid, or it has none: nothing to build.")
    else:
        typer.echo(f"The index of pipeline {pipeline} is built and valid.")


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Yield a function that shows phase and percentage.

    A terminal has a bar, a pipe a line for each phase.
    """
    if not console.is_terminal:
        said = ""

        def tell(phase: str, percent: float) -> None:
            nonlocal said
            if phase != said:
                typer.echo(phase, err=True)
            said = phase

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=100)
        yield lambda phase, percent: progress.update(task, description=phase, completed=percent)
