"""Share search calls between versions, for a gradual cutover.

A share of the calls, or single tenants, are served by a version that the routing view does not show yet. A caller
stays with its version. The share is drawn from a hash of its tenant, its session key, or its database session, not at
each call.
"""

from __future__ import annotations

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.rights import require_control
from embedline.errors import InvalidParameter, NotReady
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

_STORE = """
    INSERT INTO embedline.traffic (pipeline_id, version_id, share, shadow_share) VALUES ($1, $2, $3, $4)
    ON CONFLICT (pipeline_id) DO UPDATE SET version_id = excluded.version_id, share = excluded.share,
        shadow_share = excluded.shadow_share
"""
_STORE_TENANT = """
    INSERT INTO embedline.traffic_tenant (pipeline_id, tenant, version_id) VALUES ($1, $2, $3)
    ON CONFLICT (pipeline_id, tenant) DO UPDATE SET version_id = excluded.version_id
"""


@entry_point
def set_traffic(
    session: Session, name: str, number: int | None, share: float | None, shadow_share: float | None
) -> None:
    """Have a version serve a share of search calls, or answer in the shadow.

    Without a version: none.
    """
    require_control(session, name)
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
    """Have a version answer the search calls of a tenant.

    Without a version: the one that serves all others.
    """
    require_control(session, name)
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


def _servable(session: Session, name: str, number: int) -> int:
    version = load_version(session, name, number).version
    if version.state != "complete":
        raise NotReady(
            f'version {number} of pipeline "{name}" is still being filled',
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{name}'; shows how far it is.",
        )
    return version.version_id
