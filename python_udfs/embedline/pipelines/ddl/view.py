"""SQL text of a pipeline's views."""

from __future__ import annotations

from dataclasses import dataclass

from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.pipelines.ddl.plan import CapturePlan

# A chunk's text (c) where its source row (s) is seen. It is an expression of both tables: so no function in a reader's
# condition is given a text that a policy hides. With the column alone the condition may be checked while the chunks are read,
# before their rows are looked up.
SHOWN_TEXT = "CASE WHEN s.tableoid > 0::oid THEN c.content END"


@dataclass(frozen=True)
class ShownVersion:
    """The version that a view shows.

    It has a number, a chunk set, and the type that the view gives the vectors.

    The routing view shows them without dimensions ("public.vector"). So CREATE OR REPLACE VIEW can put a version of
    other dimensions in their place, and an index is still found. `type_name` None leaves the column's own type.
    """

    number: int
    chunk_set: int
    type_name: str | None


def view_query(
    plan: CapturePlan, columns: list[tuple[str, str, bool]], shown: ShownVersion, *, has_policies: bool = False
) -> str:
    """Return the query of a view.

    `columns` are (column, its name in the view, whether it is one of CHUNK_COLUMNS).

    For a join over a key of several columns the planner multiplies the selectivity of each column. It expected 5 rows
    of 4,999, and ranked all exactly rather than by the index. Of a LEFT JOIN it expects all rows of the left side.
    The condition leaves out rows without a source row, in a form from which the planner does not make the plain join
    again. A filter on a column of the source still does, and is used first. Row-level security would not be used
    first, so a source with it (`has_policies`) keeps the plain join.
    """
    vector = f"v.{quote_ident(names.vector_column(shown.number))}"
    chunk_sources = {
        "chunk_id": "c.chunk_id",
        "chunk_seq": "c.seq",
        "chunk_start": "c.start_offset",
        "chunk_end": "c.end_offset",
        "chunk": SHOWN_TEXT,
        "embedding": vector if shown.type_name is None else f"{vector}::{shown.type_name}",
    }
    selected = [
        (chunk_sources[column] if of_chunk else f"s.{quote_ident(column)}") + f" AS {quote_ident(name)}"
        for column, name, of_chunk in columns
    ]
    join = " AND ".join(f"c.{quote_ident(key.name)} = s.{quote_ident(key.source_name)}" for key in plan.keys)
    chunk, vectors = (
        plan.generated(names.chunk_suffix(shown.chunk_set)),
        plan.generated(names.version_suffix(shown.number)),
    )
    if len(plan.keys) > 1 and not has_policies:
        return (
            f"SELECT {', '.join(selected)} FROM {vectors} AS v JOIN {chunk} AS c ON v.chunk_id = c.chunk_id"
            f" LEFT JOIN {plan.rows} AS s ON {join}"
            f" WHERE CASE WHEN s.{quote_ident(plan.keys[0].source_name)} IS NULL THEN false ELSE true END"
            f" AND {is_shown(plan, 'c')}"
        )
    return (
        f"SELECT {', '.join(selected)} FROM {plan.rows} AS s JOIN {chunk} AS c ON {join}"
        f" JOIN {vectors} AS v ON v.chunk_id = c.chunk_id WHERE {is_shown(plan, 'c')}"
    )


def shown_key(plan: CapturePlan) -> str:
    """Return SQL for the key of a source row (s) as search returns it.

    It is the column's text, or a JSON array of texts if there are several columns.
    """
    keys = ", ".join(f"s.{quote_ident(key.source_name)}::text" for key in plan.keys)
    return keys if len(plan.keys) == 1 else f"pg_catalog.jsonb_build_array({keys})::text"


def is_shown(plan: CapturePlan, chunk: str) -> str:
    """The condition that a chunk is not hidden.

    An anti-join over the index of a table that is nearly always empty. As a subquery under CASE it had the table read
    whole for each search. A filter on 400 of 40,000 rows took 15 ms in place of 3.
    """
    same = " AND ".join(f"h.{quote_ident(key.name)} = {chunk}.{quote_ident(key.name)}" for key in plan.keys)
    return f"NOT EXISTS (SELECT FROM {plan.generated('hidden')} AS h WHERE {same})"
