"""Send the batches that were collected, ask for them, and keep their answers.

Each step is short and in a transaction of its own. A batch is marked, and the mark committed, before the provider is asked. So
the next worker finds the batch of one that died: by its number, or by the token in its metadata.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from embedline.catalog import health
from embedline.catalog.load import load_allowed_endpoints, load_version
from embedline.catalog.values import Pipeline
from embedline.errors import EmbedlineError
from embedline.postgres.claims import Claims
from embedline.postgres.locks import PROVIDER_BATCH_LOCK_CLASS
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.providers.batches import ENDED, BatchFiles, BatchState, is_lost
from embedline.queue import bulk_changes, open_batches, provider_batches
from embedline.queue.open_batches import OpenBatch
from embedline.spending import ledger
from embedline.worker.batch_job import BatchJob, endpoint_config

if TYPE_CHECKING:
    from embedline.providers.batch_endpoint import BatchEndpoint

# Seconds between two questions to the database for batches that are due.
_POLL_SECONDS = 0.5
# Batches that one worker deals with at a time.
_MOST_JOBS = 4
# Seconds for which texts may still be added to a batch while its backfill goes on elsewhere.
_QUIET_SECONDS = 60.0
# Seconds that a request of a worker that died may be on its way.
_ADRIFT_SECONDS = 30.0
# Seconds between two questions for the state of a batch: this share of its age, within bounds.
_ASK_SHARE, _ASK_SECONDS = 0.05, (1.0, 60.0)
# Seconds until a failed call is made again: the first time, and at most; each is twice the last.
_RETRY_SECONDS = (1.0, 3600.0)
# Seconds until a batch that a budget stops is tried again.
_MONEY_SECONDS = 60.0
# Seconds until the next batch of a model whose last one failed as a whole; doubled by each that fails after it.
_FAILED_SECONDS = 60.0
# Statuses of a refusal to cancel or to search: the batch has ended or is not known, or there is no batch endpoint.
_NOTHING_TO_CANCEL = (400, 404, 405, 409)
# Failures after which a batch of which the provider knows nothing is taken for lost.
_LOST_AFTER = 5
# Seconds that a step waits for an answer: the next step of an idle worker is a second away.
_MOMENT = 0.1
# Seconds for which batches are left alone after a step that failed.
_FAULT_SECONDS = 5.0
# Second keys of the locks of batches.
_LOCKS = 1 << 31
# Lines of answers that one step reads.
_LINES = 500
# Seconds between two removals of old batches.
_PURGE_SECONDS = 600.0


class BatchJobs:
    """The batches of providers that one worker deals with."""

    def __init__(self, session: Session, claims: Claims, pipeline_name: str | None) -> None:
        self._session = session
        self._claims = claims
        self._pipeline_name = pipeline_name
        self._jobs: dict[int, BatchJob] = {}
        # Batches that are marked, to be sent once that is committed.
        self._marked: dict[int, OpenBatch] = {}
        self._locked: set[int] = set()
        # Clients of batch endpoints, by what they are made of.
        self._endpoints: dict[str, BatchEndpoint] = {}
        self._due_at = 0.0
        self._purge_at = time.monotonic() + _PURGE_SECONDS

    @property
    def futures(self) -> list[Future[Any]]:
        """Calls that are not answered."""
        return [job.future for job in self._jobs.values() if job.future is not None and not job.future.done()]

    @property
    def is_reading(self) -> bool:
        """Return True if an idle worker has answers to read."""
        return any(job.lines is not None for job in self._jobs.values())

    def step(self) -> bool:
        """Do one piece of what is due; return True if there may be more at once.

        A step that fails leaves its batches to be taken up again, as by another worker.
        """
        if time.monotonic() < self._due_at and not any(job.is_ready for job in self._jobs.values()):
            return False
        try:
            with self._session.plpy.subtransaction():
                return self._step()
        except (self._session.plpy.SPIError, EmbedlineError) as error:
            if sqlstate_of(error) in ENDING:
                raise
            self._session.plpy.warning(f"embedline worker, batches of providers: {error}")
            self._drop_jobs()
            self._due_at = time.monotonic() + _FAULT_SECONDS
            return True

    def _step(self) -> bool:
        for job in list(self._jobs.values()):
            if job.is_ready:
                is_reading = job.lines is not None
                self._advance(job)
                # Tens of thousands of answers take a while, and changes must not wait for all of them.
                return not is_reading
        if (now := time.monotonic()) < self._due_at:
            return False
        self._due_at = now + _POLL_SECONDS
        if now >= self._purge_at:
            self._purge_at = now + _PURGE_SECONDS
            open_batches.purge(self._session)
            bulk_changes.purge(self._session)
        marked, self._marked = self._marked, {}
        for batch in marked.values():
            self._send(batch)
        if marked:
            return True
        if len(self._jobs) >= _MOST_JOBS:
            return False
        found = False
        for batch in open_batches.due(self._session, self._pipeline_name, 2 * _MOST_JOBS):
            if batch.batch_id not in self._jobs and self._lock(batch.batch_id):
                self._begin(batch)
                found = True
        if self._marked:
            # They are sent as soon as the marks are committed.
            self._due_at = 0.0
        return found

    def end(self) -> None:
        """Leave the batches to the next worker."""
        self._drop_jobs()
        for endpoint in self._endpoints.values():
            endpoint.close()
        self._endpoints = {}

    def _drop_jobs(self) -> None:
        for job in self._jobs.values():
            if job.future is not None:
                job.future.cancel()
            job.close()
        self._jobs, self._marked = {}, {}
        for batch_id in list(self._locked):
            self._unlock(batch_id)

    # What is due

    def _begin(self, batch: OpenBatch) -> None:
        if batch.is_orphan:
            self._cancel(batch)
        elif batch.state == "waiting":
            job = self._new_job(batch)
            self._ask(job, job.endpoint.state(str(batch.provider_id)))
        elif batch.state == "sending" and _sends_batches(self._pipeline(batch)):
            # Its worker died, or the provider did not answer.
            self._mark(batch, None)
        elif batch.state == "sending":
            job = self._new_job(batch)
            job.is_withdrawn = True
            self._ask(job, job.endpoint.find(batch.token))
        else:
            self._collected(batch)

    def _collected(self, batch: OpenBatch) -> None:
        """Mark a batch for sending, if nothing more is added and its budget allows."""
        pipeline = self._pipeline(batch)
        if not _sends_batches(pipeline):
            self._end(batch, "dissolved", None, is_charged=False)
            return
        if (
            batch.is_growing
            and batch.quiet_seconds < _QUIET_SECONDS
            and not open_batches.is_superseded(self._session, batch)
        ):
            self._put_off(batch, 1.0)
            return
        failed, seconds, _ = provider_batches.failures(self._session, batch.model_id)
        wait = min(_FAILED_SECONDS * 2.0 ** (failed - 1), _RETRY_SECONDS[1]) - seconds if failed else 0.0
        if wait > 0:
            self._put_off(batch, wait, "the provider has refused the last batch; see embedline.provider_batch")
            return
        if not open_batches.take(self._session, batch.batch_id):
            # A worker adds texts to it.
            self._put_off(batch, 0.0)
            return
        texts = open_batches.texts_of(self._session, batch.batch_id)
        if not texts.ids:
            self._end(batch, "dissolved", None, is_charged=False)
            return
        grant = ledger.reserve_batch(self._session, pipeline, texts.tokens, self._claims)
        reason = grant.reason or "the budget is used up"
        if not grant.count:
            health.record_batch_error(self._session, pipeline, reason)
            self._put_off(batch, _MONEY_SECONDS, reason)
            return
        if grant.count < len(texts.ids):
            open_batches.divide(self._session, batch.batch_id, texts, grant.count, (_MONEY_SECONDS, reason))
        self._mark(batch, grant.reservation_id)

    def _mark(self, batch: OpenBatch, reservation_id: int | None) -> None:
        # The model may have another address or key by now.
        config = provider_batches.stored_config(self._pipeline(batch).version.model.config)
        open_batches.mark_sending(self._session, batch.batch_id, _ADRIFT_SECONDS, reservation_id, config)
        reservation_id = reservation_id or batch.reservation_id
        self._marked[batch.batch_id] = replace(batch, reservation_id=reservation_id, config=config)

    def _send(self, marked: OpenBatch) -> None:
        """Send a batch whose mark is committed."""
        if not open_batches.is_marked(self._session, marked.batch_id):
            # The mark was rolled back.
            self._unlock(marked.batch_id)
            return
        texts = open_batches.texts_of(self._session, marked.batch_id)
        job = self._new_job(marked)
        numbered = list(zip(texts.ids, texts.contents, strict=True))
        self._ask(job, job.endpoint.send(numbered, marked.token, was_tried=marked.attempts > 0))

    def _cancel(self, batch: OpenBatch) -> None:
        """Cancel a batch at the provider whose version is gone."""
        if batch.state == "collecting":
            self._end(batch, "dropped", None, is_charged=False)
            return
        job = self._new_job(batch)
        job.is_cancelled = True
        self._ask(job, job.endpoint.cancel(batch.provider_id, batch.token))

    def _ask(self, job: BatchJob, future: Future[Any]) -> None:
        """Wait a moment for an answer; one that takes longer is found by a later step."""
        job.future = future
        wait([future], _MOMENT)

    def _new_job(self, batch: OpenBatch) -> BatchJob:
        # Heavy, and of no use to most workers.
        from embedline.providers.batch_endpoint import BatchEndpoint

        current = None if batch.is_orphan else self._pipeline(batch).version.model.config
        config = endpoint_config(batch, current, load_allowed_endpoints(self._session))
        if (endpoint := self._endpoints.get(repr(config))) is None:
            endpoint = self._endpoints[repr(config)] = BatchEndpoint(config)
        self._jobs[batch.batch_id] = BatchJob(batch, endpoint)
        return self._jobs[batch.batch_id]

    # What has come back

    def _advance(self, job: BatchJob) -> None:
        if job.lines is not None:
            self._read(job)
            return
        future, job.future = job.future, None
        assert future is not None
        error = future.exception()
        if error is not None:
            if not isinstance(error, EmbedlineError):
                raise error
            self._failed(job, error)
            return
        found = future.result()
        if job.is_cancelled:
            # A batch that was never created costs nothing; of another one part may be done.
            self._settle(job.batch, 0 if found is None else None)
            self._end(job.batch, "dropped", None, is_charged=False)
        elif isinstance(found, BatchFiles):
            job.files, job.lines = found, found.lines()
            job.estimates = open_batches.estimates(self._session, job.batch.batch_id)
        elif isinstance(found, BatchState):
            self._told(job, found)
        else:
            self._withdraw(job)

    def _withdraw(self, job: BatchJob) -> None:
        """Give up a batch that the provider does not have."""
        self._settle(job.batch, 0)
        self._end(job.batch, "dissolved", None, is_charged=False)

    def _told(self, job: BatchJob, state: BatchState) -> None:
        """Act on the state that the provider tells of a batch."""
        batch = job.batch
        if state.status not in ENDED:
            least, most = _ASK_SECONDS
            seconds = min(max(_ASK_SHARE * batch.age, least), most)
            open_batches.mark_waiting(self._session, batch.batch_id, state.provider_id, seconds)
            self._forget(batch.batch_id)
        elif state.status == "failed":
            self._refused(job, state)
        else:
            if batch.state == "sending":
                # The next worker does not have to search for it.
                open_batches.mark_waiting(self._session, batch.batch_id, state.provider_id, _ASK_SECONDS[0])
            job.ended = state
            self._ask(job, job.endpoint.download(state.files, batch.text_count))

    def _failed(self, job: BatchJob, error: EmbedlineError) -> None:
        """Put a batch off whose call has failed."""
        batch = job.batch
        if job.is_cancelled and getattr(error, "status", None) in _NOTHING_TO_CANCEL:
            self._settle(batch, None)
            self._end(batch, "dropped", None, is_charged=False)
            return
        if job.is_withdrawn and getattr(error, "status", None) in _NOTHING_TO_CANCEL:
            self._withdraw(job)
            return
        if batch.state == "waiting" and is_lost(error) and batch.attempts >= _LOST_AFTER:
            self._settle(batch, None)
            self._end(batch, "lost", str(error), is_charged=True)
            return
        wish = getattr(error, "retry_after", None)
        least, most = _RETRY_SECONDS
        seconds = max(min(least * 2.0 ** min(batch.attempts, 12), most), wish or 0.0)
        message = f"{error}: {error.detail}" if error.detail else str(error)
        if not batch.is_orphan:
            health.record_batch_error(self._session, self._pipeline(batch), message)
        self._put_off(batch, seconds, message)

    def _refused(self, job: BatchJob, state: BatchState) -> None:
        """End a batch that the provider has refused as a whole; it costs nothing.

        Lines that it names go to the ordinary endpoint. The other texts are collected again, and sent after a while.
        """
        batch = job.batch
        told = "; ".join(f"{code}: {message}" for code, message, _ in state.errors[:3]) or "without a reason"
        ids = open_batches.texts_of(self._session, batch.batch_id).ids
        named = [(ids[line - 1], None, message) for _, message, line in state.errors if line and 0 < line <= len(ids)]
        if named:
            open_batches.keep_answers(self._session, batch.batch_id, named)
        self._settle(batch, 0)
        health.record_batch_error(self._session, self._pipeline(batch), f"the provider has refused a batch: {told}")
        self._end(batch, "failed", told, is_charged=False)

    def _read(self, job: BatchJob) -> None:
        """Keep the next answers, or end the batch if there are no more."""
        assert job.lines is not None
        lines = list(itertools.islice(job.lines, _LINES))
        if lines:
            pipeline = self._pipeline(job.batch)
            found = [answer for answer in map(job.endpoint.read, lines) if answer is not None and job.is_first(answer)]
            job.tokens_used += sum(map(job.tokens, found))
            told = [answer for answer in found if answer.block is not None or answer.is_refused]
            open_batches.keep_answers(self._session, job.batch.batch_id, job.usable(pipeline, told))
            return
        batch, ended = job.batch, job.ended
        self._settle(batch, job.tokens_used)
        files = [*ended.files, ended.input_file] if ended is not None else []
        self._end(batch, ended.status if ended is not None else "completed", None, is_charged=True)
        # The texts need not stay there. It does not matter if that fails.
        job.endpoint.forget([file_id for file_id in files if file_id is not None])

    def _end(self, batch: OpenBatch, outcome: str, error: str | None, *, is_charged: bool) -> None:
        """End a batch and make the rows due that wait for it."""
        held = open_batches.end(self._session, batch.batch_id, outcome, error, is_charged=is_charged)
        if not batch.is_orphan:
            pipeline = self._pipeline(batch)
            open_batches.wake(self._session, pipeline, held)
            if error is None:
                health.forget_batch_error(self._session, pipeline)
        self._forget(batch.batch_id)

    def _settle(self, batch: OpenBatch, tokens: int | None) -> None:
        if batch.reservation_id is not None:
            ledger.settle(self._session, batch.reservation_id, tokens)

    def _put_off(self, batch: OpenBatch, seconds: float, error: str | None = None) -> None:
        open_batches.put_off(self._session, batch.batch_id, seconds, error)
        self._forget(batch.batch_id)

    def _pipeline(self, batch: OpenBatch) -> Pipeline:
        return load_version(self._session, str(batch.pipeline), int(batch.version or 0))

    # Who deals with a batch

    def _lock(self, batch_id: int) -> bool:
        query = "SELECT pg_try_advisory_lock($1, $2)"
        is_ours = self._session.scalar(query, ["integer", "integer"], PROVIDER_BATCH_LOCK_CLASS, batch_id % _LOCKS)
        if is_ours:
            self._locked.add(batch_id)
        return bool(is_ours)

    def _unlock(self, batch_id: int) -> None:
        self._locked.discard(batch_id)
        query = "SELECT pg_advisory_unlock($1, $2)"
        self._session.query(query, ["integer", "integer"], PROVIDER_BATCH_LOCK_CLASS, batch_id % _LOCKS)

    def _forget(self, batch_id: int) -> None:
        if (job := self._jobs.pop(batch_id, None)) is not None:
            job.close()
        self._unlock(batch_id)


def _sends_batches(pipeline: Pipeline) -> bool:
    return pipeline.version.model.config.options.get("batch_api") is True
