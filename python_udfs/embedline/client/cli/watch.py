"""`embedline watch`: follow embedline.progress by bars or plain lines."""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from embedline.client.cli.application import OBSERVE, Dsn, app, rows_as_json, session
from embedline.client.connection import Connection
from embedline.client.progress_display import Bars, Lines, Task

_PROGRESS = """
    SELECT pipeline, version, task, phase, done, total, unit, percent, rate, extract(epoch FROM eta) AS eta_seconds,
        tokens, money
    FROM embedline.progress WHERE pipeline = %s OR %s::text IS NULL ORDER BY pipeline, version, task
"""
# Seconds between two queries.
_TERMINAL_SECONDS, _PIPE_SECONDS = 0.5, 5.0
# Largest share of the time for queries, because a long queue is counted.
_COST_SHARE = 0.1


@app.command(rich_help_panel=OBSERVE)
def watch(
    dsn: Dsn,
    pipeline: Annotated[str | None, typer.Option(help="Only this pipeline.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show the progress now, and end.")] = False,
    interval: Annotated[
        float | None, typer.Option(min=0.1, max=3600, help="Seconds between two lines; 5, on a terminal 0.5.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: one array a line.")] = False,
) -> None:
    """Show what is in progress until it is done.

    It may be a backfill, waiting changes, a version that is filled, an index that is built, or an evaluation.
    """
    is_bar = sys.stdout.isatty() and not json
    seconds = interval or (_TERMINAL_SECONDS if is_bar else _PIPE_SECONDS)
    with session(dsn) as connection:
        found = _followed(connection, pipeline, seconds, once)
        if json:
            for rows in found:
                typer.echo(json_format.dumps(rows, ensure_ascii=False))
            return
        (Bars(once) if is_bar else Lines()).show(map(_tasks, found))


def _followed(
    connection: Connection, pipeline: str | None, seconds: float, once: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of the view until there is none."""
    while True:
        began = time.monotonic()
        rows = rows_as_json(connection, _PROGRESS, (pipeline, pipeline))
        yield rows
        if once or not rows:
            return
        time.sleep(max(seconds, (time.monotonic() - began) / _COST_SHARE))


def _tasks(rows: list[dict[str, Any]]) -> list[Task]:
    return [Task(**row) for row in rows]
