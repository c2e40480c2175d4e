"""`embedline status`: each pipeline in one row."""

from __future__ import annotations

import typer

from embedline.client import terminal
from embedline.client.cli.application import OBSERVE, AsJson, Dsn, app, rows_as_json, session

_STATUS = """
    SELECT pipeline, source, model, state, pending,
        CASE WHEN backfill_complete THEN 'complete'
            ELSE trim_scale(backfill_percent) || ' % of ' || backfill_total || ' blocks' END AS backfill,
        date_trunc('second', oldest_pending_age) AS oldest, dead_letters AS dead, index_state AS index,
        workers_alive AS workers, last_error
    FROM embedline.status ORDER BY pipeline
"""


@app.command(rich_help_panel=OBSERVE)
def status(dsn: Dsn, json: AsJson = False) -> None:
    """Show each pipeline: waiting changes, progress of the backfill, the last error."""
    with session(dsn) as connection:
        if json:
            typer.echo(terminal.as_json(rows_as_json(connection, "SELECT * FROM embedline.status ORDER BY pipeline")))
            return
        cursor = connection.execute(_STATUS)
        columns, found = [column.name for column in cursor.description or ()], cursor.fetchall()
    if found:
        typer.echo(terminal.table(columns, found, terminal.width()))
    else:
        typer.echo("There is no pipeline yet: SELECT embedline.create_pipeline(name, source, content, model);")
