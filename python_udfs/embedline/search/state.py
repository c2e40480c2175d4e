"""Tell whether searches find a row as it is now, and if not, why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.values import Pipeline
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

_ABSENT = {"state": "absent", "since": None, "reason": "the source has no row of this key that you may read"}


@entry_point
def state(session: Session, pipeline_name: str, key: str, version: int | None) -> list[dict[str, Any]]:
    """Return the state of one row, since when, and the reason.

    The source is read with the caller's rights: a row that is hidden from the caller is absent.
    """
    require_given(key=key)
    pipeline = (
        load_pipeline(session, pipeline_name) if version is None else load_version(session, pipeline_name, version)
    )
    query = f"SELECT r.state, r.since::text AS since, r.reason FROM {pipeline.search_function('state')}($1) AS r"
    try:
        with session.plpy.subtransaction():
            found = session.query(query, ["text[]"], _key_texts(pipeline, key))
    except Exception as error:
        # A text that the key's type does not read.
        if sqlstate_of(error)[:2] != "22":
            raise
        raise InvalidParameter(f"{key} is no key of pipeline {pipeline.name}: {error}", hint=_hint(pipeline)) from error
    return found or [_ABSENT]


def _key_texts(pipeline: Pipeline, key: str) -> Sequence[str]:
    """Return the text of each column of a key as search returns it."""
    count = len(pipeline.key_columns)
    if count == 1:
        return [key]
    try:
        parts = json.loads(key)
    except ValueError:
        parts = None
    if not isinstance(parts, list) or len(parts) != count or not all(isinstance(part, str | int) for part in parts):
        raise InvalidParameter(f"{key} is no key of pipeline {pipeline.name}", hint=_hint(pipeline))
    return [part if isinstance(part, str) else json.dumps(part) for part in parts]


def _hint(pipeline: Pipeline) -> str:
    names = [pipeline.view_columns[column] for column in pipeline.key_columns]
    shown = f"the text of {names[0]}" if len(names) == 1 else f"a JSON array of the texts of {', '.join(names)}"
    return f"Give the key as embedline.search returns it: {shown}."
