"""`embedline remote-worker`: embed a pipeline outside its database."""

from __future__ import annotations

import contextlib
import signal
from typing import Annotated

import psycopg
import typer

from embedline.client import metrics_server
from embedline.client.cli.application import EXIT_FAILED, OPERATE, Dsn, app, fail
from embedline.client.connection import lines, resolve, server_message
from embedline.errors import EmbedlineError


@app.command(name="remote-worker", rich_help_panel=OPERATE)
def remote_worker(
    pipeline: Annotated[str, typer.Argument(help="The pipeline to embed; its owner has granted it to the login.")],
    dsn: Dsn,
    version: Annotated[int | None, typer.Option(help="Only this version of it.")] = None,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="End when nothing waits any more.")] = False,
    requests: Annotated[
        int | None, typer.Option(help="Requests in flight at the model; as many again are fetched meanwhile.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Rows of one claim at most.")] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS:PORT", help="Serve this worker's own counts to Prometheus at /metrics."),
    ] = None,
) -> None:
    """Embed a pipeline in this process, outside its database.

    It claims texts, embeds them with the registered model, and hands the vectors back.
    Connect as a login in the role embedline_remote, to the server itself. Ctrl-C or SIGTERM ends it once what is in flight
    is written.
    """
    from embedline.remote import Worker

    def say(message: str) -> None:
        typer.echo(message, err=True)

    try:
        worker = Worker(resolve(dsn), pipeline, version=version, requests=requests, max_rows=max_rows, say=say)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: worker.stop())
        with contextlib.ExitStack() as stack:
            if listen is not None:
                address = metrics_server.parse_address(listen)
                stack.enter_context(metrics_server.serving(address, worker.totals.metrics, say))
            totals = worker.run(until_empty=until_empty)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        fail(f"cannot listen on {listen}: {error.strerror or error}")
    except psycopg.Error as error:
        fail(server_message(error) or str(error))
    except EmbedlineError as error:
        fail(lines(error.message, error.detail, error.hint))
    typer.echo(f"{totals}, in {totals.seconds:.1f} s")
    if totals.failed_requests:
        raise typer.Exit(EXIT_FAILED)
