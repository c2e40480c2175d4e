"""Steps that the demos of versions have in common."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from embedline.client.build_index import PsycopgClient, build
from embedline.dev.demo.run import headline, scalar


def store_terms(connection: psycopg.Connection[Any], name: str, terms: Mapping[str, frozenset[str]]) -> None:
    """Store terms of the manual's own index as labelled queries, in a new table.

    Each term stands with the pages that its entry names.
    """
    table = sql.Identifier("public", name)
    connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
    connection.execute(sql.SQL("CREATE TABLE {} (query text, key text, grade integer DEFAULT 1)").format(table))
    with connection.cursor() as cursor, cursor.copy(sql.SQL("COPY {} (query, key) FROM STDIN").format(table)) as copy:
        for term, relevant in terms.items():
            for page in sorted(relevant):
                copy.write_row((term, page))


def say(console: Console, statement: str) -> None:
    """Print a statement of the demo."""
    console.print(f"[green]{escape(statement)};[/green]", soft_wrap=True)


def index(connection: psycopg.Connection[Any], name: str, number: int, console: Console) -> None:
    """Build the index of a version."""
    headline(console, "Index: HNSW, CONCURRENTLY")
    started = time.perf_counter()
    with console.status("building"):
        statement = build(PsycopgClient(connection), name, number)
    say(console, statement or f"embedline build-index {name} --version {number}")
    console.print(f"  valid after {time.perf_counter() - started:.1f} s")


def gate(connection: psycopg.Connection[Any], name: str, number: int, console: Console) -> str:
    """Measure a version by the labelled queries of the demo; return the verdict."""
    headline(console, "Gate: the index against exact search, the new model against the old one on the canaries")
    say(console, f"SELECT * FROM embedline.evaluate('{name}', {number}, canaries => '{name}_canary')")
    table = Table()
    for column in ("measure", "old", "new", "difference", "95 % interval", "verdict"):
        table.add_column(column, justify="left" if column in ("measure", "verdict") else "right")
    rows = connection.execute(
        "SELECT measure, old, new, difference, low, high, verdict, detail FROM embedline.evaluate(%s, %s, %s::regclass)",
        (name, number, f"public.{name}_canary"),
    ).fetchall()
    for measure, old, new, difference, low, high, verdict, _ in rows:
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        table.add_row(measure, _figure(old), _figure(new), _figure(difference), interval, verdict or "")
    console.print(table)
    return str(
        scalar(connection, "SELECT gate FROM embedline.versions WHERE pipeline = %s AND version = %s", (name, number))
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
