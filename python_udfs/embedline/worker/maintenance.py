"""Work beside embedding: close backfills, maintain and measure indexes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from embedline.catalog.health import isolate_failure
from embedline.catalog.values import WorkKey
from embedline.keywords.build import build
from embedline.models.query_embedding import keep_warm
from embedline.postgres.claims import Claims
from embedline.postgres.session import Session
from embedline.queue import signals
from embedline.search.index_recall import Measurement
from embedline.worker.batch_jobs import BatchJobs
from embedline.worker.derivation import Derivation
from embedline.worker.index_maintenance import unfinished
from embedline.worker.work_source import WorkSource

_SECONDS = 5.0
# Pipelines that are maintained together; the locks of their tables are held together.
_MAINTAINED = 32
# Pipelines without writes are maintained one after the other; each round takes this many times as long as its work.
_ROUND_COST = 200
# Seconds that an idle worker measures an index before it asks for changes again.
_MEASURE_SECONDS = 0.05
_END = object()


class Maintenance:
    """Maintenance of one worker.

    `asking` is told which source is worked on, so that a failure is the fault of that one.
    """

    def __init__(
        self,
        session: Session,
        pipeline_name: str | None,
        asking: Callable[[WorkSource], None],
        claims: Claims | None = None,
    ) -> None:
        self._session = session
        self._pipeline_name = pipeline_name
        self._asking = asking
        # When idle, and at the latest.
        self._due_at, self._overdue_at = 0.0, time.monotonic() + _SECONDS
        # Pipelines to maintain: those written to, and a round of all.
        self._touched: set[int] = set()
        self._round: list[int] = []
        self._visit_at = 0.0
        self._unmeasured: list[WorkSource] = []
        # The measurement of an index that is under way, and the versions that this worker has measured.
        self._measuring: tuple[WorkSource, Iterator[None]] | None = None
        self._seen_versions: set[tuple[int, int | None]] = set()
        # Pipelines whose chunks may wait for their first entry in the keyword index.
        self._unindexed: dict[WorkKey, WorkSource] = {}
        self._derivation = Derivation(session, pipeline_name)
        # With claims, it deals with the batches of providers, too.
        self._batches = None if claims is None else BatchJobs(session, claims, pipeline_name)

    def touch(self, source: WorkSource) -> None:
        """Note that a source's pipeline is written to."""
        self._touched.add(source.pipeline.pipeline_id)

    def is_due(self, now: float) -> bool:
        """Return True if an idle worker should maintain now."""
        return now >= self._due_at or (bool(self._round) and now >= self._visit_at)

    def is_overdue(self, now: float) -> bool:
        """Return True if maintenance cannot wait for an idle worker.

        Under steady writes a backfill must end, too.
        """
        return now >= self._overdue_at

    def put_off(self, now: float) -> None:
        """Note that overdue maintenance begins.

        If it fails, it is not tried again before the next claim.
        """
        self._overdue_at = now + _SECONDS

    def close_backfills(self, sources: Iterable[WorkSource], is_asleep: Callable[[WorkKey], bool]) -> bool:
        """Close the backfills that are through.

        Return True if a sweep found more to embed.
        """
        return any([self._close_backfill(source) for source in sources if not is_asleep(source.key)])

    def _close_backfill(self, source: WorkSource) -> bool:
        if source.pipeline.version.state != "backfilling" or source.pipeline.is_hidden:
            return False
        self._asking(source)
        return source.can_claim() and source.close()

    def maintain(
        self, now: float, load: Callable[[Collection[WorkKey]], Sequence[WorkSource]], providers: Iterable[str]
    ) -> None:
        """Maintain indexes: of pipelines with writes, and one of a round of all.

        That round takes as long as its cost allows: of 1,000 pipelines each is visited every few minutes.
        """
        due: list[int] = []
        if now >= self._due_at:
            self._due_at = self._overdue_at = now + _SECONDS
            self._touched |= set(unfinished(self._session, self._pipeline_name))
            due = sorted(self._touched)[:_MAINTAINED]
            if not self._round:
                self._round = signals.all_pipelines(self._session, self._pipeline_name)
        if self._round and now >= self._visit_at:
            due.append(self._round.pop())
        started = time.monotonic()
        for source in load([WorkKey("pipeline", pipeline_id) for pipeline_id in due]):
            self._asking(source)
            source.maintain()
            if self._is_unmeasured(source):
                self._unmeasured.append(source)
            if source.pipeline.keyword is not None:
                self._unindexed[source.key] = source
        self._touched -= set(due)
        if due:
            self._visit_at = now + _ROUND_COST * (time.monotonic() - started) / len(due)
        # Under steady writes an index must be complete one day, too.
        self.index_words()
        keep_warm(self._session, providers)

    def measure(self) -> bool:
        """Take some steps of measuring an index that was not measured yet.

        Return True if there are more. A change that comes meanwhile waits for one piece of the work, not for all of it.
        """
        if self._measuring is None:
            source = next(filter(self._is_unmeasured, self._unmeasured), None)
            self._unmeasured = [s for s in self._unmeasured if s is not source and self._is_unmeasured(s)]
            if source is None:
                return False
            self._seen_versions.add(_measurable(source))
            self._measuring = source, Measurement(self._session, source.pipeline).steps()
        source, steps = self._measuring
        self._asking(source)
        if not isolate_failure(self._session, source.pipeline, lambda: _advance(steps)):
            self._measuring = None
        return self._measuring is not None

    def index_words(self) -> bool:
        """Take a step of building a keyword index; return True if there are more."""
        if not self._unindexed:
            return False
        key, source = next(iter(self._unindexed.items()))
        self._asking(source)
        pipeline = source.pipeline
        if not isolate_failure(self._session, pipeline, lambda: build(self._session, pipeline, _MEASURE_SECONDS)):
            del self._unindexed[key]
        return bool(self._unindexed)

    def derive(self) -> bool:
        """Compute some derived vectors that wait; return True if there were any.

        Return True, too, if answers of a provider's batch are to be read.
        """
        return self._derivation.step() or (self._batches is not None and self._batches.is_reading)

    def work_overdue(self, now: float) -> bool:
        """Do a piece of work that cannot wait for an idle worker.

        Return True if there was any. It is on derived vectors, or on a batch of a provider.
        """
        if self._batches is not None and self._batches.step():
            return True
        return self._derivation.is_overdue(now) and self._derivation.step()

    @property
    def futures(self) -> list[Future[Any]]:
        """Calls of batch endpoints that are not answered.

        They are waited for as requests are: while a worker sleeps in the server, no other thread of it runs.
        """
        return [] if self._batches is None else self._batches.futures

    def end(self) -> None:
        """Leave the batches of providers to the next worker."""
        if self._batches is not None:
            self._batches.end()

    def _is_unmeasured(self, source: WorkSource) -> bool:
        version = source.pipeline.version
        is_new = version.reach is None or version.reach.effort is None
        return version.has_index and is_new and _measurable(source) not in self._seen_versions


def _measurable(source: WorkSource) -> tuple[int, int | None]:
    """Return the version, and the file of its lists.

    Lists that are built again are measured again.
    """
    version = source.pipeline.version
    return version.version_id, None if version.reach is None else version.reach.index_node


def _advance(steps: Iterator[None]) -> bool:
    """Take steps for as long as one poll may; return True if there are more."""
    until = time.monotonic() + _MEASURE_SECONDS
    while time.monotonic() < until:
        if next(steps, _END) is _END:
            return False
    return True
