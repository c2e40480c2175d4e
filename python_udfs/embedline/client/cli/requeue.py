"""`embedline requeue`: queue dead letters again."""

from __future__ import annotations

from typing import Annotated

import typer

from embedline.client import terminal
from embedline.client.cli.application import INT4, OPERATE, AsJson, Dsn, Pipeline, app, session

_REQUEUE = "SELECT embedline.requeue(%s, %s::jsonb, %s, %s)"
_REQUEUE_VERSION = "SELECT embedline.requeue_version(%s, %s::integer)"


@app.command(rich_help_panel=OPERATE)
def requeue(
    dsn: Dsn,
    pipeline: Pipeline,
    key: Annotated[str | None, typer.Option(help="Only the row of this key, as JSON: '{\"id\": 7}'.")] = None,
    error_code: Annotated[str | None, typer.Option(help="Only dead letters of this error code.")] = None,
    include_embedded: Annotated[
        bool, typer.Option("--include-embedded", help="Rows that have vectors by now, too.")
    ] = False,
    version: Annotated[
        int | None, typer.Option(min=1, max=INT4, help="Chunks that this version could not embed, instead of rows.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Queue dead letters again, all of a pipeline or some of them."""
    if version is not None and (key is not None or error_code is not None or include_embedded):
        raise typer.BadParameter(
            "a version's chunks are queued all together, without --key, --error-code and --include-embedded.",
            param_hint="--version",
        )
    with session(dsn) as connection:
        if version is None:
            row = connection.execute(_REQUEUE, (pipeline, key, error_code, include_embedded)).fetchone()
        else:
            row = connection.execute(_REQUEUE_VERSION, (pipeline, version)).fetchone()
    queued = 0 if row is None else int(row[0])
    unit = "row" if version is None else "chunk"
    if json:
        typer.echo(terminal.as_json({"pipeline": pipeline, "version": version, "queued": queued}))
    else:
        typer.echo(f"{queued:,} {unit}{'' if queued == 1 else 's'} of pipeline {pipeline} queued again.")
