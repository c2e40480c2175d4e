"""`embedline doctor`: check the server."""

from __future__ import annotations

import typer

from embedline.client import terminal
from embedline.client.cli.application import EXIT_FAILED, OBSERVE, AsJson, Dsn, app, session
from embedline.client.doctor.examine import as_json, examine


@app.command(rich_help_panel=OBSERVE)
def doctor(dsn: Dsn, json: AsJson = False) -> None:
    """Check the server for Embedline's needs and known troubles; exit 1 on an error."""
    with session(dsn) as connection:
        found = examine(connection)
    typer.echo(as_json(found) if json else terminal.findings(found, terminal.width()))
    if any(finding.verdict == "error" for finding in found):
        raise typer.Exit(EXIT_FAILED)
