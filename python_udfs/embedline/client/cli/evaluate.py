"""`embedline evaluate`: the verdict of a gate as exit code."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from embedline.client import evaluate_command
from embedline.client.cli.application import INT4, UPGRADE, AsJson, Dsn, Pipeline, app, session
from embedline.client.evaluate_command import VerdictCommand


@app.command("evaluate", cls=VerdictCommand, rich_help_panel=UPGRADE)
def evaluate(
    dsn: Dsn,
    pipeline: Pipeline,
    version: Annotated[int, typer.Option(min=1, max=INT4, help="Number of the version to measure.")],
    canaries: Annotated[
        str | None, typer.Option(help="Table of labelled queries; without it queries are made from the corpus.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, max=INT4, help="Documents that count of each ranking.")] = 10,
    margin: Annotated[float, typer.Option(help="Loss of nDCG that passes.")] = 0.01,
    query_count: Annotated[int, typer.Option(min=1, max=INT4, help="Queries to make from the corpus at most.")] = 500,
    breakdown: Annotated[str | None, typer.Option(help="Column of the source; each group has a row.")] = None,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of the random draws.")] = 0,
    min_recall: Annotated[float, typer.Option(help="Recall that the index must have.")] = 0.9,
    json: AsJson = False,
) -> None:
    """Measure a version against the serving one.

    Exit code 0: pass, 1: fail, 2: inconclusive, 3: not measured.
    """
    request = evaluate_command.Request(
        pipeline, version, canaries, k, margin, query_count, breakdown, seed, min_recall
    )  # fmt: skip
    try:
        with session(dsn) as connection:
            rows = evaluate_command.measure(connection, request, Console(stderr=True, highlight=False))
    except typer.Exit as end:
        raise typer.Exit(evaluate_command.EXIT_NOT_MEASURED if end.exit_code == 1 else end.exit_code) from None
    (evaluate_command.print_json if json else evaluate_command.print_table)(rows, request)
    raise typer.Exit(evaluate_command.EXIT_CODES[evaluate_command.verdict_of(rows)])
