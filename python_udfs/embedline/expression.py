"""Guard for SQL expressions that users hand in, before they become part of a generated statement."""

from __future__ import annotations

import re

from embedline.errors import InvalidParameter

_LITERALS = re.compile(
    r"""
    [eE]'(?:[^'\\]|\\.|'')*'          # escape string
    | '(?:[^']|'')*'                  # string (standard_conforming_strings is pinned on)
    | "(?:[^"]|"")*"                  # quoted identifier
    | (\$(?:[A-Za-z_][A-Za-z_0-9]*)?\$).*?\1   # dollar-quoted string
    """,
    re.VERBOSE | re.DOTALL,
)


def require_single_expression(expression: str, parameter: str) -> str:
    """Return `expression` if it can only be one SQL expression, wherever it is put between parentheses.

    A second statement, a comment or a parenthesis that closes more than it opened would let it leave its place.
    """
    bare = _LITERALS.sub("''", expression)
    depth = 0
    for character in bare:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if depth < 0:
            break
    reason = None
    if not bare.strip():
        reason = "it is empty"
    elif depth != 0:
        reason = "its parentheses do not match"
    elif any(mark in bare for mark in (";", "--", "/*", "\x00")):
        reason = "it has a semicolon or a comment"
    elif re.sub(r"''", "", bare).count("'") or '"' in bare or re.search(r"\$\w*\$", bare):
        reason = "a quotation in it does not end"
    if reason:
        raise InvalidParameter(
            f"{parameter} is not a single SQL expression: {reason}",
            hint="Give an expression over the source's columns, such as title || E'\\n\\n' || body.",
        )
    return expression
