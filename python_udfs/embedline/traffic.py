"""Gradual cutovers: which version answers a search call, and what another would have answered.

A share of the calls, or single tenants, are served by a version that the routing view does not show yet. A caller stays with
its version: the share is drawn from a hash of its tenant, its session key, or its database session, not anew each time.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from typing import Any

from embedline.catalog import Pipeline, load_pipeline, load_version
from embedline.database import ENDING, Session, entry_point, sqlstate_of
from embedline.errors import InvalidParameter, NotReady

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
_STORE = """
    INSERT INTO embedline.traffic (pipeline_id, version_id, share, shadow_share) VALUES ($1, $2, $3, $4)
    ON CONFLICT (pipeline_id) DO UPDATE SET version_id = excluded.version_id, share = excluded.share,
        shadow_share = excluded.shadow_share
"""
_STORE_TENANT = """
    INSERT INTO embedline.traffic_tenant (pipeline_id, tenant, version_id) VALUES ($1, $2, $3)
    ON CONFLICT (pipeline_id, tenant) DO UPDATE SET version_id = excluded.version_id
"""
_NOTE = "SELECT embedline._note_shadow_read($1, $2, $3, $4, $5)"


@entry_point
def set_traffic(
    session: Session, name: str, number: int | None, share: float | None, shadow_share: float | None
) -> None:
    """Have a version serve a share of search calls, and answer another in the shadow; without a version: none."""
    _require_control(session, name)
    pipeline = load_pipeline(session, name)
    if number is None:
        session.query("DELETE FROM embedline.traffic WHERE pipeline_id = $1", ["bigint"], pipeline.pipeline_id)
        return
    for parameter, value in (("share", share), ("shadow_share", shadow_share)):
        if value is None or not 0 <= value <= 1:
            raise InvalidParameter(
                f"{parameter} must be between 0 and 1, not {value}",
                hint=f"SELECT embedline.set_traffic('{name}', {number}, share => 0.05);",
            )
    version_id = _servable(session, name, number)
    session.query(
        _STORE, ["bigint", "bigint", "double precision", "double precision"],
        pipeline.pipeline_id, version_id, share, shadow_share,
    )  # fmt: skip


@entry_point
def set_tenant_version(session: Session, name: str, tenant: str, number: int | None) -> None:
    """Have a version answer the search calls of a tenant; without a version: the one that serves everybody."""
    _require_control(session, name)
    pipeline = load_pipeline(session, name)
    if not tenant:
        raise InvalidParameter("tenant must not be empty")
    if number is None:
        session.query(
            "DELETE FROM embedline.traffic_tenant WHERE pipeline_id = $1 AND tenant = $2",
            ["bigint", "text"], pipeline.pipeline_id, tenant,
        )  # fmt: skip
        return
    version_id = _servable(session, name, number)
    session.query(_STORE_TENANT, ["bigint", "text", "bigint"], pipeline.pipeline_id, tenant, version_id)


def _require_control(session: Session, name: str) -> None:
    # Imported here: every session's first search imports this module, and no search needs the other.
    from embedline.pipelines import require_control

    require_control(session, name)


def _servable(session: Session, name: str, number: int) -> int:
    version = load_version(session, name, number).version
    if version.state != "complete":
        raise NotReady(
            f'version {number} of pipeline "{name}" is still being filled',
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{name}'; shows how far it is.",
        )
    return version.version_id


def answer(
    session: Session,
    serving: Pipeline,
    tenant: str | None,
    session_key: str | None,
    k: int,
    search: Callable[[Pipeline], Rows],
) -> Rows:
    """Return what `search` finds with the version whose turn it is; note what another would have found where asked to."""
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
    """Search with the other version and note how it compares; whatever fails there is not the caller's trouble."""
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
