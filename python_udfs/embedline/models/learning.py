"""Keep with a model the facts that its endpoint's answers show.

No other session has to find them out again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session

_REMARK = "the provider's answers have no usable index, so its vectors are taken in the order of the texts"
# Skips a locked row, because another session is learning the same or alter_model is at work. The next answer tries again.
_KEEP = """
    UPDATE embedline.model AS m SET learned = m.learned || $2 WHERE m.model_id IN (
        SELECT model_id FROM embedline.model WHERE model_id = $1 AND base_url IS NOT DISTINCT FROM $3 AND NOT learned @> $2
        FOR NO KEY UPDATE SKIP LOCKED)
    RETURNING m.model_id
"""


def keep(session: Session, pipeline: Pipeline, learned: Mapping[str, str]) -> str | None:
    """Store new facts about the pipeline's model.

    Returns a remark for the status, the first time only.
    """
    model = pipeline.version.model
    new = {name: value for name, value in learned.items() if model.config.learned.get(name) != value}
    if not new:
        return None
    # An answer of the earlier endpoint says nothing about one that alter_model has set since.
    types = ["bigint", "jsonb", "text"]
    kept = session.query(_KEEP, types, model.model_id, json.dumps(new), model.config.base_url)
    return f'model "{model.config.name}": {_REMARK}' if kept and "index" in new else None


def is_error(last_error: str | None) -> bool:
    """Return True for an error, False for a remark of `keep`.

    A success clears an error, but not a remark.
    """
    return last_error is not None and not last_error.endswith(_REMARK)
