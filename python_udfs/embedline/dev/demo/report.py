"""End a demo with its report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from embedline.client.connection import connect
from embedline.client.report import page, read
from embedline.dev.demo.run import headline

# A demo takes minutes, so the steps of its report are hours.
_DAYS = 1


def write_report(dsn: str, path: Path, console: Console) -> None:
    """Write a report of the database and say where it is."""
    path.parent.mkdir(exist_ok=True)
    with connect(dsn) as connection:
        page.write(path, page.render(read.read(connection, _DAYS)))
    headline(console, "The report of this database, as embedline report writes it; open it in a browser")
    console.print(f"  [green]{escape(path.resolve().as_uri())}[/green]", soft_wrap=True)
