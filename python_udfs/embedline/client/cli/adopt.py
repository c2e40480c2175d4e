"""`embedline adopt`: the vectors of another tool's table into a pipeline."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from embedline.client import terminal
from embedline.client.cli.application import INT4, TRANSFER, AsJson, Dsn, Pipeline, app, session
from embedline.client.cli.export import counted
from embedline.client.cli.import_vectors import tell


@app.command(rich_help_panel=TRANSFER)
def adopt(
    dsn: Dsn,
    pipeline: Pipeline,
    table: Annotated[str, typer.Argument(help="Table or view with texts and vectors, such as pgai's store.")],
    model: Annotated[str, typer.Option(help="Registered model that made the vectors.")],
    chunk: Annotated[str, typer.Option(help="Column of the texts.")] = "chunk",
    embedding: Annotated[str, typer.Option(help="Column of the vectors.")] = "embedding",
    source: Annotated[str | None, typer.Option(help="Table of a pipeline that is to be created.")] = None,
    content: Annotated[str | None, typer.Option(help="SQL expression of its content.")] = None,
    chunking: Annotated[str | None, typer.Option(help="Its chunking; none keeps each row's text whole.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(min=1, max=INT4, help="Tokens of its chunks.")] = None,
    chunk_overlap: Annotated[int | None, typer.Option(min=0, max=INT4, help="Tokens that its chunks share.")] = None,
    sample: Annotated[int, typer.Option(min=1, max=1000, help="Texts that the model is asked for, to compare.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Take vectors that are not the model's.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell how many chunks would find a vector.")] = False,
    json: AsJson = False,
) -> None:
    """Give chunks the vectors that another tool has for the same text.

    The pipeline is created if --source and --content are given. Any other chunk is embedded as usual. Exit 3 if something
    still waits.
    """
    from embedline.client.transfer import adopting

    request = adopting.Request(
        pipeline, table, model, chunk, embedding, adopting.NewPipeline(source, content, chunking, chunk_tokens, chunk_overlap),
        sample, is_forced=force, is_trial=dry_run,
    )  # fmt: skip
    console = Console(stderr=True, highlight=False)
    with session(dsn) as connection, counted(console) as show:
        found = adopting.adopt(connection, request, show)
    if found.skipped and not json:
        typer.echo(f"left out: {found.skipped}", err=True)
    if found.result is None:
        if json:
            typer.echo(terminal.as_json({"pipeline": pipeline, **found.as_dict()}))
        else:
            typer.echo(
                f"{found.matching:,} of {found.compared:,} chunks of a sample of the source find a vector in {table}."
                " Nothing was changed."
            )
        return
    tell(pipeline, found.result, json=json, waited=True, more=found.as_dict())
