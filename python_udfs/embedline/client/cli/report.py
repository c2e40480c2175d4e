"""`embedline report`: the figures of a period as one HTML file."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from embedline.client.cli.application import OBSERVE, AsJson, Dsn, app, fail, session
from embedline.client.connection import lines

_DEFAULT_OUTPUT = Path("report.html")


@app.command(rich_help_panel=OBSERVE)
def report(
    dsn: Dsn,
    output: Annotated[
        Path | None, typer.Option(help="File to write; report.html, and with --json none.", show_default=False)
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=365, help="Days of the period, which ends now.")] = 30,
    json: AsJson = False,
) -> None:
    """Write a report as one HTML file: alerts, throughput, recall, upgrades, spend.

    No text, key or vector of a source is in it.
    """
    from embedline.client.report import figures, page, read

    with session(dsn) as connection:
        found = read.read(connection, days)
    if json:
        typer.echo(json_format.dumps(asdict(found), indent=2, ensure_ascii=False, default=figures.as_plain))
    path = output if json else output or _DEFAULT_OUTPUT
    if path is None:
        return
    try:
        page.write(path, page.render(found))
    except OSError as error:
        fail(lines(f"{path} cannot be written: {error.strerror}", None, "embedline report --output FILE"))
    if not json:
        typer.echo(f"{path}: the last {days} days; open it in a browser.")
