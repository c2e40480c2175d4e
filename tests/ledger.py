"""The ledger's functions as the engine calls them, run inside a backend of the test's connection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from support import scalar

_PRELUDE = """
    import dataclasses, json
    from embedline.spending import ledger as spending
    from embedline.catalog.load import load_pipeline
    from embedline.postgres.claims import TransactionClaims, WorkerClaims
    from embedline.postgres.session import Session
    session = Session(plpy, GD)
    pipeline = load_pipeline(session, name)
"""
_FUNCTIONS = f"""
    CREATE FUNCTION public.ledger_reserve(name text, tokens bigint[], worker integer) RETURNS text LANGUAGE plpython3u AS $python$
    {_PRELUDE}
    claims = TransactionClaims() if worker is None else WorkerClaims(worker)
    return json.dumps(dataclasses.asdict(spending.reserve(session, pipeline, tokens, claims)))
    $python$;
    CREATE FUNCTION public.ledger_settle(name text, reservation bigint, tokens bigint) RETURNS void
    LANGUAGE plpython3u AS $python$
    {_PRELUDE}
    spending.settle(session, reservation, tokens)
    $python$;
    CREATE FUNCTION public.ledger_look(name text, what text) RETURNS text LANGUAGE plpython3u AS $python$
    {_PRELUDE}
    return json.dumps(getattr(spending, what)(session, pipeline))
    $python$;
"""


@dataclass(frozen=True)
class Granted:
    """embedline.spending.Grant as it comes out of the backend."""

    count: int
    reservation_id: int | None
    wait_seconds: float | None
    reason: str | None


def install_ledger_functions(connection: psycopg.Connection) -> None:
    """Create the functions that the others here call."""
    connection.execute(_FUNCTIONS)


def reserve(
    connection: psycopg.Connection, tokens: Sequence[int], pipeline: str = "page", worker: int | None = 1
) -> Granted:
    """Reserve requests of so many tokens each."""
    query = "SELECT public.ledger_reserve(%s, %s::bigint[], %s)"
    return Granted(**json.loads(scalar(connection, query, (pipeline, list(tokens), worker))))


def settle(connection: psycopg.Connection, reservation_id: int | None, tokens: int | None) -> None:
    """Settle a reservation."""
    assert reservation_id is not None
    connection.execute("SELECT public.ledger_settle('page', %s, %s)", (reservation_id, tokens))


def blocked_until(connection: psycopg.Connection, pipeline: str = "page") -> float | None:
    """Return the seconds for which a claim makes no sense."""
    found: float | None = json.loads(scalar(connection, "SELECT public.ledger_look(%s, 'blocked_until')", (pipeline,)))
    return found


def tokens_left(connection: psycopg.Connection, pipeline: str = "page") -> int | None:
    """Return how large a request may be."""
    found: int | None = json.loads(scalar(connection, "SELECT public.ledger_look(%s, 'tokens_left')", (pipeline,)))
    return found


def age(connection: psycopg.Connection, by: str) -> None:
    """Let everything in the ledger have happened so much earlier."""
    connection.execute(
        "UPDATE embedline.reservation SET reserved_at = reserved_at - %s::interval, settled_at = settled_at - %s::interval",
        (by, by),
    )
