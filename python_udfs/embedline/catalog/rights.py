"""Find the calling role, and check its rights."""

from __future__ import annotations

from embedline.catalog.load import load_pipeline
from embedline.errors import NotPermitted
from embedline.postgres.entry import is_nested
from embedline.postgres.session import Session

CALLER = """
    SELECT CASE current_setting('role') WHEN 'none' THEN session_user::text ELSE current_setting('role') END
"""


def caller(session: Session) -> str:
    """Return the role that called a SECURITY DEFINER function.

    It is the session's role, or the one that the session has SET.

    Raises NotPermitted if code of others may be calling in its name. Such code is an expression that a worker evaluates
    as the source's owner, or a function of an index during ANALYZE. A session that calls others' functions itself
    already trusts them.
    """
    if is_nested(session):
        raise NotPermitted("an expression of a pipeline may not change Embedline's objects")
    # Changes nothing. PostgreSQL refuses it while it runs a table owner's code on its own: autovacuum, ANALYZE,
    # REINDEX.
    session.execute("UNLISTEN embedline")
    return str(session.scalar(CALLER))


def is_superuser(session: Session, role: str) -> bool:
    """Return True if the role is a superuser."""
    return bool(session.scalar("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = $1", ["text"], role))


def require_superuser(session: Session, doing: str, hint: str) -> None:
    """Raise NotPermitted unless the caller is a superuser.

    A URL, a key's variable or a directory lets its setter read the server's files and environment and send them out.
    """
    if not is_superuser(session, caller(session)):
        raise NotPermitted(
            f"only a superuser may {doing}", detail="A model names addresses, keys and files of the server.", hint=hint
        )


def require_control(session: Session, name: str) -> None:
    """Raise NotPermitted unless the caller may change the pipeline.

    The source's owner, the role that created the pipeline, and superusers may.
    """
    load_pipeline(session, name)
    allowed = session.scalar(
        """
        SELECT coalesce(
            pg_has_role($2, c.relowner, 'USAGE'),
            -- A source that is gone has no owner: the role that made the pipeline may drop it, or move it to another table.
            (SELECT pg_has_role($2, r.oid, 'USAGE') FROM pg_roles AS r WHERE r.rolname = p.created_by),
            (SELECT rolsuper FROM pg_roles WHERE rolname = $2))
        FROM embedline.pipeline AS p LEFT JOIN pg_class AS c ON c.oid = p.source WHERE p.name = $1
        """,
        ["text", "name"], name, caller(session),
    )  # fmt: skip
    if not allowed:
        raise NotPermitted(f'must be owner of the source of pipeline "{name}"')
