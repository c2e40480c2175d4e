"""The session of a remote worker: its connection and the calls of SQL functions.

Each call is a transaction of its own. The lease of what was claimed is the session's, so the connection must be direct.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import conninfo

from embedline.core.embedding import ModelConfig
from embedline.errors import EmbedlineError

Connection = psycopg.Connection[tuple[Any, ...]]

# Either side finds out within about 25 s that the other has vanished from the network: libpq's settings, and the server's.
_KEEPALIVES = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
    "connect_timeout": "10",
    "client_encoding": "utf8",
    "fallback_application_name": "embedline remote worker",
}
_SESSION = """
    SELECT pg_backend_pid(), set_config('tcp_keepalives_idle', '10', false),
        set_config('tcp_keepalives_interval', '5', false), set_config('tcp_keepalives_count', '3', false),
        set_config('tcp_user_timeout', '25000', false), set_config('jit', 'off', false),
        set_config('default_transaction_isolation', 'read committed', false)
"""
_CLAIM = """
    SELECT state, claim, fence, texts
    FROM embedline.claim_batch(%s::text, %s::integer, %s::integer, %s::integer, %s::integer)
"""
_FINISH = "SELECT embedline.finish_batch(%s::bigint, %s::integer, %s::bytea, %s::bigint)"
_FAIL = "SELECT embedline.fail_batch(%s::bigint, %s::integer, %s::text, %s::text, %s::double precision)"


class SessionNotKept(EmbedlineError):
    """A pool stands between the worker and the server."""

    sqlstate = "55000"


@dataclass(frozen=True)
class Claim:
    """Texts to embed in one request, under a lease."""

    number: int
    fence: int
    texts: Sequence[str]


@dataclass(frozen=True)
class ServedModel:
    """The model of a version, with the fingerprint that the database knows."""

    config: ModelConfig
    fingerprint: str | None
    version: int


class RemoteSession:
    """A connection, and the functions of remote workers."""

    def __init__(self, connect: Callable[[], Connection], pipeline: str, version: int | None) -> None:
        self._pipeline = pipeline
        self._version = version
        self._connection = connect()
        told = self._connection.execute(_SESSION).fetchone()
        if told is None or told[0] != self._connection.info.backend_pid:
            self._connection.close()
            raise SessionNotKept(
                detail="The lease of claimed rows is a lock of the session, and behind a pool the next call may reach another"
                " session.",
                hint="Connect to the server itself, past the pool.",
            )

    @property
    def is_lost(self) -> bool:
        """Return True once the connection is gone, and with it the lease."""
        return self._connection.closed

    def model(self) -> ServedModel:
        """Return the model to embed with."""
        query = "SELECT embedline.remote_model(%s::text, %s::integer)"
        row = self._connection.execute(query, (self._pipeline, self._version)).fetchone()
        facts = row[0] if row is not None else {}
        found = facts if isinstance(facts, dict) else json.loads(facts)
        return ServedModel(ModelConfig(**found["config"]), found["fingerprint"], found["version"])

    def waiting(self) -> int:
        """Return how many rows wait, or chunks of a version beside the serving one."""
        query = "SELECT (embedline.remote_model(%s::text, %s::integer) ->> 'waiting')::bigint"
        row = self._connection.execute(query, (self._pipeline, self._version)).fetchone()
        return 0 if row is None else int(row[0])

    def claim(self, max_rows: int | None, max_tokens: int | None, max_requests: int) -> tuple[str, list[Claim]]:
        """Return the state and the texts to embed: batch, claimed, idle, empty or stop."""
        rows = self._connection.execute(
            _CLAIM, (self._pipeline, self._version, max_rows, max_tokens, max_requests), binary=True
        ).fetchall()
        claims = [Claim(number, fence, texts) for _, number, fence, texts in rows if number is not None]
        return str(rows[0][0]), claims

    def finish(self, claim: Claim, vectors: bytes, tokens: int | None) -> int:
        """Write the vectors of a claim; return how many rows are embedded by it."""
        row = self._connection.execute(_FINISH, (claim.number, claim.fence, vectors, tokens), binary=True).fetchone()
        return 0 if row is None else int(row[0])

    def fail(self, claim: Claim, kind: str, detail: str | None, retry_after: float | None) -> None:
        """Say why a claim could not be embedded."""
        self._connection.execute(_FAIL, (claim.number, claim.fence, kind, detail, retry_after))

    def release(self) -> None:
        """Free what is claimed."""
        self._connection.execute("SELECT embedline.release_batches()")

    def close(self) -> None:
        """Close the connection, which frees what is claimed, too."""
        self._connection.close()


def connector(dsn: str) -> Callable[[], Connection]:
    """Return a function that connects as a remote worker needs it."""

    def connect() -> Connection:
        # The caller's own settings come last, and win.
        given = {**_KEEPALIVES, **conninfo.conninfo_to_dict(dsn)}
        return psycopg.connect(conninfo.make_conninfo("", **given), autocommit=True)

    return connect
