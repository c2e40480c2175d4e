"""`embedline finetune` and `embedline retrain`: a model of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from embedline.client import terminal
from embedline.client.cli.application import EXIT_FOUND, UPGRADE, AsJson, Dsn, Pipeline, app, fail, session
from embedline.client.connection import lines
from embedline.client.evaluate_command import EXIT_NOT_MEASURED, VerdictCommand

if TYPE_CHECKING:
    from embedline.client.training.finetune import Finetuned, Report

_CODES = {"gain": 0, "loss": 1, "inconclusive": 2}
_SEED = 2**63 - 1


@app.command("finetune", cls=VerdictCommand, rich_help_panel=UPGRADE)
def finetune(
    dsn: Dsn,
    pipeline: Pipeline,
    base: Annotated[str, typer.Option(help="Registered model to train further.")],
    pairs: Annotated[str, typer.Option(help="Table of pairs: query, key; also grade, source, at.")],
    name: Annotated[str, typer.Option(help="Name of the new model, and of its directory.")],
    seed: Annotated[int, typer.Option(min=0, max=_SEED, help="Of the split and of the training.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Times that each pair is trained on.")] = 3,
    learning_rate: Annotated[float | None, typer.Option(help="2e-5, or 2e-2 for a static model, without it.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, max=65_536, help="Pairs of a step; 64, or 256 for a static model, without it.")
    ] = None,
    negatives: Annotated[int, typer.Option(min=0, max=50, help="Hard negatives of a pair.")] = 5,
    held_out: Annotated[float, typer.Option(help="Share of the queries that measure and do not train.")] = 0.2,
    corpus: Annotated[int, typer.Option(min=100, help="Chunks that the queries are ranked over at most.")] = 50_000,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; without it a GPU if there is one.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to put the model's into; the base's without it.")
    ] = None,
    model_path: Annotated[str | None, typer.Option(help="The model's directory as the server sees it.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again where an unfinished run is.")] = False,
    json: AsJson = False,
) -> None:
    """Train a registered model further on pairs, and register the result.

    Exit code 0: gain, 1: loss (not registered), 2: inconclusive, 3: not trained. The same command goes on with a killed run.
    """
    from embedline.client.training import finetune as work
    from embedline.client.training.request import Request

    try:
        with session(dsn) as connection, _told(), shown() as report:
            request = Request(
                pipeline, base, pairs, name, seed, epochs, learning_rate, batch_size, negatives, held_out, corpus, device,
                output, model_path, restart,
            )  # fmt: skip
            done = work.finetune(connection, request, report)
    except typer.Exit as end:
        raise typer.Exit(EXIT_NOT_MEASURED if end.exit_code == 1 else end.exit_code) from None
    if json:
        typer.echo(terminal.as_json(asdict(done)))
    else:
        _tell(done, pipeline)
    raise typer.Exit(_CODES[done.outcome])


@app.command("retrain", rich_help_panel=UPGRADE)
def retrain(
    dsn: Dsn,
    name: Annotated[str, typer.Argument(help="Model that embedline finetune has made.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; without it a GPU if there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory to train in; the model's without it.")] = None,
    json: AsJson = False,
) -> None:
    """Make a fine-tuned model again from its lineage and compare the weights.

    Nothing is registered. Exit code 0: the same bit for bit, 3: it differs.
    """
    from embedline.client.training import retrain as work

    with session(dsn) as connection, _told(), shown() as report:
        done = work.retrain(connection, name, output, device, report)
    if json:
        typer.echo(terminal.as_json(work.as_dict(done)))
    elif done.is_same:
        typer.echo(f"{name}: the same weights, bit for bit ({done.weights[:16]}…)")
    else:
        typer.echo(f"{name}: other weights ({done.weights[:16]}…), kept in {done.path}. What differs:")
        for difference in done.differences:
            typer.echo(f"  {difference}")
    if not done.is_same:
        raise typer.Exit(EXIT_FOUND)


@contextmanager
def _told() -> Iterator[None]:
    """End the command with an error of the disk in one sentence."""
    try:
        yield
    except OSError as error:
        fail(lines(str(error), None, "The same command goes on from the last whole checkpoint."))


@contextmanager
def shown() -> Iterator[Report]:
    """Show the steps of a training as a bar on a terminal, as a line a step elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        told: set[str] = set()

        def tell(step: str, done: int, total: int) -> None:
            if step not in told:
                told.add(step)
                console.print(f"{step}…", markup=False)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def advance(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield advance


def _tell(done: Finetuned, pipeline: str) -> None:
    for note in done.notes:
        typer.echo(note)
    if done.resumed_from is not None:
        typer.echo(f"The run went on from step {done.resumed_from}.")
    queries = done.metrics["queries"]
    typer.echo(f"{done.name}: {done.base} trained on {done.trained_queries:,} queries in {done.examples:,} examples.")
    rows = [
        (
            name,
            _figure(m["before"]),
            _figure(m["after"]),
            f"{m['difference']:+.3f}",
            _interval(m["difference_interval"]),
        )
        for name, m in done.metrics.items()
        if name != "queries"
    ]
    typer.echo(
        terminal.table(
            (f"{queries:,} held-out queries", "before", "after", "difference", "95 % interval"), rows, terminal.width()
        )
    )
    typer.echo(_OUTCOMES[done.outcome].format(decide=_queries_to_decide(done)))
    if done.outcome == "loss":
        return
    typer.echo(f"Registered as {done.name}, from {done.path}; pairs {done.pairs_hash[:16]}…. It serves nothing yet:")
    typer.echo(f"  SELECT embedline.add_embedding_version('{pipeline}', '{done.name}');")


_OUTCOMES = {
    "gain": "gain: the new model ranks the held-out queries better.",
    "loss": "loss: the new model ranks the held-out queries worse. It is not registered.",
    "inconclusive": "inconclusive: these queries show no gain. Keep the base, or come back with more pairs{decide}.",
}


def _queries_to_decide(done: Finetuned) -> str:
    needed = done.metrics["ndcg@10"].get("queries_to_decide")
    return f"; about {needed:,} held-out queries would decide" if needed else ""


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"
