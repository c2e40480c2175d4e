"""Store the labelled queries of a pipeline, which its checks of quality ask."""

from __future__ import annotations

import json
from typing import Any

from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import require_control
from embedline.core.json_values import as_list
from embedline.errors import InvalidParameter
from embedline.gate.queries import load_queries
from embedline.postgres.entry import calling_ours, entry_point
from embedline.postgres.session import Session

# Queries of a check. 1,000 show a fall of 2 points; each is embedded again with every check.
_MOST = 1000
_STORE = """
    INSERT INTO embedline.canary (pipeline_id, position, query, grades)
    SELECT $1, q.position, q.element ->> 'query', q.element -> 'grades'
    FROM jsonb_array_elements($2) WITH ORDINALITY AS q (element, position)
"""


@entry_point
def set_canaries(session: Session, pipeline_name: str, table: str | None) -> int:
    """Copy the canaries of a table, with its reader's rights; return their number.

    Without a table the pipeline has no canaries any more.
    """
    queries: list[dict[str, Any]] = []
    if table is not None:
        found = load_queries(session, [load_pipeline(session, pipeline_name)], table, 0, None, 0)
        queries = [{"query": text, "grades": grades} for text, grades in zip(found.words, found.grades, strict=True)]
        if len(queries) > _MOST:
            raise InvalidParameter(
                f"{table} has {len(queries)} queries, and a check asks {_MOST} at most",
                hint=f"CREATE TABLE canary_sample AS SELECT * FROM {table} WHERE query IN"
                f" (SELECT DISTINCT query FROM {table} ORDER BY query LIMIT {_MOST});",
            )
    with calling_ours(session):
        session.query("SELECT embedline._store_canaries($1, $2)", ["text", "jsonb"], pipeline_name, json.dumps(queries))
    return len(queries)


@entry_point
def store_canaries(session: Session, pipeline_name: str, queries: str) -> None:
    """Replace the canaries of a pipeline, and forget what the earlier ones measured.

    Only set_canaries calls it.
    """
    require_control(session, pipeline_name)
    # A text among jsonb values arrives here without its quotes.
    if not queries.startswith("["):
        raise InvalidParameter("the canaries are not a list")
    pipeline_id = load_pipeline(session, pipeline_name).pipeline_id
    for statement in (
        "DELETE FROM embedline.canary WHERE pipeline_id = $1",
        "DELETE FROM embedline.quality_baseline WHERE pipeline_id = $1 AND kind = 'canary'",
        "DELETE FROM embedline.quality_check WHERE pipeline_id = $1 AND kind = 'canary'",
    ):
        session.query(statement, ["bigint"], pipeline_id)
    if as_list(json.loads(queries)):
        session.query(_STORE, ["bigint", "jsonb"], pipeline_id, queries)
