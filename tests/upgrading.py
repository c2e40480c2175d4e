"""What tests of versions do: add one, wait until it is filled, cut over to it."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from support import scalar, settle, wait_until

OVERRIDE = "SELECT embedline.cutover(%s, %s, override_reason => 'a test of what comes after the gate')"


def add_version(connection: psycopg.Connection, model: str, pipeline: str = "page", **options: Any) -> int:
    """Call embedline.add_embedding_version; return the number."""
    named = "".join(f", {option} => %s" for option in options)
    query = f"SELECT embedline.add_embedding_version(%s, %s{named})"
    return int(scalar(connection, query, (pipeline, model, *options.values())))


def settle_versions(connection: psycopg.Connection, seconds: float = 30) -> None:
    """Drain until every version is complete and lacks nothing."""

    def settled() -> bool:
        settle(connection)
        query = "SELECT bool_and(state = 'complete' AND missing = dead_letters) FROM embedline.versions"
        return bool(scalar(connection, query))

    wait_until(settled, seconds, "every version is complete")


def versions(connection: psycopg.Connection, column: str, pipeline: str = "page") -> dict[int, Any]:
    """Return a column of embedline.versions by number."""
    query = sql.SQL("SELECT version, {} FROM embedline.versions WHERE pipeline = %s").format(sql.Identifier(column))
    return dict(connection.execute(query, (pipeline,)).fetchall())


def cut_over(connection: psycopg.Connection, number: int, pipeline: str = "page") -> None:
    """Cut over without a gate, for a reason."""
    connection.execute(OVERRIDE, (pipeline, number))
