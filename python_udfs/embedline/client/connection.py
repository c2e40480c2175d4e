"""Connect the command line and Alembic's environment to a database.

Any connection string of libpq works, or its environment.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import psycopg

from embedline.errors import EmbedlineError

if TYPE_CHECKING:
    import sqlalchemy

Connection = psycopg.Connection[tuple[Any, ...]]

# Variables that name a server, a database or a service. With one of them an empty connection string is meant.
_LIBPQ_VARIABLES = ("PGSERVICE", "PGDATABASE", "PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER")
# Seconds until an unresponsive server is given up, unless the connection string or PGCONNECT_TIMEOUT sets another
# limit.
_CONNECT_SECONDS = "10"
_IN_USE = "SELECT pid, state, xact_start, query FROM pg_stat_activity WHERE state <> 'idle' ORDER BY xact_start;"
# A transaction that was prepared for a two-phase commit has no session, but holds its locks.
_PREPARED = "SELECT gid, prepared, owner FROM pg_prepared_xacts;"
_HINTS = {
    "55P03": f"{_IN_USE} {_PREPARED} Run the command again when these are through.",
    "40P01": f"{_IN_USE} Run the command again.",
}


class NoDatabaseNamed(EmbedlineError):
    """No database is named."""

    sqlstate = "08001"


def resolve(dsn: str | None) -> str:
    """Return a connection string for libpq.

    It is empty if libpq's own environment names the database. SQLAlchemy's form of an address, with the driver after
    the scheme, is understood, too. Raises NoDatabaseNamed.
    """
    found = dsn or os.environ.get("EMBEDLINE_DSN") or ""
    if not found and not any(os.environ.get(name) for name in _LIBPQ_VARIABLES):
        raise NoDatabaseNamed(
            hint="Set EMBEDLINE_DSN, for example EMBEDLINE_DSN=postgresql:///mydb, or PGSERVICE, or PGHOST and PGDATABASE."
        )
    scheme, separator, rest = found.partition("://")
    return f"{scheme.partition('+')[0]}{separator}{rest}" if separator and scheme.startswith("postgres") else found


def connect(dsn: str | None, *, autocommit: bool = True) -> Connection:
    """Connect; the caller closes.

    Text is read as UTF8, whatever the database's encoding is, because psycopg would return bytes from SQL_ASCII.
    Nothing is prepared on the server, because behind a pool the next statement may run in another session.
    """
    os.environ.setdefault("PGCONNECT_TIMEOUT", _CONNECT_SECONDS)
    return psycopg.connect(
        resolve(dsn),
        autocommit=autocommit,
        fallback_application_name="embedline",
        client_encoding="utf8",
        prepare_threshold=None,
    )


def engine(dsn: str | None) -> sqlalchemy.Engine:
    """Return SQLAlchemy's engine over `connect`, without a pool of its own."""
    from sqlalchemy import create_engine, pool

    resolve(dsn)  # raised here in one sentence, not from inside SQLAlchemy
    return create_engine(
        "postgresql+psycopg://", creator=lambda: connect(dsn, autocommit=False), poolclass=pool.NullPool
    )


def server_message(error: object) -> str | None:
    """Return a database error's message with its DETAIL and HINT.

    None for any other error.
    """
    if not isinstance(error, psycopg.Error):
        return None
    diagnostic = error.diag
    detail = diagnostic.message_detail
    if error.sqlstate in _HINTS and not detail and diagnostic.context:
        # "canceling statement due to lock timeout" names no object; the statement does.
        detail = diagnostic.context.splitlines()[0]
    return lines(
        diagnostic.message_primary or str(error).strip(),
        detail,
        diagnostic.message_hint or _HINTS.get(error.sqlstate or ""),
    )


def lines(message: str, detail: str | None, hint: str | None) -> str:
    """Return an error as PostgreSQL's clients print it."""
    found = [message]
    found += [f"DETAIL: {detail}"] if detail else []
    found += [f"HINT: {hint}"] if hint else []
    return "\n".join(found)
