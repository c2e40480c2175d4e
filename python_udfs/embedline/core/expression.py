"""Check SQL expressions from users before they enter generated statements."""

from __future__ import annotations

import functools
import re

from embedline.errors import InvalidParameter

_CLOSING = {")": "(", "]": "["}


@functools.cache
def _tokens() -> re.Pattern[str]:
    """Return the pattern of what can hold a quotation in SQL.

    These are PostgreSQL's lexical rules, as far as they decide where a quotation begins and ends. A letter or a dollar
    sign within a word does not begin one. A quotation without an end is "broken".
    standard_conforming_strings is pinned on. The pattern is compiled on first use: that takes 10 ms, and a session's
    first search imports this module.
    """
    return re.compile(
        r"""
        (?P<constant> [eE]'(?:[^'\\]|\\.|'')*' | (?:[uU]&|[bBxXnN])?'(?:[^']|'')*' | (?:[uU]&)?"(?:[^"]|"")*"
          | (?P<tag>\$(?:[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*)?\$).*?(?P=tag) )
        | (?P<broken> [eE]' | \$(?:[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*)?\$ )
        | (?P<word> [\w\x80-\U0010ffff][\w$\x80-\U0010ffff]*+ )
        """,
        re.VERBOSE | re.DOTALL,
    )


def _bare(match: re.Match[str]) -> str:
    if match["constant"]:
        return " '' "
    return " ' " if match["broken"] else "w"


def require_single_expression(expression: str, parameter: str) -> str:
    """Return `expression` if it can only be one SQL expression between parentheses.

    A second statement, a comment or a closing parenthesis too many would change the statement around it. Raises
    InvalidParameter otherwise.
    """
    bare = _tokens().sub(_bare, expression)
    open_brackets: list[str] = []
    matched = True
    for character in bare:
        if character in "([":
            open_brackets.append(character)
        elif character in ")]":
            matched = matched and bool(open_brackets) and open_brackets.pop() == _CLOSING[character]
    reason = None
    if not bare.strip():
        reason = "it is empty"
    elif open_brackets or not matched:
        reason = "its parentheses do not match"
    elif any(mark in bare for mark in (";", "--", "/*", "\x00")):
        reason = "it has a semicolon or a comment"
    elif "'" in bare.replace("''", "") or '"' in bare:
        reason = "a quotation in it does not end"
    if reason:
        raise InvalidParameter(
            f"{parameter} is not a single SQL expression: {reason}",
            hint="Give an expression over the source's columns, such as title || E'\\n\\n' || body.",
        )
    return expression
