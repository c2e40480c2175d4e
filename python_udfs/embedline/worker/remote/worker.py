"""The half of a remote worker that is in the database.

It is a resident worker whose steps are calls of SQL functions. The model alone is asked elsewhere.
"""

from __future__ import annotations

import math
import time

from embedline.catalog.load import load_versions
from embedline.catalog.values import Model, Pipeline
from embedline.errors import EmbedlineError
from embedline.models.pool import let_cancel_through
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import (
    CHANGED_TABLE,
    ENDING,
    LOCK_NOT_AVAILABLE,
    QUERY_CANCELED,
    UNDEFINED_TABLE,
    sqlstate_of,
)
from embedline.worker.batch import Batch
from embedline.worker.capacity import Capacity
from embedline.worker.engine import now_and_then
from embedline.worker.remote.desk import Desk
from embedline.worker.state import ResidentWorker
from embedline.worker.steps import Answer
from embedline.worker.troubles import PASSING_FAULTS
from embedline.worker.waiting import is_anything_waiting
from embedline.worker.work_source import WorkSource

# Requests that may wait or be in flight. The client decides how many it asks for; memory bounds them, too.
_DEPTH = 64
# Steps of one call at most: it ends soon, and the client calls again.
_MAX_STEPS = 32


class RemoteWorker(ResidentWorker):
    """A resident worker that a client drives, call by call."""

    # Its client has the model.
    begins_batches = False

    def __init__(self, session: Session, worker_id: int, pipeline_name: str, desk: Desk) -> None:
        super().__init__(session, worker_id, pipeline_name)
        self.desk = desk
        self.name = pipeline_name
        self._capacity = Capacity(at_least=_DEPTH)
        self.claimant.is_remote = True
        # What the last call asked for: a version, and the model that its client embeds with.
        self._version: int | None = None
        self._model_id: int | None = None
        # The batch that was claimed by the last call. The next one reads it. The claim must be committed by then, so
        # that a row whose expression ends the session leaves a mark.
        self._unread: Batch | None = None
        # Dimensions of the answers, by the name of the model.
        self.dimensions = dict[str, int]()

    def take(self, version: int | None, model: Model, max_rows: int | None) -> str:
        """Fill the desk; return the state that the client is told.

        `version` and `max_rows` limit what is claimed, and so does the model, which is the client's. The states are batch,
        claimed, idle, empty and stop.
        """
        self._version, self._model_id, self.claimant.max_rows = version, model.model_id, max_rows
        if self._unread is not None:
            self._try_prepare(self._unread)
        for _ in range(_MAX_STEPS):
            self.write_ready()
            if self.desk.waiting_for(model.config.name):
                return "batch"
            if self.is_ending or not self.has_room:
                break
            answer = self._try_claim()
            if answer is Answer.BATCH and self.current is not None:
                self._unread = self.current
                # Without units it would seem to be through.
                self._unread.write_at = math.inf
                return "claimed"
            if answer is Answer.STOP:
                self.is_ending = True
            if answer is Answer.IDLE:
                return "empty" if not self.batches and self.is_waiting() is Answer.NO else "idle"
        return "stop" if self.is_ending else "idle"

    def write_ready(self) -> int:
        """Write what is answered; return how many rows are embedded by it."""
        embedded = 0
        while self.has_answers:
            started = time.monotonic()
            try:
                with self._session.plpy.subtransaction():
                    answer = self.write()
            except Exception as error:
                self._handle(error, can_wait=True)
                continue
            self.start()
            batch = self.current
            if answer is not Answer.WRITTEN or batch is None:
                break
            embedded += batch.embedded_count - batch.told_count
            batch.told_count = batch.embedded_count
            self.wrote(time.monotonic() - started, 0.0)
        return embedded

    def start(self) -> None:
        """Leave what was granted at the desk."""
        if self.current is not None:
            version = self.current.pipeline.version
            self.dimensions[version.model.config.name] = version.dimensions
        super().start()

    def is_waiting(self) -> Answer:
        """Return YES if rows are queued that this worker would be given."""
        versions = load_versions(self._session, self.name)
        others = [p.version for p in versions if not self._is_served(p)]
        names = [self.name] if any(p.is_serving and not self._is_served(p) for p in versions) else []
        names += [self.name] if self.claimant.out_of_money | self.claimant.hidden | self._troubles.lasting else []
        found = is_anything_waiting(self._session, self.name, names, [version.version_id for version in others])
        return Answer.YES if found else Answer.NO

    def end(self) -> Answer:
        """Release every claim of this worker.

        After a cancel only the batch that was read then is left to be reclaimed as a dead worker's.
        """
        for batch in self.batches if self.cancelled_in is not None else ():
            if batch is not self._unread:
                try:
                    batch.source.release(batch.claim)
                except self._session.plpy.SPIError as error:
                    if sqlstate_of(error) not in (LOCK_NOT_AVAILABLE, UNDEFINED_TABLE):
                        raise
        return super().end()

    def _with_room(self, sources: list[WorkSource]) -> list[WorkSource]:
        return super()._with_room([source for source in sources if self._is_served(source.pipeline)])

    def _is_served(self, pipeline: Pipeline) -> bool:
        """Return True for a version that was asked for, and whose model is the client's.

        Vectors of another model would be stored as if they were the version's own.
        """
        version = pipeline.version
        return self._version in (None, version.number) and version.model.model_id == self._model_id

    def _try_claim(self) -> Answer:
        self.claimant.asking = None
        try:
            with self._session.plpy.subtransaction():
                return self.claim()
        except Exception as error:
            asked: WorkSource | None = self.claimant.asking
            sqlstate = sqlstate_of(error)
            if sqlstate in ENDING or asked is None:
                raise
            self.undo()
            self.claim_failed(asked, sqlstate)
            with self._session.plpy.subtransaction():
                self.record_fault(str(error))
            self._session.plpy.warning(f"embedline remote worker, pipeline {self.name}: {error}")
            return Answer.AGAIN

    def _try_prepare(self, batch: Batch) -> None:
        """Read, chunk and reserve a batch whose claim is committed."""
        self.current = batch
        try:
            with self._session.plpy.subtransaction():
                is_done = self._read(batch) is Answer.DONE
                if is_done:
                    self._chunk()
                    is_done = self.submit() is Answer.DONE
                if not is_done:
                    self.abandon(None)
        except Exception as error:
            self._handle(error, can_wait=False)
            self._unread = None
            return
        self._unread, batch.write_at = None, 0.0
        self.start()

    def _read(self, batch: Batch) -> Answer:
        try:
            return self.read()
        except Exception as error:
            if sqlstate_of(error) == QUERY_CANCELED:
                self.cancelled_in = batch.source.key
            raise

    def _chunk(self) -> None:
        self.desk.is_closed = True
        try:
            self.chunk(now_and_then(let_cancel_through(self._session)))
        finally:
            self.desk.is_closed = False

    def _handle(self, error: Exception, *, can_wait: bool) -> None:
        """Undo a step that failed.

        Its answers are kept for a later call, or its batch is released.
        """
        sqlstate = sqlstate_of(error)
        if sqlstate in ENDING or not isinstance(error, self._session.plpy.SPIError | EmbedlineError):
            raise error
        self.undo()
        if can_wait and sqlstate in PASSING_FAULTS and self.put_off_write(sqlstate):
            return
        if self.current is not None:
            self.count_fault(self.current.source, sqlstate)
        self._session.plpy.warning(f"embedline remote worker: {error}")
        try:
            with self._session.plpy.subtransaction():
                self.abandon(f"{type(error).__name__}: {error}")
        except self._session.plpy.SPIError as failure:
            if sqlstate_of(failure) not in CHANGED_TABLE:
                raise
            # The pipeline was dropped meanwhile, and its claims are gone.
            self.forget_current()
