"""The sources of work of one session, and its memory of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from embedline.catalog.load import (
    load_active_pipelines,
    load_all_pipelines,
    load_fills,
    load_fills_by_id,
    load_pipelines_by_id,
)
from embedline.catalog.values import Pipeline, WorkKey
from embedline.postgres.claims import Claims
from embedline.postgres.session import Session
from embedline.worker.source_rows import Memory, SourceRows
from embedline.worker.version_chunks import VersionChunks
from embedline.worker.work_source import WorkSource


class WorkSources:
    """Loads the sources of work that a session claims from."""

    def __init__(self, session: Session, claims: Claims) -> None:
        self._session = session
        self._claims = claims
        self._memories = defaultdict[int, Memory](Memory)

    def load(self, keys: Collection[WorkKey]) -> list[WorkSource]:
        """Return the sources with these keys that workers serve now."""
        pipelines = load_pipelines_by_id(self._session, [key.number for key in keys if key.kind == "pipeline"])
        fills = load_fills_by_id(self._session, [key.number for key in keys if key.kind == "version"])
        return [*map(self._rows, pipelines), *map(self._chunks, fills)]

    def load_active(self, pipeline_name: str | None) -> list[WorkSource]:
        """Return all sources that workers serve now, or those of the pipeline named.

        Versions beside the serving ones come last: their backfills can be closed only after those.
        """
        pipelines = load_active_pipelines(self._session, pipeline_name)
        fills = load_fills(self._session, pipeline_name)
        return [*map(self._rows, pipelines), *map(self._chunks, fills)]

    def load_all(self) -> list[SourceRows]:
        """Return the source rows of every pipeline, in whatever state."""
        return list(map(self._rows, load_all_pipelines(self._session)))

    def _rows(self, pipeline: Pipeline) -> SourceRows:
        return SourceRows(self._session, self._claims, pipeline, self._memories[pipeline.pipeline_id])

    def _chunks(self, pipeline: Pipeline) -> VersionChunks:
        return VersionChunks(self._session, self._claims, pipeline)
