"""Quote names and texts for SQL statements."""

from __future__ import annotations


def quote_ident(name: str) -> str:
    """Return `name` as a quoted SQL identifier.

    All identifiers enter statements through this function.
    """
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Return `text` as an SQL string constant.

    It is meant for utility statements, which take no parameters.
    """
    escaped = text.replace("'", "''")
    return " E'" + escaped.replace("\\", "\\\\") + "'" if "\\" in text else f"'{escaped}'"
