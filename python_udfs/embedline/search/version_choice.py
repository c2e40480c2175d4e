"""Choose the version that answers a search while traffic is shared.

A shadow read also records the answer of another version.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from typing import Any

from embedline.catalog.load import load_version
from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of

Rows = list[dict[str, Any]]
_TRAFFIC = """
    SELECT v.number, t.share, t.shadow_share,
        (SELECT n.number FROM embedline.traffic_tenant AS o JOIN embedline.version AS n ON n.version_id = o.version_id
         WHERE o.pipeline_id = $1 AND o.tenant = $2) AS tenant_number,
        pg_backend_pid()::text || ' ' || pg_postmaster_start_time()::text AS session
    FROM (SELECT) AS always
    LEFT JOIN embedline.traffic AS t ON t.pipeline_id = $1
    LEFT JOIN embedline.version AS v ON v.version_id = t.version_id
"""
_NOTE = "SELECT embedline._note_shadow_read($1, $2, $3, $4, $5)"


def answer(
    session: Session,
    serving: Pipeline,
    tenant: str | None,
    session_key: str | None,
    k: int,
    search: Callable[[Pipeline], Rows],
) -> Rows:
    """Return the results of `search` with the version whose turn it is.

    If a shadow read is asked for, the results of the other version are compared and recorded.
    """
    if len(serving.versions) == 1:
        return search(serving)
    row = session.query(_TRAFFIC, ["bigint", "text"], serving.pipeline_id, tenant)[0]
    number = row["tenant_number"]
    if number is None and row["number"] is not None:
        caller = tenant or session_key or row["session"]
        number = row["number"] if drawn(caller, serving.name) < row["share"] else None
    chosen = serving if number in (None, serving.version.number) else load_version(session, serving.name, number)
    started = time.perf_counter()
    rows = search(chosen)
    seconds = time.perf_counter() - started
    if row["number"] is not None and random.random() < row["shadow_share"]:
        shadow = load_version(session, serving.name, row["number"])
        if shadow.version.number == chosen.version.number:
            shadow = serving
        _read_in_shadow(session, shadow, rows, seconds, k, search)
    return rows


def drawn(caller: str, pipeline_name: str) -> float:
    """Return a number in [0, 1) that is always the same for a caller of a pipeline."""
    digest = hashlib.sha256(f"{pipeline_name}\0{caller}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read_in_shadow(
    session: Session, shadow: Pipeline, served: Rows, seconds: float, k: int, search: Callable[[Pipeline], Rows]
) -> None:
    """Search with the other version and record how it compares.

    A failure of the shadow read does not reach the caller.
    """
    if session.scalar("SELECT current_setting('transaction_read_only')::boolean"):
        return
    try:
        with session.plpy.subtransaction():
            started = time.perf_counter()
            found = search(shadow)
            shadow_seconds = time.perf_counter() - started
            both = {row["key"] for row in served} & {row["key"] for row in found}
            overlap = len(both) / max(len({row["key"] for row in served}), 1)
            session.query(
                _NOTE, ["bigint", "integer", "double precision", "double precision", "double precision"],
                shadow.version.version_id, k, overlap, seconds, shadow_seconds,
            )  # fmt: skip
    except Exception as error:
        if sqlstate_of(error) in ENDING:
            raise
