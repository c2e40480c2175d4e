"""The schemas of generated objects, and that of pgvector."""

from __future__ import annotations

from embedline.core.sql_text import quote_ident
from embedline.postgres.session import Session

# In GD: the number of pgvector's type.
_VECTOR_TYPE = "embedline.vector_type"
# Schema of the functions of users' expressions. The sources' owners may name these, and nothing in embedline_data.
EXPRESSION_SCHEMA = "embedline_expression"
# Schema of the generated functions that rank a version's chunks. Readers may name these, and nothing in embedline_data.
SEARCH_SCHEMA = "embedline_search"


def data_name(name: str) -> str:
    """Return the qualified, quoted name of a generated object."""
    return "embedline_data." + quote_ident(name)


def vector_schema(session: Session) -> str:
    """Return the quoted schema that holds pgvector: search_path is pinned, so its functions are named in full.

    ALTER EXTENSION vector SET SCHEMA may move it at any time. So the type's number is kept, not its name, and the name is
    read past the snapshot: a REPEATABLE READ transaction from before the move would read where the extension was then.
    """
    number = session.cache.get(_VECTOR_TYPE)
    if number is not None:
        name = str(session.scalar("SELECT format_type($1::oid, NULL)", ["bigint"], number))
        if name.endswith(".vector"):
            return name.removesuffix(".vector")
    rows = session.query(
        "SELECT t.oid::bigint AS number, quote_ident(n.nspname) AS schema FROM pg_extension AS e"
        " JOIN pg_namespace AS n ON n.oid = e.extnamespace"
        " JOIN pg_type AS t ON t.typnamespace = n.oid AND t.typname = 'vector' WHERE e.extname = 'vector'"
    )
    session.cache[_VECTOR_TYPE] = rows[0]["number"] if rows else None
    return str(rows[0]["schema"]) if rows else "None"
