"""`embedline estimate`: tell what embedding costs before it is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from embedline.client import terminal
from embedline.client.cli.application import INT4, OBSERVE, AsJson, Dsn, app, rows_as_json, session

_ESTIMATE = """
    SELECT figure, value, low, high, unit, note
    FROM embedline.estimate(%s, model => %s, content => %s, sample_rows => %s::integer)
"""
_COMPARE = "SELECT way, figure, value, low, high, unit, note FROM embedline.compare_costs({arguments})"
# Columns of a line of prose that can be read in one go.
_READABLE = 100
_WAYS = ("hosted", "own", "hybrid")


@app.command(rich_help_panel=OBSERVE)
def estimate(
    dsn: Dsn,
    subject: Annotated[str, typer.Argument(help="Name of a pipeline, or of a table that has none yet.")],
    model: Annotated[str | None, typer.Option(help="Registered model; that of the pipeline without it.")] = None,
    content: Annotated[
        str | None, typer.Option(help="SQL expression of the text; for a table without pipeline.")
    ] = None,
    sample_rows: Annotated[int, typer.Option(min=1, max=INT4, help="Rows to read about.")] = 1000,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare ways to embed; each option below implies it.")
    ] = False,
    hosted_model: Annotated[str | None, typer.Option(help="Model of the hosted service; --model without it.")] = None,
    own_model: Annotated[str | None, typer.Option(help="Model of the own machine; --model without it.")] = None,
    machine_price_per_hour: Annotated[float | None, typer.Option(help="Price of an hour of the own machine.")] = None,
    documents_per_day: Annotated[float | None, typer.Option(help="Documents written or changed a day.")] = None,
    bulk_share: Annotated[float | None, typer.Option(help="Share of them that may wait, 0 to 1.")] = None,
    batch_discount: Annotated[float | None, typer.Option(help="Share that batches are cheaper, 0 to 1.")] = None,
    queries_per_second: Annotated[float | None, typer.Option(help="Searches a second on average.")] = None,
    tokens_per_query: Annotated[float | None, typer.Option(help="Tokens of a search's text; 16 without it.")] = None,
    search_milliseconds: Annotated[float | None, typer.Option(help="Time of one search in the database.")] = None,
    storage_price_per_gigabyte: Annotated[float | None, typer.Option(help="Price of 1 GB for a month.")] = None,
    price_per_million_tokens: Annotated[float | None, typer.Option(help="Instead of the model's price.")] = None,
    own_tokens_per_second: Annotated[float | None, typer.Option(help="Instead of the model's speed.")] = None,
    json: AsJson = False,
) -> None:
    """Estimate tokens, money, bytes and hours; compare ways to embed."""
    asked = {
        "hosted_model": hosted_model, "own_model": own_model, "machine_price_per_hour": machine_price_per_hour,
        "documents_per_day": documents_per_day, "bulk_share": bulk_share, "batch_discount": batch_discount,
        "queries_per_second": queries_per_second, "tokens_per_query": tokens_per_query,
        "search_milliseconds": search_milliseconds, "storage_price_per_gigabyte": storage_price_per_gigabyte,
        "price_per_million_tokens": price_per_million_tokens, "own_tokens_per_second": own_tokens_per_second,
    }  # fmt: skip
    named: dict[str, str | float | None] = {name: value for name, value in asked.items() if value is not None}
    comparison: list[dict[str, Any]] | None = None
    with session(dsn) as connection:
        own = model or own_model or hosted_model
        found = rows_as_json(connection, _ESTIMATE, (subject, own, content, sample_rows))
        if compare or named:
            named = {"hosted_model": model, "own_model": model, "content": content, **named}
            arguments = ", ".join(
                f"{name} => %s{'::numeric' if isinstance(value, float) else ''}" for name, value in named.items()
            )
            arguments = f"%s, sample_rows => {sample_rows}, {arguments}"
            comparison = rows_as_json(connection, _COMPARE.format(arguments=arguments), (subject, *named.values()))
    if json:
        typer.echo(terminal.as_json({"estimate": found, "comparison": comparison}))
        return
    typer.echo(_figures(found, terminal.width()))
    if comparison is not None:
        typer.echo("\n" + _compared(comparison, terminal.width()))


def _figures(found: Sequence[dict[str, Any]], columns: int | None) -> str:
    """Return the figures as a table.

    If that is too wide, each has its note below it.
    """
    head = ("figure", "value", "low", "high", "unit", "note")
    rows = [
        [row["figure"], *map(_number, (row["value"], row["low"], row["high"])), row["unit"], row["note"]]
        for row in found
    ]
    if columns is None:
        return terminal.table(head, rows, None)
    wide = terminal.table(head, rows, None)
    if max(map(terminal.cells, wide.splitlines())) <= columns:
        return wide
    name = max(map(len, (row["figure"] for row in found))) + terminal.GAP_CELLS
    lines = []
    for figure, value, low, high, unit, note in rows:
        interval = f" ({low} to {high})" if low != high else ""
        told = f"{value} {unit}{interval}" if value else "not known"
        lines += [
            terminal.hanging(figure.ljust(name), told, columns),
            terminal.hanging(" " * name, note, min(columns, _READABLE)),
        ]
    return "\n".join(lines)


def _compared(found: Sequence[dict[str, Any]], columns: int | None) -> str:
    """Return a row for each figure and a column for each way.

    Below it are the figures of no single way, and the reasons of missing ones.
    """
    values = {(row["way"], row["figure"]): _number(row["value"]) for row in found}
    units = {row["figure"]: row["unit"] for row in found if row["way"] in _WAYS}
    rows = [(figure, *(values.get((way, figure), "") for way in _WAYS), unit) for figure, unit in units.items()]
    parts = [terminal.table(("figure", *_WAYS, "unit"), rows, columns)]
    readable = None if columns is None else min(columns, _READABLE)
    for row in found:
        value = _number(row["value"])
        if row["way"] in _WAYS and value:
            continue
        said = f"{value} {row['unit']}: {row['note']}" if value else row["note"]
        line = f"{row['way']}, {row['figure']}: {said}"
        parts.append(line if readable is None else terminal.hanging("", line, readable))
    return "\n".join(parts)


def _number(value: float | None) -> str:
    """Return a number with its thousands apart."""
    return "" if value is None else f"{value:,}"
