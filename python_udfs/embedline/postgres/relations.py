"""Name the schemas of generated objects, and find that of pgvector."""

from __future__ import annotations

from embedline.core.sql_text import quote_ident
from embedline.postgres.session import Session

# Key in GD of the OID of pgvector's type.
_VECTOR_TYPE = "embedline.vector_type"
# Schema of the functions of users' expressions. The sources' owners may name these, but nothing in embedline_data.
EXPRESSION_SCHEMA = "embedline_expression"
# Schema of the generated functions that rank a version's chunks. Readers may name these, but nothing in embedline_data.
SEARCH_SCHEMA = "embedline_search"


def data_name(name: str) -> str:
    """Return the qualified, quoted name of a generated object."""
    return "embedline_data." + quote_ident(name)


def vector_schema(session: Session) -> str:
    """Return the quoted schema that holds pgvector.

    search_path is pinned, so pgvector's functions need their schema. ALTER EXTENSION vector SET SCHEMA may move it at
    any time, so the type's OID is cached and not its name. The name is read past the snapshot, because a REPEATABLE
    READ transaction from before the move would read the old schema.
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
