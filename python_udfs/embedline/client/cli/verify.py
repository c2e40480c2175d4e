"""`embedline verify`: compare a pipeline with its source, and repair it."""

from __future__ import annotations

from typing import Annotated

import typer

from embedline.client import terminal
from embedline.client.cli.application import (
    EXIT_FOUND,
    INT4,
    OPERATE,
    AsJson,
    Dsn,
    Pipeline,
    app,
    rows_as_json,
    session,
)

_VERIFY = "SELECT finding, count, repaired, example FROM embedline.verify(%s, %s, %s::integer)"


@app.command(rich_help_panel=OPERATE)
def verify(
    dsn: Dsn,
    pipeline: Pipeline,
    repair: Annotated[bool, typer.Option("--repair", help="Put right what can be.")] = False,
    sample: Annotated[
        int, typer.Option(min=0, max=INT4, help="Chunks that the model is asked for again; 0: none.")
    ] = 20,
    json: AsJson = False,
) -> None:
    """Compare a pipeline with its source; exit 3 if a difference is not repaired."""
    with session(dsn) as connection:
        found = rows_as_json(connection, _VERIFY, (pipeline, repair, sample))
    if json:
        typer.echo(terminal.as_json(found))
    elif found:
        cells = [
            (
                row["finding"],
                "not checked" if row["count"] is None else row["count"],
                row["repaired"],
                terminal.one_line(row["example"]),
            )
            for row in found
        ]
        typer.echo(terminal.table(("finding", "count", "repaired", "example"), cells, terminal.width()))
    else:
        typer.echo(f"Pipeline {pipeline} is what its source asks for.")
    if any(_is_amiss(row["finding"], row["count"], row["repaired"]) for row in found):
        raise typer.Exit(EXIT_FOUND)


def _is_amiss(finding: str, count: int | None, repaired: int) -> bool:
    """Return True if a finding asks for a person; waiting changes do not."""
    return finding != "pending" and (count is None or repaired < count)
