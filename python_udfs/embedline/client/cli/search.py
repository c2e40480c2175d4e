"""`embedline search`: the best chunks for a text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from embedline.client import terminal
from embedline.client.cli.application import INT4, OBSERVE, AsJson, Dsn, Pipeline, app, rows_as_json, session

_SEARCH = (
    "SELECT score, semantic_rank, keyword_rank, key, chunk, chunk_start, chunk_end"
    " FROM embedline.search(%s, %s, k => %s::integer, per_document => %s,"
    " ef_search => %s::integer, tenant => %s, mode => %s, reranker => %s, filter => %s, explain => %s)"
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
    mode: Annotated[
        str | None, typer.Option(help="vector, keyword or hybrid; without it as the pipeline is set.")
    ] = None,
    condition: Annotated[
        str | None, typer.Option("--filter", help="SQL condition over the source's columns, such as \"lang = 'en'\".")
    ] = None,
    reranker: Annotated[
        str | None, typer.Option(help="Model of task rerank that orders the best chunks again.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the plans of the statements instead.")] = False,
    json: AsJson = False,
) -> None:
    """Show the best chunks for a text: score, ranks, key and the start of the text."""
    asked = (pipeline, query, k, per_document, ef_search, tenant, mode, reranker, condition, explain)
    with session(dsn) as connection:
        found = rows_as_json(connection, _SEARCH, asked)
    if json:
        typer.echo(terminal.as_json(found))
        return
    if explain:
        typer.echo("\n".join(row["chunk"] for row in found))
        return
    if not found:
        told = "nothing for this search" if condition or mode else "nothing to find yet"
        typer.echo(f"Pipeline {pipeline} has {told}: embedline status", err=True)
        return
    typer.echo(_laid_out(found, terminal.width()))


def _laid_out(found: list[dict[str, Any]], columns: int | None) -> str:
    """Return a table whose texts end at the edge of the terminal.

    Ranks are shown if keywords took part; without them the place in the list says as much.
    """
    ranks = ("semantic_rank", "keyword_rank") if any(row["keyword_rank"] for row in found) else ()
    head = ("score", *(name.removesuffix("_rank") for name in ranks), "key")
    texts = [terminal.one_line(row["chunk"]) for row in found]
    rows = [(f"{row['score']:.4f}", *(str(row[name] or "-") for name in ranks), str(row["key"])) for row in found]
    if columns is None:
        return _table(head, rows, [terminal.start(text, _PIPE_TEXT) for text in texts], None)
    widths = [max(terminal.cells(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    room = columns - sum(widths) - len(widths) * terminal.GAP_CELLS
    if room >= _NARROWEST_TEXT:
        return _table(head, rows, [terminal.start(text, room) for text in texts], columns)
    return "\n".join(
        f"{'  '.join(row)}\n  {terminal.start(text, columns - 2)}" for row, text in zip(rows, texts, strict=True)
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], texts: list[str], columns: int | None) -> str:
    return terminal.table((*head, "text"), [(*row, text) for row, text in zip(rows, texts, strict=True)], columns)
