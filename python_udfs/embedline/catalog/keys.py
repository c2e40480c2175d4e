"""Build SQL over the keys of a pipeline's rows.

Keys are converted to JSON and back, and looked up in the queue.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from embedline.catalog.values import Pipeline
from embedline.core.sql_text import quote_ident, quote_literal


def json_names(pipeline: Pipeline) -> tuple[str, ...]:
    """Return the names of the key columns, without the prefix of generated tables.

    embedline.dead_letter.key and the findings of verify use them.
    """
    return tuple(column.removeprefix("key_") for column in pipeline.key_columns)


def key_json(pipeline: Pipeline, key: Sequence[str]) -> str:
    """Return a key as embedline.dead_letter stores it.

    That is a JSON object of source column to text value.
    """
    return json.dumps(dict(zip(json_names(pipeline), key, strict=True)))


def as_json(pipeline: Pipeline, alias: str) -> str:
    """Return SQL for a relation's key as jsonb, each column as text.

    This is the form of embedline.dead_letter.key.
    """
    pairs = ", ".join(
        f"{quote_literal(name)}, {alias}.{quote_ident(column)}::text"
        for name, column in zip(json_names(pipeline), pipeline.key_columns, strict=True)
    )
    return f"jsonb_build_object({pairs})"


def from_json(pipeline: Pipeline, value: str) -> str:
    """Return a select list of the typed key columns in such a jsonb value."""
    return ", ".join(
        f"({value} ->> {quote_literal(name)})::{key_type} AS {quote_ident(column)}"
        for name, key_type, column in zip(json_names(pipeline), pipeline.key_types, pipeline.key_columns, strict=True)
    )


def not_queued(pipeline: Pipeline, alias: str) -> str:
    """Return the condition that no change of a key waits or is in flight.

    A claim stays until its keys are done.
    """
    taken = ", ".join(f"i.{quote_ident(column)}" for column in pipeline.key_columns)
    same = pipeline.key_join("q", alias)
    return f"NOT EXISTS (SELECT FROM {pipeline.outbox} AS q WHERE {same})" + "".join(
        f" AND NOT EXISTS (SELECT FROM {pipeline.generated(table)} AS i"
        f" CROSS JOIN LATERAL unnest({taken}) AS q ({pipeline.key_list}) WHERE {same})"
        for table in ("inbox", "deleted", "claim")
    )
