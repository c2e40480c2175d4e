"""`embedline metrics`: print the metrics, or serve them to Prometheus."""

from __future__ import annotations

from typing import Annotated

import typer

from embedline.client import metrics_server
from embedline.client.cli.application import OBSERVE, Dsn, app, fail, session
from embedline.client.connection import lines, resolve
from embedline.errors import EmbedlineError


@app.command(rich_help_panel=OBSERVE)
def metrics(
    dsn: Dsn,
    listen: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="Serve them at /metrics, for example 127.0.0.1:9187.")
    ] = None,
) -> None:
    """Print the metrics in Prometheus' text format, or serve them.

    Served, a database that is away gives status 503 and embedline_up 0.
    """
    if listen is None:
        with session(dsn) as connection:
            typer.echo(metrics_server.scrape(connection), nl=False)
        return
    try:
        address = metrics_server.parse_address(listen)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        resolve(dsn)
        metrics_server.serve(dsn, address, lambda text: typer.echo(text, err=True))
    except EmbedlineError as error:
        fail(lines(error.message, error.detail, error.hint))
    except OSError as error:
        fail(f"cannot listen on {listen}: {error.strerror or error}")
