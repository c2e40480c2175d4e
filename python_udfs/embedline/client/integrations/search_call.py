"""Write calls of `embedline.search` with the given arguments alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Arguments of the SQL function besides the pipeline's name, the query and k. Each stands in the statement by its name.
OPTIONS = frozenset(
    {
        "ef_search",
        "explain",
        "filter",
        "keyword_weight",
        "mode",
        "per_document",
        "reranker",
        "rrf_k",
        "semantic_weight",
        "session_key",
        "tenant",
        "window_size",
    }
)
# Columns that a result shows besides the text and its key.
_SHOWN = ("score", "semantic_rank", "keyword_rank", "chunk_start", "chunk_end")


def search_call(options: Mapping[str, Any]) -> str:
    """Return the call as it stands after FROM, with named parameters of psycopg.

    Raises TypeError for an option that the function has not. An option that is None is left to the server.
    """
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise TypeError(f"embedline.search has no argument {', '.join(unknown)}")
    given = "".join(f", {name} => %({name})s" for name, value in options.items() if value is not None)
    return f"embedline.search(%(pipeline)s, %(query)s, %(k)s::integer{given})"


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result's score, ranks and offsets, if there are any."""
    return {name: row[name] for name in _SHOWN if row.get(name) is not None}
