"""Keep a gate's queries apart from the pairs that a model was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from embedline.catalog.values import Model, Pipeline
from embedline.core.query_hash import query_hash
from embedline.core.sql_text import quote_literal
from embedline.errors import InvalidParameter
from embedline.postgres.session import Session

# The trainings of a model and of the models that it was made from. A directory may be registered under several names, and
# with options that change its fingerprint.
_LINEAGE = """
    WITH RECURSIVE lineage AS (
        SELECT t.training_id, t.base_model, t.base_fingerprint FROM embedline.training AS t
        WHERE t.model_id = $1 OR t.model_fingerprint = $2 OR t.model = $3
        UNION
        SELECT t.training_id, t.base_model, t.base_fingerprint FROM lineage AS l
        JOIN embedline.training AS t ON t.model_fingerprint = l.base_fingerprint OR t.model = l.base_model
    )
"""
_TRAINED = f"""
    {_LINEAGE}
    SELECT DISTINCT p.query_hash FROM lineage AS l JOIN embedline.training_pair AS p ON p.training_id = l.training_id
    WHERE NOT p.is_held_out AND p.query_hash = ANY ($4)
"""
_CANARIES = "SELECT query FROM embedline.canary WHERE pipeline_id = $1 ORDER BY position"


def require_untrained(session: Session, models: Iterable[Model], queries: Sequence[str], table: str) -> None:
    """Raise InvalidParameter if a model was trained on one of the queries.

    It would be measured by what it has seen. `table` is where the queries stand, for the error.
    """
    by_hash: dict[str, str] = {}
    for query in queries:
        by_hash.setdefault(query_hash(query), query)
    for model in {model.model_id: model for model in models}.values():
        rows = session.query(
            _TRAINED, ["bigint", "text", "text", "text[]"],
            model.model_id, model.fingerprint, model.config.model, list(by_hash),
        )  # fmt: skip
        if rows:
            first = by_hash[min(str(row["query_hash"]) for row in rows)]
            raise InvalidParameter(
                f'model "{model.config.name}" was trained on {len(rows)} of the {len(by_hash)} queries in {table}',
                detail=f"One is {first!r}. A gate on queries that the model has seen tells nothing.",
                hint=_hint(model, table),
            )


def require_untrained_canaries(session: Session, pipeline: Pipeline, model: Model) -> None:
    """Raise InvalidParameter if a model was trained on canaries of the pipeline."""
    queries = [str(row["query"]) for row in session.query(_CANARIES, ["bigint"], pipeline.pipeline_id)]
    if queries:
        require_untrained(session, [model], queries, f'the canaries of pipeline "{pipeline.name}"')


def _hint(model: Model, table: str) -> str:
    seen = (
        "SELECT p.query_hash FROM embedline.training_pair AS p JOIN embedline.training AS t USING (training_id)"
        f" WHERE t.model = {quote_literal(model.config.model)} AND NOT p.is_held_out"
    )
    if table.startswith("the canaries"):
        return (
            "SELECT embedline.set_canaries('pipeline', 'table'); takes other canaries, without those of " + seen + "."
        )
    return f"DELETE FROM {table} WHERE embedline.query_hash(query) IN ({seen});"
