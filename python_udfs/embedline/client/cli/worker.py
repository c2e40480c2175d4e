"""`embedline worker`: embed in a session of the database."""

from __future__ import annotations

from typing import Annotated

import psycopg
import typer
from rich.console import Console

from embedline.client.build_index import PsycopgClient, SessionNotKept, is_behind_pool
from embedline.client.cli.application import EXIT_FAILED, OPERATE, Dsn, app, session
from embedline.client.live_display import shown
from embedline.client.worker_display import WorkerDisplay, troubles


@app.command(rich_help_panel=OPERATE)
def worker(
    dsn: Dsn,
    pipeline: Annotated[str | None, typer.Option(help="Only this pipeline.")] = None,
    max_seconds: Annotated[float, typer.Option(help="End after so many seconds.")] = 1200.0,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when nothing waits any more.")] = False,
) -> None:
    """Run a worker in a session of the database: CALL embedline.run_worker().

    Stop it with Ctrl-C. With --until-idle it shows its progress, and ends with exit code 1 if something could not be
    embedded.
    """
    display, console = WorkerDisplay(pipeline), Console(stderr=True, highlight=False)
    with session(dsn) as connection:
        client = PsycopgClient(connection)
        if not until_idle and is_behind_pool(client):
            # It would hold one of the pool's connections while it runs. A time limit of the pool would end this command,
            # but not the worker in the server. A supervisor would then start another one beside it.
            raise SessionNotKept(
                hint="Connect a worker to the server itself, past the pool."
                " With --until-idle it runs through the pool, because it ends."
            )
        with shown(client, display.look, console, lines=until_idle) as tell:

            def hear(notice: psycopg.errors.Diagnostic) -> None:
                if not display.hear(notice.message_primary or ""):
                    tell(notice.message_primary or "")

            connection.add_notice_handler(hear)
            call = (
                "CALL embedline.run_worker(max_seconds => %s::float8, pipeline_name => %s::text,"
                " until_idle => %s::boolean)"
            )
            connection.execute(call, (max_seconds, pipeline, until_idle))
        if until_idle:
            tasks = display.tasks(client.execute)
            typer.echo(display.summary(tasks))
            found = troubles(client.execute, tasks)
            for trouble in found:
                typer.echo(f"error: {trouble}", err=True)
            if found:
                raise typer.Exit(EXIT_FAILED)
