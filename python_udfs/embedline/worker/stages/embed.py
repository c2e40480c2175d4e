"""Reserve, send and answer: the requests of a batch.

Requests are sent after the commit that reserves them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

from embedline.core.embedding import EmbeddingBlock
from embedline.core.request_tokens import plausible_tokens
from embedline.errors import (
    EmbedlineError,
    InvalidVectors,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.models.space import space_fault
from embedline.postgres.spans import Attributes, record
from embedline.worker.batch import Batch, Request, Unit
from embedline.worker.meter import Stage, failure_class
from embedline.worker.models import Models
from embedline.worker.permits import Permits

# Delay of rows that a budget or a rate limit holds back. It is short, because either can be raised at any time; meanwhile
# no claim is taken of their pipeline.
_MONEY_SECONDS = 1.0
# Seconds until a grant that is waited for is asked for again: a limit may be lifted meanwhile.
_GRANT_SECONDS = 5.0


class Embed:
    """Grants, requests and answers of batches.

    `patience` is how many seconds a batch may wait for a grant before its rows are requeued.
    """

    def __init__(
        self, models: Models, permits: Permits, patience: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._models = models
        self._permits = permits
        self._patience = patience
        self._clock = clock
        # Why requests were last refused a grant; None while none was.
        self.refusal: str | None = None

    def reserve_at_once(self, batch: Batch, tokens: int) -> bool:
        """Reserve tokens that are spent before any request.

        Return False, and requeue what was read, if that is refused.
        """
        grant = self._permits.reserve(batch.pipeline, [tokens])
        if grant.count:
            if grant.reservation_id is not None:
                self._permits.settle(grant.reservation_id, None)
            return True
        self.refusal = grant.reason or "the budget is used up"
        batch.requeue([Unit(batch.found)], _MONEY_SECONDS, charged=False, error=self.refusal)
        return False

    def grant(self, batch: Batch) -> None:
        """Reserve what budget and rate limit allow.

        Requeue the rest if the wait would be long.
        """
        waiting = batch.ungranted
        if not waiting:
            return
        grant = self._permits.reserve(batch.pipeline, [request.tokens for request in waiting])
        for request in waiting[: grant.count]:
            request.is_granted, request.reservation_id = True, grant.reservation_id
        if grant.count and grant.reservation_id is not None:
            batch.tokens_used[grant.reservation_id] = 0
        if grant.count < len(waiting):
            wait = grant.wait_seconds or 0.0
            batch.grant_at = self._clock() + min(wait, _GRANT_SECONDS)
            if wait > self._patience:
                self.requeue_waiting(batch, grant.reason or "the budget is used up")

    def requeue_waiting(self, batch: Batch, reason: str) -> None:
        """Requeue the documents of units without a granted request.

        They are soon due again; until then none is claimed.
        """
        later = [unit for unit in batch.units if unit.requests and not any(r.is_granted for r in unit.requests)]
        batch.units = [unit for unit in batch.units if unit not in later]
        self.refusal = reason
        if any(unit.documents for unit in later):
            batch.source.record_error(reason)
            batch.requeue(later, _MONEY_SECONDS, charged=False, error=reason)

    def start(self, batch: Batch) -> None:
        """Send the requests that were granted.

        The transaction that reserved them is committed. Of a search a few at a time: they are answered in the order in
        which they are sent, and new rows after them.
        """
        granted = [
            r for unit in batch.units if not unit.failures for r in unit.requests if r.is_granted and not r.future
        ]
        searching = [request for unit in batch.units if unit.failures for request in unit.requests]
        sent = sum(request.future is not None and not request.is_answered for request in searching)
        places = max(batch.pipeline.version.model.config.concurrency, 1) - sent
        granted += [r for r in searching if r.is_granted and r.future is None][: max(places, 0)]
        embedder = self._models.embedder(batch.pipeline.version.model) if granted else None
        # One time for all: each says something about the provider that the others met.
        now = self._clock()
        for request in granted:
            if embedder is not None:
                request.sent_at = now
                request.future = embedder.submit(list(request.texts.values()), "document")
                request.future.add_done_callback(functools.partial(self._note_time, request))
                batch.meter.sent(now)

    def _note_time(self, request: Request, _: object) -> None:
        """Note when an answer came; runs in the thread that received it."""
        request.answered_at = self._clock()

    def abandon(self, batch: Batch) -> None:
        """Cancel the requests in flight.

        They may yet be served: what was reserved for them stands.
        """
        for future in batch.futures:
            future.cancel()
        for reservation_id in batch.tokens_used:
            self._permits.settle(reservation_id, None)
        batch.tokens_used = {}

    def collect(self, batch: Batch, unit: Unit) -> None:
        """Take over the vectors of a unit's answers, checked and normalised.

        Note the error of a failed one.
        """
        if not unit.requests:
            # Nothing was asked, or the unit waits for the verdict on a failure.
            return
        errors: list[tuple[Request, EmbedlineError]] = []
        for request in unit.requests:
            if request.future is None:
                continue
            error = request.future.exception()
            if error is not None and not isinstance(error, EmbedlineError):
                raise error
            _count_tokens(batch, request)
            if error is None:
                error = self._take_over(batch, unit, request, request.future.result())
            if error is not None:
                errors.append((request, error))
            # The caller may see the answer before the thread has noted its time.
            _measure(batch, request, request.answered_at or self._clock(), error)
        batch.answered_at = unit.failed_at = self._clock()
        if errors:
            unit.error = functools.reduce(_graver, [error for _, error in errors])
            unit.sent_at = max(request.sent_at for request, _ in errors)
            lacking = ({d: t for d, t in request.texts.items() if d not in unit.vectors} for request in unit.requests)
            unit.failed = [texts for texts in lacking if texts]
        else:
            self._note_success(batch, unit)

    def _note_success(self, batch: Batch, unit: Unit) -> None:
        sizes = {len(request.texts) for request in unit.requests}
        self._models.note_success(batch.pipeline.version.model, sizes, unit.cut_sizes)
        if unit.split is not None:
            unit.split.passed |= sizes

    def _take_over(self, batch: Batch, unit: Unit, request: Request, block: EmbeddingBlock) -> ProviderError | None:
        """Take over the vectors of an answer; return the fault of the answer as a whole."""
        from embedline.core import vectors

        version = batch.pipeline.version
        if block.fingerprint is not None and (fault := space_fault(version.model, block)):
            return fault
        if remark := self._models.keep_learned(batch.pipeline, block.learned):
            batch.source.record_error(remark)
        digests = list(request.texts)
        try:
            matrix = vectors.matrix_from_bytes(block.data, block.count, block.dimensions)
            vectors.check_shape(matrix, len(digests), version.dimensions)
        except InvalidVectors as invalid:
            return invalid
        normalise = version.distance != "l2"
        # A normalised vector fits float16 whatever the model's scale.
        unit.undecodable |= {digests[index]: reason for index, reason in block.faults.items()}
        usable, faults = vectors.usable_vectors(matrix, "vector" if normalise else version.column_type, normalise)
        unit.vectors.update(zip(digests, usable, strict=True))
        for index, reason in faults.items():
            if index not in block.faults:
                unit.faults[digests[index]] = reason
            del unit.vectors[digests[index]]
        if len(faults) < len(digests) or block.faults:
            self._models.note_answer(version.model, request.sent_at)
        return None

    def remember_sizes(self, batch: Batch, ready: Sequence[Unit]) -> None:
        """Keep the request sizes that the model refused and passed.

        They are those of splits that are through.
        """
        splits = {unit.split for unit in ready if unit.split is not None} - {unit.split for unit in batch.units}
        self._models.remember_splits(batch.pipeline.version.model, splits)

    def settle_reservations(self, batch: Batch) -> None:
        """Correct the reservations of requests that are all answered."""
        open_ids = {request.reservation_id for request in batch.requests}
        for reservation_id in [i for i in batch.tokens_used if i not in open_ids]:
            self._permits.settle(reservation_id, batch.tokens_used.pop(reservation_id))


def _measure(batch: Batch, request: Request, answered_at: float, error: EmbedlineError | None) -> None:
    """Count an answer and its tokens, and tell exporters of the request."""
    counted = None
    if error is None and request.future is not None:
        prefix = batch.pipeline.version.model.config.document_prefix
        counted = plausible_tokens(request.future.result().tokens, list(request.texts.values()), prefix)
    tokens = request.tokens if counted is None else counted
    batch.meter.answered(answered_at, error, tokens)

    def attributes() -> Attributes:
        version = batch.pipeline.version
        config = version.model.config
        return {
            **batch.meter.attributes,
            "provider": config.provider,
            "address": config.base_url,
            "dimensions": version.dimensions,
            "texts": len(request.texts),
            "tokens": tokens,
            "error": None if error is None else failure_class(error),
        }

    record(Stage.EMBED, answered_at - request.sent_at, attributes)


def _count_tokens(batch: Batch, request: Request) -> None:
    """Add up the tokens that answers to a reservation report.

    None once one reports none, or an impossible number.
    """
    if request.reservation_id is None or request.future is None:
        return
    error = request.future.exception()
    used: int | None
    if isinstance(error, EmbedlineError):
        # Refused requests cost nothing; one that timed out may have been served.
        used = 0 if getattr(error, "is_refusal", False) else request.tokens
    else:
        prefix = batch.pipeline.version.model.config.document_prefix
        counted = request.future.result().tokens if error is None else None
        used = plausible_tokens(counted, list(request.texts.values()), prefix)
    so_far = batch.tokens_used.get(request.reservation_id)
    batch.tokens_used[request.reservation_id] = None if so_far is None or used is None else so_far + used


def _graver(first: EmbedlineError | None, second: EmbedlineError) -> EmbedlineError:
    """Return the error to act on of two requests of one unit.

    A provider that is away says nothing about the texts.
    """
    return second if first is None or isinstance(second, TransientProviderError | ProviderMisconfigured) else first
