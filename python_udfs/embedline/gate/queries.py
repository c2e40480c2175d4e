"""Load the queries of a gate.

They are labelled ones from a table of the caller's (canaries), or made from the corpus (known items).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedline.catalog.values import Pipeline
from embedline.core.media import ModelInput
from embedline.core.sql_text import quote_ident
from embedline.core.text import repair_text
from embedline.errors import InvalidParameter, NotReady, UnusableText
from embedline.gate.synthetic_queries import known_item_queries
from embedline.gate.training import require_untrained
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of
from embedline.search.query_batches import key_expression
from embedline.search.query_vector import query_input
from embedline.search.ranking import version_view

# Places in the range of chunk_id that are probed per known item, because two places may have the same next chunk.
PROBES = 3

_COLUMNS = """
    SELECT a.attname AS name, t.typcategory AS category, a.atttypid::regtype::text AS type
    FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = $1::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""
# The required type of each column: pg_type.typcategory, and the words for it; None for any type.
_CANARY_COLUMNS: dict[str, tuple[str | None, str]] = {
    "query": ("S", "text"),
    "key": (None, "the key of a row of the source, one relevant row a key"),
    "grade": ("N", "a number, how relevant the row is; leave it out where all are 1"),
}


# Types of the numeric category that hold no numbers.
_NO_GRADES = ("money", "oid", "reg")
# Largest grade, because the sum of a query's gains must be finite.
_GREATEST_GRADE = 1_000_000


@dataclass(frozen=True)
class QuerySet:
    """Queries with the grades of the keys that answer each.

    `groups` holds the group of each if a column was named. `source` is 'canary' or 'known_item'. `note` names
    their origin and the omitted ones for a person. `is_all` means that the corpus gives no more known items.
    """

    source: str
    texts: list[ModelInput]
    grades: list[dict[str, float]]
    groups: list[str | None]
    note: str
    is_all: bool = False

    @property
    def words(self) -> list[str]:
        """Return the queries, which must all be texts."""
        words = [query for query in self.texts if isinstance(query, str)]
        if len(words) < len(self.texts):
            raise InvalidParameter(
                "files are canaries of the gate alone", hint="Leave the rows that have a file out of the table."
            )
        return words

    @property
    def kinds(self) -> list[str]:
        """Return what each query is: text, image or audio."""
        return ["text" if isinstance(query, str) else query.modality for query in self.texts]

    @property
    def more_come_from(self) -> str:
        """Return the source of more queries: "query_count", or the words for it."""
        if self.source == "known_item":
            return "the corpus gives no more: take canaries" if self.is_all else "query_count"
        return "more canaries"


@dataclass(frozen=True)
class _Found:
    key: str
    group: str | None


def load_queries(
    session: Session, versions: Sequence[Pipeline], canaries: str | None, query_count: int, breakdown: str | None,
    seed: int,
) -> QuerySet:  # fmt: skip
    """Return the queries to ask all the versions.

    `versions` are those of one pipeline, the serving one first. A key counts if any version has it, because keys that
    only a new version lacks must count against it.
    """
    if breakdown is not None:
        _require_view_column(session, versions[0], breakdown)
    if canaries is None:
        return _known_items(session, versions, query_count, breakdown, seed)
    return _canaries(session, versions, canaries, breakdown)


def _canaries(session: Session, versions: Sequence[Pipeline], table: str, breakdown: str | None) -> QuerySet:
    rows = _read_canaries(session, table)
    given = sorted({row["key"] for row in rows})
    found = _find_keys(session, versions, given, breakdown, table)
    if not found:
        raise InvalidParameter(
            f'no key in {table} is that of an embedded row of pipeline "{versions[0].name}"',
            detail=f"The first of {len(given)} is {given[0]!r}.",
            hint=f"SELECT key FROM embedline.search('{versions[0].name}', 'some words'); shows keys as they must stand there.",
        )
    grades: dict[str | bytes, dict[str, float]] = {}
    for row in rows:
        if row["key"] in found and row["grade"] > 0:
            key, of_query = found[row["key"]].key, grades.setdefault(_asked(row), {})
            of_query[key] = max(of_query.get(key, 0.0), float(row["grade"]))
    if not grades:
        raise InvalidParameter(
            f"no grade in {table} is above 0", hint="A grade above 0 makes a row relevant; 1 will do."
        )
    queries = len({_asked(row) for row in rows})
    left_out = [
        f"{count} {what} left out"
        for count, what in (
            (len(given) - len(found), "keys of rows that are not embedded"), (queries - len(grades), "queries without an answer"),
        )
        if count
    ]  # fmt: skip
    words = [query for query in grades if isinstance(query, str)]
    require_untrained(session, [version.version.model for version in versions], words, table)
    group_of = {place.key: place.group for place in found.values()}
    groups = [group_of[max(keys, key=lambda key: (keys[key], key))] for keys in grades.values()]
    texts = [_input(versions, query, table) for query in grades]
    return QuerySet(
        "canary", texts, list(grades.values()), groups, "; ".join([f"{len(grades)} canaries of {table}", *left_out])
    )


def _asked(row: Mapping[str, Any]) -> str | bytes:
    """Return the words of a canary or its file."""
    asked: str | bytes = row["query"] if row["query"] is not None else row["file"]
    return asked


def _input(versions: Sequence[Pipeline], query: str | bytes, table: str) -> ModelInput:
    """Return a canary as the models of all versions take it."""
    if isinstance(query, str):
        _repaired(query, table)
    first, *_ = [query_input(version, query) for version in versions]
    return first


def _repaired(text: str, table: str) -> str:
    try:
        return repair_text(text)
    except UnusableText as error:
        raise InvalidParameter(
            f"a query in {table} has no text in it",
            detail=f"The query {text!r}.",
            hint=f"DELETE FROM {table} WHERE query = {_escaped(text)};",
        ) from error


def _escaped(text: str) -> str:
    """Return a string constant in which nothing is invisible."""
    shown = (c if c.isprintable() and c not in "'\\" else f"\\U{ord(c):08X}" for c in text)
    return f"E'{''.join(shown)}'"


def _read_canaries(session: Session, table: str) -> list[dict[str, Any]]:
    present = {str(row["name"]): row for row in session.query(_COLUMNS, ["text"], table)}
    for name, (category, what) in _CANARY_COLUMNS.items():
        if name not in present and name != "grade" and not (name == "query" and "file" in present):
            raise InvalidParameter(
                f"{table} has no column {name}",
                detail=f"Canaries have the columns query, key and grade; {name} is {what}.",
                hint="CREATE TABLE canary (query text NOT NULL, key text NOT NULL, grade numeric NOT NULL DEFAULT 1);",
            )
        if category is not None and name in present and present[name]["category"] != category:
            raise InvalidParameter(
                f"column {name} of {table} is of type {present[name]['type']}", hint=f"It must be {what}."
            )
    if "grade" in present and str(present["grade"]["type"]).startswith(_NO_GRADES):
        raise InvalidParameter(
            f"column grade of {table} is of type {present['grade']['type']}",
            hint=f"It must be {_CANARY_COLUMNS['grade'][1]}.",
        )
    # A value that float8 cannot hold is not a grade, and less than a millionth counts as none. NaN is above every
    # number.
    grade = (
        f"CASE WHEN abs(grade) > {_GREATEST_GRADE} THEN 'Infinity'::pg_catalog.float8 WHEN abs(grade) < 1e-6 THEN 0"
        " ELSE grade::pg_catalog.float8 END"
        if "grade" in present
        else "1::pg_catalog.float8"
    )
    if "file" in present and str(present["file"]["type"]) != "bytea":
        raise InvalidParameter(
            f"column file of {table} is of type {present['file']['type']}",
            hint="It must be bytea: an image or a recording.",
        )
    query, file = (
        ("query::text" if "query" in present else "NULL::pg_catalog.text AS query"),
        "NULL::pg_catalog.bytea AS file",
    )
    rows = session.execute(
        f"SELECT {query}, key::text, {grade} AS grade, {'file' if 'file' in present else file} FROM {table} ORDER BY 1, 2, 3"
    )
    if not rows:
        raise InvalidParameter(
            f"{table} is empty", hint=f"INSERT INTO {table} (query, key) VALUES ('some words', '1');"
        )
    if "file" in present and (unclear := sum((row["query"] is None) == (row["file"] is None) for row in rows)):
        raise InvalidParameter(
            f"{unclear} rows of {table} have both words and a file, or neither",
            hint="Give each row either a query or a file.",
        )
    incomplete = sum(_asked(row) is None or row["key"] is None or row["grade"] is None for row in rows)
    if incomplete:
        raise InvalidParameter(
            f"{incomplete} rows of {table} have no query, no key or no grade",
            hint=f"DELETE FROM {table} WHERE query IS NULL OR key IS NULL{' OR grade IS NULL' if 'grade' in present else ''};",
        )
    if not all(math.isfinite(row["grade"]) for row in rows):
        raise InvalidParameter(
            f"a grade in {table} is not finite, or beyond {_GREATEST_GRADE}",
            hint=f"DELETE FROM {table} WHERE abs(grade) > {_GREATEST_GRADE};",
        )
    return rows


def _find_keys(
    session: Session, versions: Sequence[Pipeline], given: Sequence[str], breakdown: str | None, table: str
) -> dict[str, _Found]:
    """Return the given keys that a version has, each as search spells it."""
    pipeline = versions[0]
    parts = [key_parts(pipeline, key, table) for key in given]
    found: dict[str, _Found] = {}
    for version in versions:
        try:
            rows = session.query(
                _lookup_statement(session, version, breakdown), pipeline.key_parameter_types,
                *([part[i] for part in parts] for i in range(len(pipeline.key_columns))),
            )  # fmt: skip
        except Exception as error:
            if sqlstate_of(error)[:2] != "22":
                raise
            raise InvalidParameter(
                f'a key in {table} is no key of pipeline "{pipeline.name}": {error}',
                hint=f"SELECT key FROM embedline.search('{pipeline.name}', 'some words'); shows keys as they must stand there.",
            ) from error
        for row in rows:
            found.setdefault(given[int(row["position"]) - 1], _Found(str(row["key"]), row["label"]))
    return found


def key_parts(pipeline: Pipeline, key: str, table: str) -> list[str]:
    """Return the texts of a key's columns; `table` is where it stands, for an error."""
    if len(pipeline.key_columns) == 1:
        return [key]
    try:
        parts = json.loads(key)
    except ValueError:
        parts = None
    if not isinstance(parts, list) or len(parts) != len(pipeline.key_columns):
        raise InvalidParameter(
            f"{key!r} in {table} is no key of {len(pipeline.key_columns)} columns",
            hint='The key of a row is a JSON array of its columns\' texts, as search returns it: ["7", "en"].',
        )
    return [str(part) for part in parts]


def _lookup_statement(session: Session, pipeline: Pipeline, breakdown: str | None) -> str:
    names = [quote_ident(pipeline.view_columns[column]) for column in pipeline.key_columns]
    same = " AND ".join(f"e.{name} = g.{name}" for name in names)
    label = f"e.{quote_ident(breakdown)}::text" if breakdown is not None else "NULL::text"
    return f"""
        SELECT g.embedline_position AS position, {key_expression(pipeline, "g")} AS key, f.label
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS g ({", ".join(names)}, embedline_position)
        CROSS JOIN LATERAL (
            SELECT {label} AS label FROM {version_view(session, pipeline)} AS e WHERE {same} LIMIT 1
        ) AS f
    """


def _require_view_column(session: Session, pipeline: Pipeline, name: str) -> None:
    view = version_view(session, pipeline)
    columns = [str(row["name"]) for row in session.query(_COLUMNS, ["text"], view)]
    chunk_columns = {pipeline.view_columns[c] for c in pipeline.view_columns if c not in pipeline.key_columns}
    if name not in columns or name in chunk_columns:
        raise InvalidParameter(
            f'the source of pipeline "{pipeline.name}" has no column "{name}" to break down by',
            hint=f"Columns: {', '.join(column for column in columns if column not in chunk_columns)}.",
        )


def _known_items(
    session: Session, versions: Sequence[Pipeline], count: int, breakdown: str | None, seed: int
) -> QuerySet:
    """Make queries of up to `count` chunks of the serving version.

    The chunks are drawn over its chunk ids.
    """
    pipeline = versions[0]
    if pipeline.modality != "text":
        raise InvalidParameter(
            "queries are made of texts, and these are images or recordings",
            detail="A file that finds itself proves nothing.",
            hint="CREATE TABLE canary (query text, file bytea, key text NOT NULL); give each row words or a file, and"
            " pass canaries => 'canary'.",
        )
    drawn = {int(row["chunk_id"]): row for row in _draw_chunks(session, pipeline, count * PROBES, breakdown, seed)}
    chosen = list(drawn.values())[:count]
    if not chosen:
        raise NotReady(
            f'pipeline "{pipeline.name}" has no chunks to make queries of',
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{pipeline.name}';",
        )
    queries: dict[str, tuple[dict[str, float], str | None]] = {}
    for text, row in zip(known_item_queries([str(row["chunk"]) for row in chosen]), chosen, strict=True):
        # Equal texts make one query, which either of them answers.
        queries.setdefault(text, ({}, row["label"]))[0][str(row["key"])] = 1.0
    return QuerySet(
        "known_item", [*queries], [grades for grades, _ in queries.values()], [label for _, label in queries.values()],
        f"{len(queries)} known-item queries made from the corpus", len(queries) < count,
    )  # fmt: skip


def _draw_chunks(
    session: Session, pipeline: Pipeline, count: int, breakdown: str | None, seed: int
) -> list[dict[str, Any]]:
    """Return random chunks, found through the primary key.

    The cost is the same on any table.
    """
    view, names = version_view(session, pipeline), pipeline.view_columns
    chunk_id, chunk = f"e.{quote_ident(names['chunk_id'])}", f"e.{quote_ident(names['chunk'])}"
    label = f"e.{quote_ident(breakdown)}::text" if breakdown is not None else "NULL::text"
    return session.query(
        f"""
        SELECT f.* FROM unnest($1) WITH ORDINALITY AS p (place, position) CROSS JOIN LATERAL (
            SELECT {chunk_id} AS chunk_id, {key_expression(pipeline, "e")} AS key, {chunk} AS chunk, {label} AS label
            FROM {view} AS e WHERE {chunk_id} >= p.place ORDER BY {chunk_id} LIMIT 1
        ) AS f ORDER BY p.position
        """,
        ["bigint[]"],
        draw_places(session, pipeline, count, seed),
    )


def draw_places(session: Session, pipeline: Pipeline, count: int, seed: int) -> list[int]:
    """Return random numbers from the range of the version's chunk ids.

    None if it has no chunks.
    """
    view, chunk_id = version_view(session, pipeline), f"e.{quote_ident(pipeline.view_columns['chunk_id'])}"
    low, high = (
        session.scalar(f"SELECT {chunk_id} FROM {view} AS e ORDER BY {chunk_id} {direction} LIMIT 1")
        for direction in ("ASC", "DESC")
    )
    return [] if low is None else np.random.default_rng(seed).integers(low, high + 1, size=count).tolist()
