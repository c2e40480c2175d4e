"""Which roles' remote workers may have the texts of a pipeline."""

from __future__ import annotations

from embedline.catalog.load import load_pipeline
from embedline.catalog.modality import require_text
from embedline.catalog.rights import caller, require_control
from embedline.errors import InvalidParameter, NotFound, NotPermitted
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

REMOTE_ROLE = "embedline_remote"
_GRANT = """
    INSERT INTO embedline.remote_grant (pipeline_id, role_name, is_exclusive, granted_by) VALUES ($1, $2, $3, $4)
    ON CONFLICT (pipeline_id, role_name) DO UPDATE SET is_exclusive = excluded.is_exclusive,
        granted_by = excluded.granted_by, granted_at = clock_timestamp()
"""
# A role that was granted, or one that has its rights.
_IS_GRANTED = """
    SELECT EXISTS (
        SELECT FROM embedline.remote_grant AS g JOIN embedline.pipeline AS p ON p.pipeline_id = g.pipeline_id
        JOIN pg_catalog.pg_roles AS r ON r.rolname = g.role_name
        WHERE p.name = $1 AND pg_catalog.pg_has_role($2, r.oid, 'USAGE'))
"""


@entry_point
def grant_remote(session: Session, name: str, role_name: str, is_exclusive: bool) -> None:
    """Let remote workers of a role have the texts of a pipeline.

    The role gets no other right: a superuser makes its login a member of embedline_remote.
    """
    require_control(session, name)
    pipeline = load_pipeline(session, name)
    require_text(pipeline, "a remote worker")
    if pipeline.spec.method == "semantic":
        raise InvalidParameter(
            f'pipeline "{name}" is chunked by meaning, for which the server itself asks the model',
            hint=f"SELECT embedline.alter_pipeline('{name}', chunking => 'recursive'); or let workers in the database embed it.",
        )
    found = session.query(
        "SELECT pg_has_role(rolname, $2, 'USAGE') AS is_member FROM pg_roles WHERE rolname = $1",
        ["name", "name"],
        role_name,
        REMOTE_ROLE,
    )
    if not found:
        raise NotFound(f'there is no role "{role_name}"', hint="SELECT rolname FROM pg_roles; lists the roles.")
    session.query(
        _GRANT, ["bigint", "text", "boolean", "text"], pipeline.pipeline_id, role_name, is_exclusive, caller(session)
    )
    if not found[0]["is_member"]:
        session.plpy.warning(
            f'role "{role_name}" may not call the functions of remote workers yet',
            hint=f'As a superuser: GRANT {REMOTE_ROLE} TO "{role_name}";',
        )


@entry_point
def revoke_remote(session: Session, name: str, role_name: str) -> None:
    """Give remote workers of a role no more texts of a pipeline.

    What they have claimed they may still finish.
    """
    require_control(session, name)
    removed = session.query(
        "DELETE FROM embedline.remote_grant AS g USING embedline.pipeline AS p"
        " WHERE p.pipeline_id = g.pipeline_id AND p.name = $1 AND g.role_name = $2 RETURNING true",
        ["text", "text"],
        name,
        role_name,
    )
    if not removed:
        raise NotFound(
            f'role "{role_name}" was not granted pipeline "{name}"',
            hint="SELECT * FROM embedline.remote_grant; lists the grants.",
        )


def require_grant(session: Session, name: str) -> str:
    """Return the calling role, if it may have the pipeline's texts.

    Raises NotPermitted, which tells nothing of the pipeline, not even that there is one.
    """
    role = caller(session)
    if not session.scalar(_IS_GRANTED, ["text", "name"], name, role):
        raise NotPermitted(
            f'role "{role}" may not have the texts of a pipeline "{name}"',
            hint=f"The owner of its source grants it: SELECT embedline.grant_remote('{name}', '{role}');",
        )
    return role
