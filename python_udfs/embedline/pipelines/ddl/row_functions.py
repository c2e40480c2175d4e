"""Generate the functions that tell of a version's rows and chunks.

They run with their caller's rights, so that the source's grants and row-level security decide. Their bodies are parsed when
they are created: a reader needs no right to name the tables.
"""

from __future__ import annotations

import re

from embedline.catalog.values import Pipeline
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines.ddl.plan import CapturePlan
from embedline.pipelines.ddl.view import is_shown

_LENGTH = re.compile(r"\([\d, ]+\)")
# Without a length these types mean one character or one bit.
_UNBOUNDED = {"character": "bpchar", "bit": "bit varying"}
# The format of dead letters' keys; the session's own must not change it.
_KEY_FORMAT = (
    "SET extra_float_digits = 1 SET datestyle = 'ISO' SET timezone = 'UTC' SET intervalstyle = 'postgres'"
    " SET bytea_output = 'hex'"
)


def row_function_statements(plan: CapturePlan, pipeline: Pipeline) -> list[str]:
    """Return the statements that create the functions, or replace them."""
    return [_state(plan, pipeline), _stored(plan, pipeline)]


def _state(plan: CapturePlan, pipeline: Pipeline) -> str:
    """Return the function of a row's state.

    The inner function sees everything, and is asked only for a row that the caller may see.
    """
    same = " AND ".join(
        f"s.{quote_ident(column.source_name)} = ($1)[{place}]::{_unbounded(column.type)}"
        for place, column in enumerate(plan.keys, 1)
    )
    texts = ", ".join(f"s.{quote_ident(column.source_name)}::{column.type}::text" for column in plan.keys)
    return f"""CREATE OR REPLACE FUNCTION {pipeline.search_function("state")}(key_texts text[])
        RETURNS TABLE (state text, since timestamptz, reason text) LANGUAGE sql VOLATILE {_KEY_FORMAT}
        BEGIN ATOMIC
            SELECT r.state, r.since, r.reason FROM {plan.rows} AS s
            CROSS JOIN LATERAL embedline_data._row_state(
                {quote_literal(plan.name).strip()}, {pipeline.version.number}, ARRAY[{texts}]) AS r
            WHERE {same};
        END"""


def _stored(plan: CapturePlan, pipeline: Pipeline) -> str:
    """Return the function of the hashes and prefixes of the chunks."""
    join = " AND ".join(f"c.{quote_ident(key.name)} = s.{quote_ident(key.source_name)}" for key in plan.keys)
    return f"""CREATE OR REPLACE FUNCTION {pipeline.search_function("stored")}()
        RETURNS TABLE (chunk_id bigint, content_hash uuid, prefix text) LANGUAGE sql STABLE PARALLEL SAFE
        BEGIN ATOMIC
            SELECT c.chunk_id, c.content_hash, c.prefix FROM {pipeline.chunk} AS c
            JOIN {plan.rows} AS s ON {join} WHERE {is_shown(plan, "c")};
        END"""


def _unbounded(type_name: str) -> str:
    """Return a type without its length.

    A cast to a length cuts a longer value short, and another row's key would be found.
    """
    name = _LENGTH.sub("", type_name)
    return _UNBOUNDED.get(name, name)
