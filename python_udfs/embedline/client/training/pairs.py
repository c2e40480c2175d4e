"""Read and check pairs: queries, each with the key of a row that answers it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psycopg
from psycopg import sql

from embedline.client.connection import Connection
from embedline.core.query_hash import query_hash
from embedline.core.sql_text import quote_literal
from embedline.core.text import repair_text
from embedline.errors import InvalidParameter, NotFound, NotPermitted, UnusableText

# Fewest queries of a training. A fifth of them is held out, and fewer than 8 can show no gain.
LEAST_QUERIES = 40
# Most pairs that are read into memory: 1 GB of them with long queries.
_MOST_PAIRS = 1_000_000
_RELATION = "SELECT %s::text::regclass::oid::bigint, %s::text::regclass::text"
_COLUMNS = """
    SELECT a.attname, t.typcategory::text, a.atttypid::regtype::text FROM pg_attribute AS a
    JOIN pg_type AS t ON t.oid = a.atttypid WHERE a.attrelid = %s::oid AND a.attnum > 0 AND NOT a.attisdropped
"""
# The columns that may be left out, and the value that stands for each.
_OPTIONAL = {"grade": "1::float8", "source": "NULL::text", "at": "NULL::text"}
_CREATE = (
    "CREATE TABLE pair (query text NOT NULL, key text NOT NULL, grade numeric NOT NULL DEFAULT 1, source text,"
    " at timestamptz);"
)
_CANARIES = (
    "SELECT c.query FROM embedline.canary AS c JOIN embedline.pipeline AS p USING (pipeline_id) WHERE p.name = %s"
)


@dataclass(frozen=True)
class Pair:
    """A query with the key of a row; a grade above 0 says that the row answers it."""

    query: str
    key: str
    grade: float
    source: str | None = None
    at: str | None = None

    @cached_property
    def hash(self) -> str:
        """Return the hash by which queries count as the same."""
        return query_hash(self.query)


@dataclass(frozen=True)
class Pairs:
    """The checked pairs of a training, in the order of their hashes.

    `table` is where they come from, `notes` tells a person what was merged.
    """

    table: str
    pairs: list[Pair]
    notes: list[str]

    @property
    def queries(self) -> list[str]:
        """Return the hashes of the queries that a row answers, in order."""
        return sorted({pair.hash for pair in self.pairs if pair.grade > 0})

    @property
    def hash(self) -> str:
        """Return the SHA-256 (hex) of queries, keys and grades."""
        listed = sorted((pair.query, pair.key, pair.grade) for pair in self.pairs)
        return hashlib.sha256(json.dumps(listed, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()

    def only(self, keys: Iterable[str]) -> Pairs:
        """Return the pairs of these keys; raise InvalidParameter if too few are left."""
        known = set(keys)
        kept = [pair for pair in self.pairs if pair.key in known]
        gone = sorted({pair.key for pair in self.pairs} - known)
        if not kept:
            raise InvalidParameter(
                f"no key in {self.table} is that of an embedded row of the pipeline",
                detail=f"The first of {len(gone)} is {gone[0]!r}.",
                hint="SELECT key FROM embedline.search('PIPELINE', 'some words'); shows keys as they must stand there.",
            )
        notes = [*self.notes, f"{len(gone)} keys of rows that are not embedded are left out"] if gone else self.notes
        return _enough(Pairs(self.table, kept, notes))


def is_held_out(digest: str, share: float, seed: int) -> bool:
    """Return True if the query of this hash measures the model and does not train it."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8], "big")
    return drawn < share * 2**64


def read_pairs(connection: Connection, table: str) -> Pairs:
    """Return the pairs of a table; raise InvalidParameter for what cannot be used."""
    oid, name = _resolve(connection, table)
    chosen = _columns(connection, oid, name)
    try:
        rows = connection.execute(
            sql.SQL("SELECT {} FROM {} LIMIT {}").format(
                sql.SQL(", ").join(map(sql.SQL, chosen)), sql.SQL(name), sql.Literal(_MOST_PAIRS + 1)
            )
        ).fetchall()
    except psycopg.errors.InsufficientPrivilege as error:
        raise NotPermitted(
            f"{name} cannot be read: {error.diag.message_primary}", hint=f"GRANT SELECT ON {name} TO CURRENT_USER;"
        ) from None
    except psycopg.errors.DataError as error:
        raise InvalidParameter(
            f"{name} has a value that cannot be read: {error.diag.message_primary}", hint="A grade is a number."
        ) from None
    if len(rows) > _MOST_PAIRS:
        raise InvalidParameter(f"{name} has more than {_MOST_PAIRS:,} pairs", hint="Train on a sample of them.")
    return _checked(name, rows)


def _resolve(connection: Connection, table: str) -> tuple[int, str]:
    try:
        row = connection.execute(_RELATION, (table, table)).fetchone()
    except (
        psycopg.errors.UndefinedTable, psycopg.errors.InvalidName, psycopg.errors.InvalidSchemaName,
        psycopg.errors.SyntaxError, psycopg.DataError,
    ) as error:  # fmt: skip
        told = error.diag.message_primary or str(error)
        raise NotFound(f"there is no table of pairs {table!r}: {told}", hint=_CREATE) from None
    assert row is not None
    return int(row[0]), str(row[1])


def _columns(connection: Connection, oid: int, name: str) -> list[str]:
    """Return the expressions to select, in the order of Pair's fields."""
    there = {str(row[0]): (str(row[1]), str(row[2])) for row in connection.execute(_COLUMNS, (oid,)).fetchall()}
    for column in ("query", "key"):
        if column not in there:
            raise InvalidParameter(
                f"{name} has no column {column}",
                detail="Pairs have the columns query and key, and may have grade, source and at.",
                hint=_CREATE,
            )
    if there["query"][0] != "S":
        raise InvalidParameter(f"column query of {name} is of type {there['query'][1]}", hint="It must be text.")
    if "grade" in there and there["grade"][0] != "N":
        raise InvalidParameter(f"column grade of {name} is of type {there['grade'][1]}", hint="It must be a number.")
    given = {"grade": "grade::float8", "source": "source::text", "at": '"at"::text'}
    return [
        "query::text",
        "key::text",
        *(given[column] if column in there else value for column, value in _OPTIONAL.items()),
    ]


def _checked(table: str, rows: Sequence[tuple[Any, ...]]) -> Pairs:
    if not rows:
        raise InvalidParameter(
            f"{table} is empty, or row-level security shows none of its rows",
            hint=f"INSERT INTO {table} (query, key) VALUES ('some words', '1');",
        )
    incomplete = sum(None in row[:3] for row in rows)
    if incomplete:
        raise InvalidParameter(
            f"{incomplete} rows of {table} have no query, no key or no grade",
            hint=f"DELETE FROM {table} WHERE query IS NULL OR key IS NULL OR grade IS NULL;",
        )
    if not all(math.isfinite(row[2]) for row in rows):
        raise InvalidParameter(f"a grade in {table} is not finite", hint=f"DELETE FROM {table} WHERE abs(grade) > 1e6;")
    empty = [row[0] for row in rows if not _has_text(row[0])]
    if empty:
        raise InvalidParameter(
            f"{len(empty)} rows of {table} have a query without text",
            detail=f"The first is {empty[0]!r}.",
            hint=rf"DELETE FROM {table} WHERE query !~ '\w';",
        )
    if not any(row[2] > 0 for row in rows):
        raise InvalidParameter(
            f"no grade in {table} is above 0, so no pair says what is right",
            hint="A grade above 0 means that the row answers the query; 1 will do.",
        )
    return _enough(_merged(table, [Pair(*row) for row in rows]))


def _has_text(query: str) -> bool:
    try:
        repair_text(query)
    except UnusableText:
        return False
    return True


def _merged(table: str, pairs: list[Pair]) -> Pairs:
    """Keep one spelling of each query, and the highest grade of each of its keys."""
    best: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.hash, pair.key, -pair.grade, pair.query, pair.at or "")):
        best.setdefault((pair.hash, pair.key), pair)
    spelling: dict[str, str] = {}
    for pair in best.values():
        spelling.setdefault(pair.hash, pair.query)
    kept = [Pair(spelling[p.hash], p.key, p.grade, p.source, p.at) for p in best.values()]
    count = len(pairs) - len(kept)
    return Pairs(table, kept, [f"{count} pairs that repeat another are left out"] if count else [])


def _enough(found: Pairs) -> Pairs:
    """Return the pairs if they can teach something; else raise InvalidParameter."""
    keys = {pair.key for pair in found.pairs if pair.grade > 0}
    count = len(found.queries)
    if len(keys) == 1:
        raise InvalidParameter(
            f"all pairs in {found.table} name one row, {keys.pop()!r}: there is nothing to tell apart",
            hint="Add queries that other rows answer.",
        )
    if count < LEAST_QUERIES:
        raise InvalidParameter(
            f"{found.table} has {count} different queries with an answer, and a training needs {LEAST_QUERIES}",
            detail="Queries that differ only in case, punctuation or spaces count once.",
            hint="A thousand make a good start: SELECT * FROM embedline.collect_pairs('PIPELINE', 'TABLE'); adds queries"
            " of your users.",
        )
    return found


def require_no_canaries(connection: Connection, pipeline: str, found: Pairs) -> None:
    """Raise InvalidParameter if canaries of the pipeline are among the queries."""
    canaries = {query_hash(str(row[0])) for row in connection.execute(_CANARIES, (pipeline,)).fetchall()}
    both = sorted(canaries & {pair.hash for pair in found.pairs})
    if both:
        first = next(pair.query for pair in found.pairs if pair.hash == both[0])
        raise InvalidParameter(
            f'{len(both)} queries in {found.table} are canaries of pipeline "{pipeline}"',
            detail=f"One is {first!r}. A model that has seen the canaries cannot be measured by them.",
            hint=f"DELETE FROM {found.table} WHERE embedline.query_hash(query) IN (SELECT embedline.query_hash(c.query)"
            " FROM embedline.canary AS c JOIN embedline.pipeline AS p USING (pipeline_id)"
            f" WHERE p.name = {quote_literal(pipeline)});",
        )
