"""Run statements with the rights of a source's owner.

Functions in users' expressions run while an expression is parsed and planned. PostgreSQL folds constants, calls
immutable functions and checks domains when it adds a constraint or creates a function.
"""

from __future__ import annotations

import secrets
from typing import Any

from embedline.core.sql_text import quote_ident, quote_literal
from embedline.postgres.relations import data_name
from embedline.postgres.session import Session

_PINNED = "pg_catalog, pg_temp"


class Undone(Exception):
    """Roll back a subtransaction that only read."""


def create_scratch_schema(session: Session, owner: str) -> str:
    """Create a schema in which the owner may create objects.

    It is meant for this transaction. Returns its quoted name.
    """
    schema = quote_ident(f"embedline_new_{secrets.token_hex(8)}")
    session.execute(f"CREATE SCHEMA {schema}")
    session.execute(f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {quote_ident(owner)}")
    return schema


def run_as_owner(
    session: Session, owner: str, statement: str, search_path: str = _PINNED, columns: str | None = None
) -> list[dict[str, Any]]:
    """Run one statement with the owner's rights and this search_path.

    Returns its rows if `columns` are given. SET ROLE is forbidden within a SECURITY DEFINER function, but calling a
    SECURITY DEFINER function of another role is not. Such a function is created for one statement, under a name that
    the owner cannot know. Otherwise the owner's code could alter it for the next statement.
    """
    function = data_name(f"_run_{secrets.token_hex(8)}")
    session.execute(
        f"""CREATE FUNCTION {function}(text, text) RETURNS {f"TABLE ({columns})" if columns else "void"}
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = {_PINNED}
        AS $plpgsql$
        BEGIN
            PERFORM set_config('search_path', $2, true);
            {"RETURN QUERY " if columns else ""}EXECUTE $1;
        END
        $plpgsql$"""
    )
    session.execute(f"REVOKE ALL ON FUNCTION {function}(text, text) FROM public")
    session.execute(f"ALTER FUNCTION {function}(text, text) OWNER TO {quote_ident(owner)}")
    rows = session.execute(f"SELECT * FROM {function}({quote_literal(statement)}, {quote_literal(search_path)})")
    # A SET without LOCAL in the owner's code outlives the function, so the search_path is pinned again.
    session.execute(f"SET LOCAL search_path = {_PINNED}")
    session.execute(f"DROP FUNCTION {function}(text, text)")
    return rows
