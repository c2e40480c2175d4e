"""Decide whose fault a failure was, and search for the text that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from embedline.chunking.halves import cut_chunks
from embedline.core.retry import MAX_ATTEMPTS, backoff_seconds
from embedline.core.tokens import estimated_size
from embedline.documents.values import Document
from embedline.errors import (
    EmbedlineError,
    InputRejected,
    InvalidVectors,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
    UnreadableMedia,
)
from embedline.models.request_size import Split
from embedline.queue.dead_letters import DeadLetter
from embedline.worker.batch import Batch, Unit, halved_requests, unit_of
from embedline.worker.models import Models

# Seconds for which a provider that refuses everything, such as a closed account, is left alone.
_REFUSED_PAUSE_SECONDS = 10.0
# Delay of rows whose batch would have been one search too many, and how long a search counts, in seconds.
_PUT_OFF_SECONDS, _SEARCH_SECONDS = 1.0, 60.0
# Attempts of a batch before it is split, if the failure may be a moment's trouble.
_ATTEMPTS_TOGETHER = 2


class Failures:
    """Judges the failures of batches."""

    def __init__(self, models: Models, clock: Callable[[], float] = time.monotonic) -> None:
        self._models = models
        self._clock = clock
        # Batches that are searched for the text that fails, and when each search began.
        self._searched: dict[Batch, float] = {}

    def judge(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Decide whose fault a failure was.

        The provider's, which charges no row, or that of a text. That depends on whether the provider answers something
        else. While this is not known the unit stays in the batch, and a harmless text is asked for. A row is given up only
        after an answer to a request sent after its last failure.
        """
        if _says_nothing_of_texts(error):
            self._rest(batch, unit, getattr(error, "retry_after", None))
            return
        since = unit.failed_at if _is_last_try(unit, error) else unit.sent_at
        others = (request.future for request in batch.requests if request.future and request.sent_at >= since)
        hopeful = (future for future in others if not future.done() or future.exception() is None)
        verdict = self._models.ask(batch.pipeline.version, since, next(hopeful, None))
        if verdict.pending is not None:
            batch.units.append(replace(unit, requests=[], verdict=verdict.pending))
        elif verdict.health == "sound":
            self._blame_texts(batch, unit, error)
        elif isinstance(verdict.error, InputRejected | ProviderMisconfigured):
            self._rest(batch, unit, _REFUSED_PAUSE_SECONDS)
        else:
            wishes = [getattr(e, "retry_after", None) for e in (error, verdict.error)]
            self._rest(batch, unit, max((wish for wish in wishes if wish is not None), default=None))

    def judge_chunker(self, batch: Batch, document: Document, error: ProviderError) -> None:
        """Judge a failure of the model that the chunker of a document asked."""
        now = self._clock()
        self.judge(batch, Unit([document], error=error, sent_at=now, failed_at=now), error)

    def without_faults(self, batch: Batch, unit: Unit) -> list[Document]:
        """Return the documents whose vectors are all usable.

        The others are asked for once more, then judged. Files that cannot be decoded are given up.
        """
        if unit.undecodable:
            doomed = [d for d in unit.documents if any(chunk.digest in unit.undecodable for chunk in d.chunks)]
            batch.quarantine([_letter_of_file(document, unit.undecodable) for document in doomed])
            unit = replace(unit, documents=[d for d in unit.documents if d not in doomed], undecodable={})
        if not unit.faults:
            return unit.documents
        faulty = [d for d in unit.documents if any(chunk.digest in unit.faults for chunk in d.chunks)]
        if unit.failures:
            error = InvalidVectors(next(iter(unit.faults.values())))
            self.judge(batch, replace(unit, documents=faulty, requests=[], error=error), error)
        else:
            batch.units.append(_again(batch, unit, faulty))
        return [document for document in unit.documents if document not in faulty]

    def has_search(self, batch: Batch) -> bool:
        """Return True if `end_search` would release something."""
        return any(_is_unsent_search(unit) for unit in batch.units)

    def end_search(self, batch: Batch) -> bool:
        """Release the units of a search that are not sent; return True if there were any.

        A search of 1,000 rows that all fail takes most of a minute, for which a worker that is to end would stay.
        """
        unsent = [unit for unit in batch.units if _is_unsent_search(unit)]
        batch.units = [unit for unit in batch.units if unit not in unsent]
        batch.requeue(unsent, 0.0, charged=False, error="the worker ended while it looked for what fails")
        return bool(unsent)

    def _rest(self, batch: Batch, unit: Unit, seconds: float | None) -> None:
        """Open the circuit for a while: the provider fails every request.

        No row is charged, and none waits longer.
        """
        message = _note(batch, unit)
        self._models.open_circuit(batch.pipeline.version.model, message, seconds)
        batch.requeue([unit], 0.0, charged=False, error=message)

    def _blame_texts(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Search for the text that makes a sound provider fail.

        If it may be a moment's trouble, the unit is tried once more together, later. If it is refused, or fails again, it is
        split by halves until the rows that are the cause stand alone. A text that is refused alone is given up at its second
        refusal, one that fails in another way after five tries.
        """
        if unit.faults and unit.error is not None and unit.failures and not unit.failed:
            batch.quarantine([_letter_of_faults(document, unit.faults) for document in unit.documents])
        elif not _is_about_texts(error) and not unit.failures and _attempts(unit) < _ATTEMPTS_TOGETHER:
            self._retry(batch, unit, error)
        elif not unit.failures and not self._may_search(batch, unit):
            # Nothing of it was paid for, and the try does not count.
            batch.requeue([unit], _PUT_OFF_SECONDS, charged=False, error=_note(batch, unit, error))
        elif not _halve(batch, unit):
            self._judge_alone(batch, unit, error)

    def _judge_alone(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Cut, give up or retry a text that failed alone."""
        if _is_spent(unit, error):
            if not self._cut(batch, unit, error):
                _note(batch, unit, error)
                batch.quarantine([dead_letter(unit.documents[0], "embed", error)])
        elif _is_about_texts(error) and unit.failed:
            batch.units.append(_again(batch, unit, unit.documents))
        else:
            self._retry(batch, unit, error)

    def _may_search(self, batch: Batch, unit: Unit) -> bool:
        """Return True unless searches take up a quarter of the model's concurrency.

        A search sends two requests for each text that fails, and new rows would wait behind them.
        """
        # Its requests are gone by now if it has waited for a verdict; the texts that failed are not.
        if len(unit.documents) < 2 and sum(len(texts) for texts in unit.failed) < 2:
            return True
        now, model = self._clock(), batch.pipeline.version.model
        # A search that was abandoned is forgotten after a while.
        self._searched = {
            other: at
            for other, at in self._searched.items()
            if now - at < _SEARCH_SECONDS and any(unit.failures for unit in other.units)
        }
        others = [b for b in self._searched if b.pipeline.version.model.model_id == model.model_id and b is not batch]
        if len(others) >= max(model.config.concurrency // 4, 1):
            return False
        self._searched[batch] = now
        return True

    def _retry(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Requeue a unit's rows to be tried together again, soon; the try counts."""
        message = _note(batch, unit, error)
        wish = getattr(error, "retry_after", None)
        if wish:
            # The provider's wait is the model's, not the rows': embedline.resume_model ends it.
            self._models.open_circuit(batch.pipeline.version.model, message, wish)
        batch.requeue([unit], backoff_seconds(_attempts(unit)), charged=True, error=message)

    def _cut(self, batch: Batch, unit: Unit, error: EmbedlineError) -> bool:
        """Ask for texts that were refused alone in halves, which become chunks.

        Return False if they cannot be cut.
        """
        if not isinstance(error, InputRejected) or not unit.failed or not batch.source.may_cut:
            return False
        refused = {digest: text for texts in unit.failed for digest, text in texts.items()}
        chunks = cut_chunks(unit.documents[0].chunks, refused)
        if chunks is None:
            return False
        # The requests around it were refused for this text and not for their size.
        _spoil(unit)
        document = replace(unit.documents[0], chunks=chunks)
        known = batch.source.known_vectors([document])
        again = unit_of(batch.pipeline, [document], unit.vectors | known)
        again.failures, again.split = unit.failures + 1, unit.split
        texts = [text for text in refused.values() if isinstance(text, str)] if error.is_too_long else []
        sizes = {estimated_size(text) for text in texts}
        again.cut_sizes = unit.cut_sizes | sizes
        batch.units.append(again)
        return True


def dead_letter(document: Document, stage: str, error: EmbedlineError | None) -> DeadLetter:
    """Return the dead letter of a document that fails."""
    code = error.sqlstate if error is not None else EmbedlineError.sqlstate
    return DeadLetter(document.row, stage, code, _message(error), document.content_hash)


def _letter_of_faults(document: Document, faults: Mapping[bytes, str]) -> DeadLetter:
    reason = next(faults[chunk.digest] for chunk in document.chunks if chunk.digest in faults)
    return DeadLetter(document.row, "embed", InvalidVectors.sqlstate, reason, document.content_hash)


def _letter_of_file(document: Document, undecodable: Mapping[bytes, str]) -> DeadLetter:
    reason = next(undecodable[chunk.digest] for chunk in document.chunks if chunk.digest in undecodable)
    return DeadLetter(document.row, "embed", UnreadableMedia.sqlstate, reason, document.content_hash)


def _halve(batch: Batch, unit: Unit) -> bool:
    """Split a unit that failed; return False if its only text cannot be split.

    The requests of one large document are halved, too: the provider may reject their size.
    """
    if isinstance(unit.error, InputRejected):
        split = unit.split or Split()
        split.refused |= {len(texts) for texts in unit.failed if len(texts) > 1}
        unit = replace(unit, split=split)
    if len(unit.documents) > 1:
        middle = len(unit.documents) // 2
        for part in (unit.documents[:middle], unit.documents[middle:]):
            batch.units.append(_again(batch, unit, part))
    elif smaller := halved_requests(unit):
        failures = unit.failures + 1
        parts = Unit(unit.documents, unit.vectors, smaller, failures=failures, split=unit.split)
        parts.cut_sizes = unit.cut_sizes
        batch.units.append(parts)
    else:
        return False
    return True


def _again(batch: Batch, unit: Unit, members: list[Document]) -> Unit:
    """Return a unit that asks once more for the texts that the members lack."""
    again = unit_of(batch.pipeline, members, unit.vectors)
    again.failures, again.split, again.cut_sizes = unit.failures + 1, unit.split, unit.cut_sizes
    return again


def _note(batch: Batch, unit: Unit, error: EmbedlineError | None = None) -> str:
    """Show the failure of a unit, and return its message.

    Nothing is learned from it of request sizes.
    """
    message = _message(error or unit.error)
    _spoil(unit)
    batch.source.record_error(message)
    return message


def _is_last_try(unit: Unit, error: EmbedlineError) -> bool:
    """Return True if a row of the unit is given up if the provider is sound."""
    if unit.faults and unit.failures:
        return True
    is_alone = len(unit.documents) == 1 and not halved_requests(unit)
    return is_alone and _is_spent(unit, error)


def _is_unsent_search(unit: Unit) -> bool:
    """Return True for a part of a failed unit that is not sent.

    One that waits for a verdict is not meant.
    """
    return unit.failures > 0 and unit.verdict is None and not any(request.future for request in unit.requests)


def _says_nothing_of_texts(error: EmbedlineError) -> bool:
    """Return True if an error is certainly the provider's.

    It limits its rate, or it cannot be reached.
    """
    return isinstance(error, TransientProviderError) and (error.throttled or error.unreachable)


def _is_about_texts(error: EmbedlineError) -> bool:
    """Return True if an error is told as one of the texts.

    A provider that answers others means it.
    """
    return isinstance(error, InputRejected | InvalidVectors)


def _attempts(unit: Unit) -> int:
    return max((document.row.attempts for document in unit.documents), default=1)


def _spoil(unit: Unit) -> None:
    if unit.split is not None:
        unit.split.is_spoilt = True


def _is_spent(unit: Unit, error: EmbedlineError) -> bool:
    """Return True if a text that fails alone has failed often enough.

    A second refusal is enough.
    """
    return _attempts(unit) >= MAX_ATTEMPTS or (_is_about_texts(error) and unit.failures > 0)


def _message(error: EmbedlineError | None) -> str:
    """Return the error's message with the provider's own, which is free of keys."""
    detail = error.detail if isinstance(error, ProviderError) else None
    return f"{error}: {detail}" if detail else str(error)
