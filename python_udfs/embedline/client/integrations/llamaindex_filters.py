"""Write LlamaIndex's metadata filters as SQL conditions.

The conditions are over a column `metadata` of type jsonb. They say what `build_metadata_filter_fn` of
llama_index.core says of the same metadata. All values are literals, so no text of a filter is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from embedline.core.sql_text import quote_literal

_COMPARISONS = {
    FilterOperator.GT: ">",
    FilterOperator.GTE: ">=",
    FilterOperator.LT: "<",
    FilterOperator.LTE: "<=",
}


def condition_of(filters: MetadataFilters | None) -> str | None:
    """Return the condition of a tree of filters; None if it asks for nothing.

    Raises ValueError for an operator that is not known, and TypeError for a value that an operator cannot take.
    """
    if filters is None or not filters.filters:
        return None
    parts = [
        condition_of(found) if isinstance(found, MetadataFilters) else _condition(found) for found in filters.filters
    ]
    given = [f"({part})" for part in parts if part is not None]
    if not given:
        return None
    if filters.condition == FilterCondition.NOT:
        return f"NOT ({' OR '.join(given)})"
    return f"({(' OR ' if filters.condition == FilterCondition.OR else ' AND ').join(given)})"


def is_one_of(key: str | None, texts: Sequence[str]) -> str:
    """Return the condition that a text of the metadata is one of these.

    Without a key it is the id of the row.
    """
    of_row = "id" if key is None else f"metadata ->> {quote_literal(key)}"
    listed = ", ".join(map(quote_literal, texts))
    return f"coalesce({of_row} = ANY(ARRAY[{listed}]::text[]), false)"


def _condition(asked: MetadataFilter) -> str:
    value = f"(metadata -> {quote_literal(asked.key)})"
    if asked.operator == FilterOperator.IS_EMPTY:
        return f"coalesce({value} IN ('null', '[]', '\"\"'), true)"
    if asked.operator not in _WRITERS:
        raise ValueError(f"there is no filter operator {asked.operator}")
    # A node without the key is accepted by != and nin alone.
    is_negative = asked.operator in (FilterOperator.NE, FilterOperator.NIN)
    return f"coalesce({_WRITERS[asked.operator](value, asked.value, asked.operator)}, {str(is_negative).lower()})"


def _json(value: Any) -> str:
    return f"{quote_literal(json.dumps(value, ensure_ascii=False))}::jsonb"


def _listed(value: Any, operator: FilterOperator) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"filter operator {operator.value} takes a list")
    return value


def _text(value: Any, operator: FilterOperator) -> str:
    if not isinstance(value, str):
        raise TypeError(f"filter operator {operator.value} takes a text")
    return quote_literal(value)


def _equals(field: str, value: Any, operator: FilterOperator) -> str:
    return f"nullif({field}, 'null') {'=' if operator == FilterOperator.EQ else '<>'} {_json(value)}"


def _compares(field: str, value: Any, operator: FilterOperator) -> str:
    sign = _COMPARISONS[operator]
    if isinstance(value, str):
        # By code points, as Python compares, whatever the database's collation is.
        return f"jsonb_typeof({field}) = 'string' AND ({field} #>> '{{}}') COLLATE \"C\" {sign} {quote_literal(value)}"
    if not isinstance(value, int | float):
        raise TypeError(f"filter operator {operator.value} takes a number or a text")
    return f"jsonb_typeof({field}) = 'number' AND {field} {sign} {_json(value)}"


def _is_in(field: str, value: Any, operator: FilterOperator) -> str:
    listed = ", ".join(_json(item) for item in _listed(value, operator))
    negated = "NOT " if operator == FilterOperator.NIN else ""
    return f"{negated}(nullif({field}, 'null') = ANY(ARRAY[{listed}]::jsonb[]))"


def _has(field: str, value: Any, _: FilterOperator) -> str:
    """An element of an array, or a part of a text."""
    part = f"strpos({field} #>> '{{}}', {quote_literal(value)}) > 0" if isinstance(value, str) else "false"
    return (
        f"CASE jsonb_typeof({field}) WHEN 'array' THEN {field} @> jsonb_build_array({_json(value)})"
        f" WHEN 'string' THEN {part} ELSE false END"
    )


def _has_several(field: str, value: Any, operator: FilterOperator) -> str:
    parts = [f"({_has(field, item, operator)})" for item in _listed(value, operator)]
    if operator == FilterOperator.ANY:
        return " OR ".join(parts) or "false"
    return " AND ".join([f"nullif({field}, 'null') IS NOT NULL", *parts])


def _matches(field: str, value: Any, operator: FilterOperator) -> str:
    return f"jsonb_typeof({field}) = 'string' AND strpos({field} #>> '{{}}', {_text(value, operator)}) > 0"


def _matches_in_any_case(field: str, value: Any, operator: FilterOperator) -> str:
    text = _text(value, operator)
    return f"jsonb_typeof({field}) = 'string' AND strpos(lower({field} #>> '{{}}'), lower({text})) > 0"


_WRITERS: dict[FilterOperator, Callable[[str, Any, FilterOperator], str]] = {
    FilterOperator.EQ: _equals,
    FilterOperator.NE: _equals,
    **dict.fromkeys(_COMPARISONS, _compares),
    FilterOperator.IN: _is_in,
    FilterOperator.NIN: _is_in,
    FilterOperator.CONTAINS: _has,
    FilterOperator.ANY: _has_several,
    FilterOperator.ALL: _has_several,
    FilterOperator.TEXT_MATCH: _matches,
    FilterOperator.TEXT_MATCH_INSENSITIVE: _matches_in_any_case,
}
