"""Let roles read generated tables through views and functions alone."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.core.sql_text import quote_ident
from embedline.postgres.session import Session

_POLICY = "through_views"


def grant_select(session: Session, tables: Sequence[str], owner: str) -> None:
    """Let readers and the owner of a source read generated tables.

    A role with SELECT on a table finds its most common values in pg_stats, without USAGE on the schema. There the texts and
    keys would stand that the source hides from it. pg_stats leaves out a table whose row-level security is active for the
    role, so it is enabled, with a policy that hides no row. What is shown is decided by the source, which each view and
    function joins.
    """
    session.execute(f"GRANT SELECT ON {', '.join(tables)} TO embedline_reader, {quote_ident(owner)}")
    for table in tables:
        if not session.scalar("SELECT relrowsecurity FROM pg_class WHERE oid = $1::regclass", ["text"], table):
            session.execute(f"CREATE POLICY {_POLICY} ON {table} FOR SELECT USING (true)")
            session.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
