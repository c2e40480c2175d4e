"""Write calls of Embedline's SQL functions as text.

So online and offline migrations run the same statement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from embedline.core.sql_text import quote_literal


@dataclass(frozen=True)
class Cast:
    """A value that SQL has to read as another type than its literal's."""

    value: str
    type: str


def literal(value: object) -> str:
    """Return an SQL constant.

    It may be of None, a number, a text, a list of texts, a mapping as jsonb, or a Cast.
    """
    match value:
        case None:
            return "NULL"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case Cast():
            return f"{literal(value.value)}::{value.type}"
        case Mapping():
            return f"{literal(json.dumps(dict(value), ensure_ascii=False))}::jsonb"
        case list() | tuple():
            return f"ARRAY[{', '.join(map(literal, value))}]::text[]"
        case _:
            return quote_literal(str(value)).strip()


def call(function: str, arguments: Mapping[str, object]) -> str:
    """Return SELECT of a function of schema embedline with named arguments.

    Arguments that are None are left to SQL.
    """
    given = ", ".join(f"{name} => {literal(value)}" for name, value in arguments.items() if value is not None)
    return f"SELECT embedline.{function}({given})"


def call_rows(function: str, arguments: Mapping[str, object]) -> str:
    """Return the call of a function that returns a table, as `call` does."""
    return "SELECT * FROM " + call(function, arguments).removeprefix("SELECT ")
