"""Read users' expressions, with the columns that they name."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

from embedline.catalog.source import Source
from embedline.core.expression import require_single_expression
from embedline.core.media import Modality
from embedline.core.recipe import Expressions
from embedline.core.sql_text import quote_ident
from embedline.errors import InvalidParameter
from embedline.pipelines.ddl.plan import SourceExpression
from embedline.postgres.run_as import Undone, create_scratch_schema, run_as_owner
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

_COLUMN_NAMES = """
    SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped
"""
_EXPRESSION = """
    SELECT pg_get_expr(conbin, conrelid) AS text FROM pg_constraint
    WHERE conrelid = $1::regclass AND contype = 'c'
"""
_INPUT_COLUMNS = """
    SELECT a.attname, a.attnum, format_type(a.atttypid, NULL) AS type
    FROM pg_constraint AS c, unnest(c.conkey) AS k (attnum), pg_attribute AS a
    WHERE c.conrelid = $1::regclass AND c.contype = 'c'
        AND a.attrelid = c.conrelid AND a.attnum = k.attnum
    ORDER BY a.attnum
"""
_EXPRESSION_HINT = "Name columns without the table, for example title || E'\\n\\n' || body."
# Functions and operators' functions of an expression, by the node tree that PostgreSQL stores of it.
_VOLATILE = """
    SELECT p.oid::regprocedure::text AS signature
    FROM pg_constraint AS c, regexp_matches(c.conbin::text, ':(?:funcid|opfuncid) (\\d+)', 'g') AS m
    JOIN pg_proc AS p ON p.oid = m[1]::oid
    WHERE c.conrelid = $1::regclass AND c.contype = 'c' AND p.provolatile = 'v'
        -- A function of the user's is volatile until declared otherwise; only the known ones are refused.
        AND p.pronamespace = 'pg_catalog'::regnamespace LIMIT 1
"""


# A function or a domain of the expression that is no part of PostgreSQL.
_FOREIGN = """
    SELECT coalesce(p.oid::regprocedure::text, format_type(m[2]::oid, NULL)) AS name
    FROM pg_constraint AS c,
        regexp_matches(c.conbin::text, ':(?:funcid|opfuncid) (\\d+)|COERCETODOMAIN .*?:resulttype (\\d+)', 'g') AS m
    LEFT JOIN pg_proc AS p ON p.oid = m[1]::oid
    WHERE c.conrelid = $1::regclass AND c.contype = 'c'
        AND (m[2] IS NOT NULL OR p.pronamespace <> 'pg_catalog'::regnamespace) LIMIT 1
"""


@dataclass(frozen=True)
class ContentKind:
    """What a content is: a text, a file of a modality, or the address of one."""

    modality: Modality
    is_reference: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the rows hold the file itself."""
        return self.modality != "text" and not self.is_reference


TEXT = ContentKind("text")


@dataclass(frozen=True)
class StoredExpression:
    """An expression as its user wrote it, with the parameter that it was given as."""

    text: str
    parameter: str
    search_path: str


@dataclass
class _Reading:
    """How to read an expression: the names that it knows columns by, by those of now.

    Of a value its type is found, too, and the first function or type in it that is no part of PostgreSQL.
    """

    known_as: dict[str, str]
    is_value: bool = False
    is_file: bool = False
    type: str = ""
    foreign: str | None = None


def deparsed_value(
    session: Session, source: Source, expression: str, parameter: str, search_path: str, known_as: dict[str, str]
) -> tuple[SourceExpression, str]:
    """Return an expression that any role may evaluate, and its type.

    It uses functions and types of PostgreSQL alone, so it runs no code of its owner's.
    """
    reading = _Reading(known_as, is_value=True)
    found = _deparse(session, source, expression, parameter, search_path, reading)
    if reading.foreign is not None:
        raise InvalidParameter(
            f"{parameter} uses {reading.foreign}, which is no part of PostgreSQL",
            hint="Put its result into a column, for example a generated one, and name that.",
        )
    return found, reading.type


def _type_of(session: Session, source: Source, table: str, text: str) -> str:
    session.execute(f"CREATE TABLE {table}_type AS SELECT ({text}) AS value FROM {source.qualified} LIMIT 0")
    found = session.scalar(
        "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = $1::regclass AND attname = 'value'",
        ["text"],
        f"{table}_type",
    )
    return str(found)


def deparsed(
    session: Session, source: Source, expressions: Expressions, search_path: str, content: ContentKind = TEXT
) -> dict[str, SourceExpression]:
    """Return the expressions as PostgreSQL reads them, by parameter.

    `content` says what the content is.
    """
    is_media = content.modality != "text"
    # The caption of an image has the place that the prefix of a text has.
    labels = {"document_prefix": "caption"} if is_media else {}
    found = {
        parameter: _deparse(
            session, source, text, labels.get(parameter, parameter), search_path, _Reading({}, is_file=content.is_file)
        )
        for parameter, text in expressions.texts().items()
    }
    if "content" in found and not found["content"].columns:
        example = "content => 'picture'" if is_media else "content => $$title || E'\\n\\n' || body$$"
        raise InvalidParameter("content names no column of the source", hint=f"For example {example}.")
    return found


def deparse_again(
    session: Session, source: Source, stored: StoredExpression, known_as: dict[str, str], *, is_file: bool
) -> SourceExpression:
    """Read a stored expression again, whose columns may have been renamed.

    `known_as` maps the current names to those that it uses.
    """
    reading = _Reading(known_as, is_file=is_file)
    return _deparse(session, source, stored.text, stored.parameter, stored.search_path, reading)


def _rename_columns(session: Session, table: str, known_as: dict[str, str]) -> list[tuple[str, str]]:
    """Give columns of an empty copy of the source their former names.

    Returns the renamings that undo it.
    """
    undo = []
    there = {str(row["attname"]) for row in session.query(_COLUMN_NAMES, ["text"], table)}
    moved = {now: then for now, then in known_as.items() if now != then}
    # Another column may have such a name now: it steps aside, as no expression of before can mean it.
    aside = [name for name in moved.values() if name in there and name not in moved]
    steps = [(name, f"embedline_aside_{i}") for i, name in enumerate(aside)]
    steps += [(now, f"embedline_moved_{i}") for i, now in enumerate(moved)]
    steps += [(f"embedline_moved_{i}", then) for i, then in enumerate(moved.values())]
    for before, after in steps:
        session.execute(f"ALTER TABLE {table} RENAME COLUMN {quote_ident(before)} TO {quote_ident(after)}")
        undo.append((after, before))
    return undo[::-1]


def _deparse(
    session: Session,
    source: Source,
    expression: str,
    parameter: str,
    search_path: str,
    reading: _Reading | None = None,
) -> SourceExpression:
    """Let PostgreSQL resolve an expression with the caller's search_path.

    It is printed back fully qualified.

    A CHECK constraint on an empty copy of the table takes exactly the expressions that are allowed. They are over one
    row, without aggregates, window or set-returning functions and subqueries. It prints them with bare column names.
    """
    require_single_expression(expression, parameter)
    # IS TRUE takes a boolean only; anything can be the text of a content.
    cast, test = ("", " IS TRUE") if parameter == "filter" else ("::pg_catalog.text", " IS NULL")
    reading = reading or _Reading({})
    if reading.is_value or (reading.is_file and parameter == "content"):
        # Bytes have no text form that could be meant; the content's function tells whether the type is right.
        cast = ""
    text, columns, volatile = "", [], None
    try:
        # Rolled back: nothing stays of the table, nor of what the user's functions did.
        with contextlib.suppress(Undone), session.plpy.subtransaction():
            table = f"{create_scratch_schema(session, source.owner)}.source"
            session.execute(f"CREATE TABLE {table} (LIKE {source.qualified})")
            session.execute(f"ALTER TABLE {table} OWNER TO {quote_ident(source.owner)}")
            undo = _rename_columns(session, table, reading.known_as)
            check = f"ALTER TABLE {table} ADD CHECK ((\n{expression}\n){cast}{test})"
            run_as_owner(session, source.owner, check, search_path)
            for before, after in undo:
                session.execute(f"ALTER TABLE {table} RENAME COLUMN {quote_ident(before)} TO {quote_ident(after)}")
            text = str(session.scalar(_EXPRESSION, ["text"], table)).removeprefix("(").removesuffix(f"{test})")
            columns = session.query(_INPUT_COLUMNS, ["text"], table)
            volatile = session.scalar(_VOLATILE, ["text"], table)
            if reading.is_value:
                reading.foreign = session.scalar(_FOREIGN, ["text"], table)
                reading.type = "" if reading.foreign or volatile else _type_of(session, source, table, text)
            raise Undone
    except Exception as error:
        state = sqlstate_of(error)
        if state[:2] not in ("42", "22", "0A"):
            raise
        raise InvalidParameter(
            f"{parameter} is not an expression over the columns of {source.qualified}: {error}", hint=_EXPRESSION_HINT
        ) from error
    if volatile:
        raise InvalidParameter(
            f"{parameter} calls {volatile}, which is volatile",
            hint="The same row must give the same text each time: use functions that are immutable or stable.",
        )
    if re.match(r"\(*ROW\(", text) or re.search(r"\.\*", re.sub(r"'(?:[^']|'')*'", "''", text)):
        raise InvalidParameter(
            f"{parameter} is a row, not a single value", hint="Join the columns: title || E'\\n\\n' || body."
        )
    if columns and columns[0]["attnum"] < 0:
        raise InvalidParameter(
            f"{parameter} is not an expression over the columns of {source.qualified}:"
            f" {columns[0]['attname']} is a system column",
            hint=_EXPRESSION_HINT,
        )
    return SourceExpression(text, tuple((str(row["attname"]), str(row["type"])) for row in columns))
