"""Search by a subject's derived vector: "more for this reader"."""

from __future__ import annotations

from typing import Any

from embedline.catalog.derived import load_derived
from embedline.catalog.load import load_pipeline
from embedline.core import names
from embedline.errors import InvalidParameter, NotFound
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.search.ranking import Ranker, Row, as_result

_MAX_K = 10_000
# Rows asked for first for each row wanted, if rows that the subject had are left out; and the factor of each next try.
_SPARE, _MORE = 2, 4
_SHOWN = ("key", "chunk", "score", "chunk_start", "chunk_end")


@entry_point
def search_derived(
    session: Session, name: str, subject: str | None, k: int, leave_out_seen: bool | None, per_document: bool | None
) -> list[dict[str, Any]]:
    """Return the k rows nearest to a subject's vector, or the k nearest chunks.

    None for a subject that has no vector, or of whom the caller may read no event.
    """
    require_given(subject=subject, k=k, leave_out_seen=leave_out_seen, per_document=per_document)
    if not 1 <= k <= _MAX_K:
        raise InvalidParameter(f"k must be between 1 and {_MAX_K}, not {k}")
    derived = load_derived(session, name)
    pipeline = load_pipeline(session, derived.pipeline)
    function = derived.search_function(names.derived_version(pipeline.version.number))
    if session.scalar("SELECT to_regproc($1) IS NULL", ["text"], function):
        raise NotFound(
            f'version {pipeline.version.number} of pipeline "{pipeline.name}" has no derived vectors "{name}" yet',
            hint="A worker creates them: CALL embedline.run_worker(until_idle => true);",
        )
    vector = session.scalar(f"SELECT {function}($1::{derived.subject_type})::text", ["text"], subject)
    if vector is None:
        return []
    seen: set[str] = set()
    if leave_out_seen:
        sql = f"SELECT s.item FROM {derived.search_function('seen')}($1::{derived.subject_type}) AS s (item)"
        seen = {str(row["item"]) for row in session.query(sql, ["text"], subject)}
    rows = _nearest(Ranker(session, pipeline), str(vector), k, seen, per_document=bool(per_document))
    shown = [as_result(pipeline, row, place) for place, row in enumerate(rows, 1)]
    return [{name: row[name] for name in _SHOWN} for row in shown]


def _nearest(ranker: Ranker, vector: str, k: int, seen: set[str], *, per_document: bool) -> list[Row]:
    """Return the k nearest rows that are not in `seen`.

    More are ranked until there are enough or no more.
    """
    limit = k if not seen else k + min(len(seen), _SPARE * k)
    while True:
        found = ranker.nearest(vector, limit, per_document=per_document)
        left = [row for row in found if row["key"] not in seen]
        if len(left) >= k or len(found) < limit:
            return left[:k]
        limit *= _MORE
