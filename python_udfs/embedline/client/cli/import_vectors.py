"""`embedline import`: exported vectors back into a version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from embedline.client import terminal
from embedline.client.cli.application import EXIT_FOUND, INT4, TRANSFER, AsJson, Dsn, Pipeline, app, session
from embedline.client.cli.export import counted, writing

_RESUME = "SELECT embedline.resume_pipeline(%s)"


@app.command("import", rich_help_panel=TRANSFER)
def import_vectors(
    dsn: Dsn,
    pipeline: Pipeline,
    file: Annotated[Path, typer.Argument(help="File that embedline export has written.", dir_okay=False)],
    version: Annotated[
        int | None, typer.Option(min=1, max=INT4, help="Number of the version; the serving one without it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the pipeline once all vectors are lent.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until chunks have taken what they can.")] = True,
    json: AsJson = False,
) -> None:
    """Give chunks of the same content the vectors of a file, without paying for them.

    The file's fingerprint must be the version's. Any other chunk is embedded as usual. Exit 3 if something still waits.
    """
    from embedline.client.transfer import importing, lending

    console = Console(stderr=True, highlight=False)
    with session(dsn) as connection, writing(file), counted(console) as show:
        recipe, given, lent = importing.lend_file(connection, pipeline, version, file, show)
        if resume:
            connection.execute(_RESUME, (pipeline,))
        result = lending.settle(connection, recipe, given, lent, show, waits=wait)
    tell(pipeline, result, json=json, waited=wait)


def tell(pipeline: str, result: object, *, json: bool, waited: bool, more: dict[str, object] | None = None) -> None:
    """Print the result of a loan; end with exit code 3 if something still waits."""
    from embedline.client.transfer.lending import Lent

    assert isinstance(result, Lent)
    if json:
        typer.echo(terminal.as_json({"pipeline": pipeline, **result.as_dict(), **(more or {})}))
    elif result.is_done:
        typer.echo(
            f"taken: {result.taken:,} of {result.lent:,} vectors; unmatched: {result.unmatched:,};"
            f" embedded by the model: {result.embedded:,} of {result.chunks:,} chunks."
        )
    elif result.is_paused:
        typer.echo(
            f"lent: {result.lent:,} vectors. Pipeline {pipeline} is paused; workers take them once it is resumed:"
        )
        typer.echo(f"  SELECT embedline.resume_pipeline('{pipeline}');")
    else:
        typer.echo(f"lent: {result.lent:,} vectors. Changes still wait: embedline status")
    if waited and not result.is_done:
        raise typer.Exit(EXIT_FOUND)
