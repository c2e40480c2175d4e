"""Write pairs for fine-tuning from the searches that were noted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.core.query_hash import query_hash
from embedline.core.text import repair_text
from embedline.errors import InvalidParameter, NotReady, UnusableText
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.search import modes
from embedline.search.request import SearchRequest

_MOST = 100_000
_NOTED = """
    SELECT query, max(asked_at)::text AS at FROM embedline.query_sample WHERE pipeline_id = $1
    GROUP BY query ORDER BY max(asked_at) DESC, query
"""
_CANARIES = "SELECT query FROM embedline.canary WHERE pipeline_id = $1"
_COLUMNS = """
    SELECT a.attname AS name, t.typcategory AS category FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = $1::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""
# The columns of pairs with their values; a table may lack those that are not required.
_VALUES = {"query": "p.query", "key": "p.key", "grade": "1", "source": "p.source", "at": "p.at::pg_catalog.timestamptz"}
_REQUIRED = ("query", "key")
_CREATE = (
    "CREATE TABLE pair (query text NOT NULL, key text NOT NULL, grade numeric NOT NULL DEFAULT 1, source text,"
    " at timestamptz);"
)


@entry_point
def collect_pairs(
    session: Session, pipeline_name: str, table: str | None, query_count: int, reranker: str | None
) -> list[dict[str, Any]]:
    """Add noted queries with their rows to a table; return how many had which outcome.

    A row is taken if ranking by words and by vectors put it first, or if a reranker does.
    """
    require_given(pairs=table, query_count=query_count)
    if not 1 <= query_count <= _MOST:
        raise InvalidParameter(f"query_count must be between 1 and {_MOST}, not {query_count}")
    require_control(session, pipeline_name)
    pipeline = load_pipeline(session, pipeline_name)
    if reranker is None and pipeline.keyword is None:
        raise InvalidParameter(
            f'pipeline "{pipeline_name}" has no keyword index, so nothing confirms what its vectors find',
            hint=f"SELECT embedline.alter_pipeline('{pipeline_name}', keyword => 'english'); or give a reranker.",
        )
    columns = _columns(session, str(table))
    noted = session.query(_NOTED, ["bigint"], pipeline.pipeline_id)
    if not noted:
        raise NotReady(
            f'no search of pipeline "{pipeline_name}" was noted',
            hint=f"SELECT embedline.sample_queries('{pipeline_name}', 0.1); notes a tenth of the searches from now on.",
        )
    known = _hashes(session.execute(f"SELECT query::pg_catalog.text AS query FROM {table}"))
    canaries = _hashes(session.query(_CANARIES, ["bigint"], pipeline.pipeline_id))
    outcomes: Counter[str] = Counter()
    found: list[tuple[str, str, str]] = []
    for row in noted:
        if outcomes["collected"] == query_count:
            break
        query = str(row["query"])
        digest = query_hash(query)
        if digest in canaries or digest in known:
            outcomes["canary" if digest in canaries else "there already"] += 1
            continue
        known.add(digest)
        key = _answer(session, pipeline, query, reranker)
        outcomes["no sure answer" if key is None else "collected"] += 1
        if key is not None:
            found.append((query, key, str(row["at"])))
    _insert(session, str(table), columns, found, "captured" if reranker is None else f"captured, {reranker}")
    order = ("collected", "no sure answer", "there already", "canary")
    return [{"outcome": outcome, "queries": outcomes[outcome]} for outcome in order]


def _hashes(rows: Sequence[dict[str, Any]]) -> set[str]:
    return {query_hash(str(row["query"])) for row in rows if row["query"] is not None}


def _columns(session: Session, table: str) -> list[str]:
    present = {str(row["name"]): str(row["category"]) for row in session.query(_COLUMNS, ["text"], table)}
    for name in _REQUIRED:
        if present.get(name) != "S":
            raise InvalidParameter(f"{table} has no column {name} of type text", hint=_CREATE)
    return [name for name in _VALUES if name in present]


def _answer(session: Session, pipeline: Pipeline, query: str, reranker: str | None) -> str | None:
    """Return the key of the row that answers a query; None if that is not sure."""
    try:
        text = repair_text(query)
    except UnusableText:
        return None
    request = SearchRequest.of_documents(text, 1)
    if reranker is not None:
        mode = "vector" if pipeline.keyword is None else "hybrid"
        return next(_keys(session, pipeline, replace(request, mode=mode, reranker=reranker)), None)
    by_words, by_vectors = (
        next(_keys(session, pipeline, replace(request, mode=mode)), None) for mode in ("keyword", "vector")
    )
    return by_words if by_words == by_vectors else None


def _keys(session: Session, pipeline: Pipeline, request: SearchRequest) -> Iterator[str]:
    # Not by embedline.search, which would note the query as one of a user's.
    return (str(row["key"]) for row in modes.rank(session, pipeline, request))


def _insert(
    session: Session, table: str, columns: Sequence[str], found: Sequence[tuple[str, str, str]], source: str
) -> None:
    if found:
        values = ", ".join(_VALUES[name].replace("p.source", "$4") for name in columns)
        session.query(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values}"
            " FROM unnest($1, $2, $3) AS p (query, key, at) WHERE $4 IS NOT NULL",
            ["text[]", "text[]", "text[]", "text"],
            *(list(column) for column in zip(*found, strict=True)), source,
        )  # fmt: skip
