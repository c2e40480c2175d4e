"""An expression handed in must not leave the place that it is put in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedline.core.expression import require_single_expression
from embedline.errors import InvalidParameter

ATTACKS = [
    "body; DROP TABLE page",
    "body); DROP TABLE page; --",
    "body) FROM page; SELECT (1",
    "body ) , ( title",
    "(body",
    "body)",
    "a[1",
    "a]1[",
    "body -- and the rest is a comment",
    "body /* and the rest",
    "body */ FROM page /*",
    "'unfinished",
    '"unfinished',
    "E'unfinished \\'",
    "e'\\\\'; DROP TABLE page; --'",
    "'a'; DROP TABLE page; --'",
    "'\\'; DROP TABLE page; --'",
    "$$unfinished",
    "$tag$unfinished$other$",
    "$a$ $b$ $a$; DROP TABLE page; $b$ $a$ $b$",
    "$$ $$ ; $$ $$",
    "$1$; DROP TABLE page; $1$",
    "body$$; DROP TABLE page; --$$",
    "body$a$; DROP TABLE page; $a$",
    'U&"\\0022; DROP TABLE page"; --',
    "U&'\\0027'; DROP TABLE page; --'",
    "N'a'; DROP TABLE page; --'",
    "B'1'; DROP TABLE page",
    "nameE'\\'; DROP TABLE page; --'",
    "1E'\\'; DROP TABLE page; --'",
    '"a""b"; DROP TABLE page',
    "body\x00; DROP TABLE page",
    "'a'\n'b'; DROP TABLE page",
    "",
    "  \n ",
]

SOUND = [
    "title || E'\\n\\n' || body",
    "title || '; -- not a comment /* nor this */' || body",
    "coalesce(title, '') || ' ' || coalesce(body, '')",
    "'it''s'",
    "E'it\\'s; ' || body",
    '"select" || "a;b--c" || "quo""te"',
    "$$ ; -- ' \" ( $$ || body",
    "$tag$ ; $$ ' ) $tag$ || body",
    "tags[1] || (array_to_string(tags, ', '))",
    "data ->> 'text'",
    "data -> 'a' #>> '{b,c}'",
    "regexp_replace(body, '[()]', '', 'g')",
    "U&'d\\0061t\\+000061' || body",
    "CASE WHEN body ~ '\\)' THEN ')' ELSE body END",
    "body - 1",
    "body || chr(59)",
    "übergröße || body",
]


@pytest.mark.parametrize("expression", ATTACKS)
def test_an_expression_that_could_leave_its_place_is_refused(expression: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        require_single_expression(expression, "content")
    assert caught.value.sqlstate == "22023"
    assert caught.value.hint
    assert "content" in caught.value.message


@pytest.mark.parametrize("expression", SOUND)
def test_an_ordinary_expression_is_accepted_as_it_is(expression: str) -> None:
    assert require_single_expression(expression, "content") == expression


@given(st.text())
def test_any_text_as_a_string_constant_is_accepted(text: str) -> None:
    literal = "'" + text.replace("'", "''").replace("\x00", "") + "'"
    assert require_single_expression(literal, "content") == literal


@given(st.text(alphabet="ab'\"$;-/*()[]\\E \n", max_size=30))
def test_what_is_accepted_has_no_semicolon_outside_a_quotation(text: str) -> None:
    """Compares with a scanner of its own, written after PostgreSQL's lexical rules."""
    try:
        require_single_expression(text, "content")
    except InvalidParameter:
        return
    assert _bare(text) is not None, "a quotation does not end"
    bare = _bare(text) or ""
    assert ";" not in bare
    assert "--" not in bare
    assert "/*" not in bare
    assert bare.count("(") + bare.count("[") == bare.count(")") + bare.count("]")


def _bare(text: str) -> str | None:
    """Return `text` without its quotations; None where one does not end. Follows src/backend/parser/scan.l."""
    out, i = "", 0
    while i < len(text):
        character = text[i]
        previous = out[-1:]
        if character in "'\"":
            before = text[i - 2 : i - 1] if i > 1 else ""
            escapes = (
                character == "'" and text[i - 1 : i] in ("E", "e") and not (before.isalnum() or before in ("_", "$"))
            )
            i += 1
            while True:
                if i >= len(text):
                    return None
                if escapes and text[i] == "\\":
                    i += 2
                elif text[i] == character:
                    if text[i + 1 : i + 2] != character:
                        break
                    i += 2
                else:
                    i += 1
            i += 1
            out += " "
            continue
        if character == "$" and not (previous.isalnum() or previous in ("_", "$")):
            end = i + 1
            while end < len(text) and (text[end].isalpha() or text[end] == "_"):
                end += 1
            if text[end : end + 1] == "$":
                tag = text[i : end + 1]
                close = text.find(tag, end + 1)
                if close < 0:
                    return None
                out += " "
                i = close + len(tag)
                continue
        if text[i : i + 2] in ("--", "/*"):
            return out + text[i : i + 2]
        out += character
        i += 1
    return out
