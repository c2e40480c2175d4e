"""`embedline ray-backfill`: embed what waits with a fleet of Ray's actors."""

from __future__ import annotations

from typing import Annotated

import psycopg
import typer
from rich.console import Console
from rich.progress import Progress

from embedline.client.cli.application import EXIT_FAILED, OPERATE, Dsn, app, fail
from embedline.client.connection import lines, resolve, server_message
from embedline.errors import EmbedlineError


@app.command(name="ray-backfill", rich_help_panel=OPERATE)
def ray_backfill(
    pipeline: Annotated[str, typer.Argument(help="The pipeline to embed; its owner has granted it to the login.")],
    dsn: Dsn,
    version: Annotated[int | None, typer.Option(help="Only this version of it.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Actors, each a remote worker.")] = 1,
    num_gpus: Annotated[float, typer.Option(help="GPUs of each actor.")] = 0.0,
    num_cpus: Annotated[float, typer.Option(help="Cores of each actor.")] = 1.0,
    requests: Annotated[int | None, typer.Option(help="Requests in flight of each actor.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A running cluster, such as auto or ray://head:10001; else this machine.")
    ] = None,
) -> None:
    """Embed what waits with a fleet of Ray's actors, and end.

    An actor that dies is started again. Needs the extra ray: pip install 'embedline[ray]'.
    """
    from embedline.remote.ray_backfill import Fleet, backfill

    try:
        fleet = Fleet(resolve(dsn), pipeline, version, workers, num_gpus, num_cpus, requests, address)
        with Progress(console=Console(stderr=True)) as progress:
            left = backfill(fleet, say=lambda message: typer.echo(message, err=True), progress=progress)
    except psycopg.Error as error:
        fail(server_message(error) or str(error))
    except EmbedlineError as error:
        fail(lines(error.message, error.detail, error.hint))
    typer.echo("Nothing waits." if not left else f"{left:,} wait: they came meanwhile, or cannot be embedded.")
    if left:
        raise typer.Exit(EXIT_FAILED)
