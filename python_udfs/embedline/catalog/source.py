"""Read a pipeline's source as a value."""

from __future__ import annotations

from dataclasses import dataclass

from embedline.core.sql_text import quote_ident
from embedline.errors import NotReady
from embedline.postgres.session import Session

# Condition on a row c of pg_class: its policies hold for its owner, as whom it is read.
HIDDEN = """
    c.relrowsecurity AND c.relforcerowsecurity AND NOT EXISTS (
        SELECT FROM pg_roles AS o WHERE o.oid = c.relowner AND (o.rolsuper OR o.rolbypassrls))
"""
_HIDDEN_SOURCE = f"""
    SELECT c.oid::regclass::text AS name, quote_ident(pg_get_userbyid(c.relowner)) AS owner
    FROM pg_class AS c WHERE c.oid = $1::oid AND {HIDDEN}
"""


@dataclass(frozen=True)
class Source:
    """A watched table."""

    oid: int
    schema: str
    name: str
    owner: str
    partitioned: bool
    subscribed: bool
    # True for a partition or an inheriting child. Rows that are written through its parent fire only its row triggers.
    is_child: bool = False

    @property
    def qualified(self) -> str:
        """Return schema and name, quoted."""
        return f"{quote_ident(self.schema)}.{quote_ident(self.name)}"


def hidden_source(session: Session, source_oid: int) -> NotReady | None:
    """Return the error to raise if row-level security hides a source's rows.

    They are hidden from the source's owner, so they would seem to be gone. None if no row can be hidden.
    """
    rows = session.query(_HIDDEN_SOURCE, ["bigint"], source_oid)
    if not rows:
        return None
    name, owner = rows[0]["name"], rows[0]["owner"]
    return NotReady(
        f"row-level security is forced on {name} and hides rows from its owner {owner}, as whom it is read",
        hint=f"ALTER TABLE {name} NO FORCE ROW LEVEL SECURITY; or ALTER ROLE {owner} BYPASSRLS;",
    )
