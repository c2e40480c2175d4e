"""How much a resident worker takes on: models with room, and batch sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from embedline.catalog.settings import PacingLimits
from embedline.catalog.values import WorkKey
from embedline.postgres.session import Session
from embedline.worker.batch import Batch
from embedline.worker.batch_size import Pace
from embedline.worker.work_source import LIKELY_ROW_BYTES, WorkSource

# Bytes that all batches in flight may take; another one is claimed only below this.
_MEMORY = 96 * 1024 * 1024
# Requests that a model host works on at a time: one slice after the other.
_LOCAL_DEPTH = 1
# Bytes of content of a token of English.
_BYTES_A_TOKEN = 4
_DEPTHS = """
    SELECT DISTINCT m.model_id, m.provider, m.concurrency
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
    JOIN embedline.model AS m ON m.model_id = v.model_id
    WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1)
"""


class Capacity:
    """The models of the pipelines, and how many requests each works on at a time."""

    def __init__(self, depths: dict[int, int] | None = None, at_least: int = 1) -> None:
        self._depths = depths or {}
        self._at_least = at_least
        self.providers: set[str] = set()

    def reload(self, session: Session, pipeline_name: str | None) -> None:
        """Read the models of all pipelines, or of the one named.

        One may have come while all others' models are busy.
        """
        models = session.query(_DEPTHS, ["text"], pipeline_name)
        self._depths = {
            int(row["model_id"]): max(_depth(str(row["provider"]), int(row["concurrency"])), self._at_least)
            for row in models
        }
        self.providers = {str(row["provider"]) for row in models}

    @property
    def is_known(self) -> bool:
        """Return False before the models were read."""
        return bool(self._depths)

    def models_with_room(self, batches: Sequence[Batch], current: Batch | None) -> set[int]:
        """Return the models that can take another batch.

        A slow provider holds up no other.
        """
        if sum(batch.memory for batch in batches) >= _MEMORY:
            return set()
        waiting, count = Counter[int](), Counter[int]()
        for batch in batches:
            model_id = batch.pipeline.version.model.model_id
            count[model_id] += 1
            waiting[model_id] += max(batch.first_requests, 1 if batch is current else 0)
        # As many requests again wait behind those in flight: the provider never runs dry while the next batch is read.
        # Batches that are searched for the text that fails do not count: they would keep new rows out for as long.
        return {i for i, depth in self._depths.items() if waiting[i] < 2 * depth and count[i] <= depth}

    def with_room(
        self, sources: Sequence[WorkSource], batches: Sequence[Batch], current: Batch | None
    ) -> list[WorkSource]:
        """Return the sources whose model can take another batch."""
        models = self.models_with_room(batches, current)
        # A model that has come since the last report has had nothing to do yet.
        ids = ((source, source.pipeline.version.model.model_id) for source in sources)
        return [source for source, model_id in ids if model_id in models or model_id not in self._depths]


class Paces:
    """The batch size of each source."""

    def __init__(self, limits: PacingLimits) -> None:
        self._limits = limits
        self._paces: dict[WorkKey, Pace] = {}

    def of(self, source: WorkSource) -> Pace:
        """Return the pace of a source, with a guess of its rows' size before any was read."""
        tokens = source.pipeline.spec.tokens
        chunk_bytes = None if tokens is None else tokens * _BYTES_A_TOKEN
        if source.key not in self._paces:
            self._paces[source.key] = Pace(self._limits, chunk_bytes or LIKELY_ROW_BYTES, chunk_bytes)
        pace = self._paces[source.key]
        if not pace.is_measured:
            likely = source.likely_row_bytes()
            if likely is not None:
                pace.guess(likely)
        return pace

    def slow_down(self) -> None:
        """Halve the batches of all sources."""
        for pace in self._paces.values():
            pace.slow_down()

    @property
    def most_rows(self) -> int | None:
        """The largest next batch; None before the first."""
        return max((pace.rows for pace in self._paces.values()), default=None)


def _depth(provider: str, concurrency: int) -> int:
    return _LOCAL_DEPTH if provider == "sentence-transformers" else concurrency
