"""Search several pipelines whose vectors are of one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedline.catalog.load import load_pipeline
from embedline.catalog.values import Pipeline
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.postgres.spans import span, start_exporters
from embedline.search import query_vector
from embedline.search.ranking import as_result, serving_ranker

_MAX_K, _MAX_PIPELINES = 10_000, 100
_SHOWN = ("key", "chunk", "score", "chunk_start", "chunk_end")


@entry_point
def search_across(
    session: Session, pipeline_names: Sequence[str | None], query: str, k: int, per_document: bool | None
) -> list[dict[str, Any]]:
    """Return the k best chunks of several pipelines for a text, or documents.

    Rows are of pipeline, key, chunk, score, chunk_start, chunk_end.
    """
    return _search(session, pipeline_names, query, k, per_document=per_document)


@entry_point
def search_across_media(
    session: Session, pipeline_names: Sequence[str | None], query: bytes, k: int, per_document: bool | None
) -> list[dict[str, Any]]:
    """Return the k best chunks of several pipelines for a file, or documents.

    Rows are those of search_across.
    """
    return _search(session, pipeline_names, query, k, per_document=per_document)


def _search(
    session: Session,
    pipeline_names: Sequence[str | None],
    query: str | bytes,
    k: int,
    *,
    per_document: bool | None,
) -> list[dict[str, Any]]:
    require_given(pipeline_names=pipeline_names, query=query, k=k, per_document=per_document)
    if not 1 <= k <= _MAX_K:
        raise InvalidParameter(f"k must be between 1 and {_MAX_K}, not {k}")
    names = list(dict.fromkeys(name for name in pipeline_names if name is not None))
    if not 1 <= len(names) <= _MAX_PIPELINES:
        raise InvalidParameter(
            f"pipeline_names must name 1 to {_MAX_PIPELINES} pipelines, not {len(names)}",
            hint="SELECT pipeline FROM embedline.status lists the pipelines.",
        )
    pipelines = [load_pipeline(session, name) for name in names]
    _require_one_space(pipelines)
    start_exporters(session)
    pending = query_vector.start(session, pipelines[0], query)
    try:
        rankers = [serving_ranker(session, pipeline, None) for pipeline in pipelines]
    except BaseException:
        pending.cancel()
        raise
    vector = query_vector.finish(pipelines[0], pending)
    found: list[dict[str, Any]] = []
    for pipeline, ranker in zip(pipelines, rankers, strict=True):
        with span("search", {"pipeline": pipeline.name}):
            rows = ranker.nearest(vector, k, per_document=bool(per_document))
        shown = [as_result(pipeline, row, place) for place, row in enumerate(rows, 1)]
        found += [{"pipeline": pipeline.name, **{name: row[name] for name in _SHOWN}} for row in shown]
    # Sorting is stable: rows that score alike stay in the order of the pipelines, and of their keys.
    return sorted(found, key=lambda row: -float(row["score"]))[:k]


def _require_one_space(pipelines: Sequence[Pipeline]) -> None:
    """Raise InvalidParameter unless the vectors of all can be compared."""
    first, *others = pipelines
    for other in others:
        if _space(other) != _space(first):
            raise InvalidParameter(
                f'the vectors of pipelines "{first.name}" and "{other.name}" are of different spaces',
                detail=f"{_described(first)}; {_described(other)}. Scores of different spaces cannot be compared.",
                hint=f"Search each by itself, or give both one model: SELECT embedline.add_embedding_version("
                f"'{other.name}', '{first.version.model.config.name}');",
            )


def _space(pipeline: Pipeline) -> tuple[object, ...]:
    """Return what two versions share whose vectors can be compared."""
    version = pipeline.version
    return (version.model.fingerprint, version.model.probed_fingerprint, version.dimensions, version.distance)


def _described(pipeline: Pipeline) -> str:
    version = pipeline.version
    return (
        f'"{pipeline.name}" is served by model "{version.model.config.name}", {version.dimensions} dimensions,'
        f" distance {version.distance}"
    )
