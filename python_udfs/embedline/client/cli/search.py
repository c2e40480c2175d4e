"""`embedline search`: the nearest chunks to a text."""

from __future__ import annotations

from typing import Annotated

import typer

from embedline.client import terminal
from embedline.client.cli.application import INT4, OBSERVE, AsJson, Dsn, Pipeline, app, rows_as_json, session

_SEARCH = (
    "SELECT score, key, chunk FROM embedline.search(%s, %s, k => %s::integer, per_document => %s,"
    " ef_search => %s::integer, tenant => %s)"
)
# Characters of each text that a pipe gets. A terminal gets as many as fit its line.
_PIPE_TEXT = 200
# Columns of text below which a table is of no use; the text has a line of its own then.
_NARROWEST_TEXT = 24


@app.command(rich_help_panel=OBSERVE)
def search(
    dsn: Dsn,
    pipeline: Pipeline,
    query: Annotated[str, typer.Argument(help="Text to search for.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=INT4, help="Chunks to return at most.")] = 10,
    per_document: Annotated[
        bool, typer.Option("--per-document", help="Only the best chunk of each row of the source.")
    ] = False,
    ef_search: Annotated[
        int | None, typer.Option(min=1, max=INT4, help="hnsw.ef_search; as measured without it.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant whose version answers while traffic is shared.")] = None,
    json: AsJson = False,
) -> None:
    """Show the nearest chunks to a text: score, key and the start of the text."""
    with session(dsn) as connection:
        found = rows_as_json(connection, _SEARCH, (pipeline, query, k, per_document, ef_search, tenant))
    if json:
        typer.echo(terminal.as_json(found))
        return
    if not found:
        typer.echo(f"Pipeline {pipeline} has nothing to find yet: embedline status", err=True)
        return
    rows = [(f"{row['score']:.4f}", row["key"], terminal.one_line(row["chunk"])) for row in found]
    typer.echo(_laid_out(rows, terminal.width()))


def _laid_out(rows: list[tuple[str, str, str]], columns: int | None) -> str:
    """Return a table whose texts end at the edge of the terminal."""
    head = ("score", "key", "text")
    if columns is None:
        return terminal.table(head, [(s, key, terminal.start(text, _PIPE_TEXT)) for s, key, text in rows], None)
    widths = [max(terminal.cells(cell) for cell in column) for column in zip(head, *rows, strict=True)][:2]
    room = columns - sum(widths) - 2 * terminal.GAP_CELLS
    if room >= _NARROWEST_TEXT:
        return terminal.table(head, [(s, key, terminal.start(text, room)) for s, key, text in rows], columns)
    return "\n".join(f"{s}  {key}\n  {terminal.start(text, columns - 2)}" for s, key, text in rows)
