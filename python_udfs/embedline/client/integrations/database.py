"""Run statements over a pool of connections."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from embedline.client.connection import resolve

Pool = ConnectionPool[Any]
Row = dict[str, Any]

# Connections of a pool that is made from a connection string. None is opened before it is needed.
_MOST_CONNECTIONS = 4


class Database:
    """A pool of the application's, or one made from a connection string.

    A session keeps the imports of its first search, so sessions are kept. The pool is used from any thread.
    """

    def __init__(self, connection: str | Pool) -> None:
        self._is_own = isinstance(connection, str)
        self._pool = make_pool(connection) if isinstance(connection, str) else connection

    def rows(self, statement: str, parameters: dict[str, Any] | None = None) -> list[Row]:
        """Run one statement in a transaction of its own; return its rows by column.

        A percent sign of the statement itself is written twice.
        """
        with self._pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute(statement.encode(), parameters or {})
            return cursor.fetchall() if cursor.description else []

    def run(self, statements: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Run statements in one transaction."""
        with self._pool.connection() as connection, connection.transaction():
            for statement, parameters in statements:
                connection.execute(statement.encode(), parameters)

    def close(self) -> None:
        """Close the pool if it was made here."""
        if self._is_own:
            self._pool.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_pool(dsn: str) -> Pool:
    """Return a pool that opens no connection before one is needed.

    A connection is tried before it is used, because after a restart of the server the next call has to succeed.
    """
    # Nothing is prepared on the server: behind PgBouncer the next statement may run in another session.
    settings = {"fallback_application_name": "embedline", "client_encoding": "utf8", "prepare_threshold": None}
    pool = ConnectionPool(
        resolve(dsn),
        min_size=0,
        max_size=_MOST_CONNECTIONS,
        open=True,
        check=ConnectionPool.check_connection,
        kwargs=settings,
    )
    atexit.register(_close, weakref.ref(pool))
    return pool


def _close(reference: weakref.ref[Pool]) -> None:
    """Close a pool that is still in use when the program ends.

    From Python 3.13 on its threads cannot be ended later, and each is waited for 5 s in vain.
    """
    pool = reference()
    if pool is not None:
        pool.close()
