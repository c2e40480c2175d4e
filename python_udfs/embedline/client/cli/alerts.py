"""`embedline alerts`: what is wrong now, and which statement mends it."""

from __future__ import annotations

from typing import Any

import typer

from embedline.client import terminal
from embedline.client.cli.application import EXIT_FOUND, OBSERVE, AsJson, Dsn, app, rows_as_json, session

_ALERTS = """
    SELECT severity, alert, subject, date_trunc('second', since) AS since, message, remedy FROM embedline.alert
    ORDER BY array_position(ARRAY['critical', 'warning', 'note'], severity), alert.since, alert, subject
"""
_COLOURS = {"critical": "red", "warning": "yellow", "note": "cyan"}


@app.command(rich_help_panel=OBSERVE)
def alerts(dsn: Dsn, json: AsJson = False) -> None:
    """Show what is wrong now; exit 3 if anything is critical or a warning."""
    with session(dsn) as connection:
        found = rows_as_json(connection, _ALERTS)
    columns = terminal.width()
    if json:
        typer.echo(terminal.as_json(found))
    elif not found:
        typer.echo("Nothing is wrong.")
    elif columns is None:
        names = ("severity", "alert", "subject", "since", "message", "remedy")
        typer.echo(terminal.table(names, [[row[name] for name in names] for row in found], None))
    else:
        typer.echo("\n".join(_laid_out(row, columns) for row in found))
    if any(row["severity"] in ("critical", "warning") for row in found):
        raise typer.Exit(EXIT_FOUND)


def _laid_out(row: dict[str, Any], columns: int) -> str:
    """Return an alert as prose, and its remedy whole, to be copied."""
    severity = row["severity"].ljust(len("critical"))
    indent = " " * (len(severity) + terminal.GAP_CELLS)
    subject = f" ({row['subject']})" if row["subject"] else ""
    since = f", since {str(row['since'])[:16].replace('T', ' ')}" if row["since"] else ""
    told = terminal.hanging(indent, f"{row['alert']}{subject}{since}: {row['message']}", columns)
    remedy = f"\n{indent}  {row['remedy']}" if row["remedy"] else ""
    return f"{typer.style(severity, fg=_COLOURS.get(row['severity']))}{told[len(severity) :]}{remedy}"
