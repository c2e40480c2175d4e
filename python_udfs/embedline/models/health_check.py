"""Whether a provider that failed a request answers anything at all: the judge between a text and its provider.

A failure looks the same whether a text brings its provider down, an account is closed or the provider is away: what tells
them apart is an answer to something else. Each good answer is noted with the time at which its request was sent. Where none
is recent enough, the model is asked for a short, harmless text; the rows that failed wait for its answer in their batch.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from embedline.core.embedding import EmbeddingBlock
from embedline.errors import EmbedlineError, InvalidVectors
from embedline.models.pool import embedder_for
from embedline.postgres.session import Session

if TYPE_CHECKING:
    from embedline.catalog.load import Version

Health = Literal["sound", "failing"]

# What is asked; a handful of tokens.
PROBE_TEXT = "embedline probe"
_CACHE_KEY = "embedline.answers"


@dataclass
class _Answers:
    """What this session knows of a model. Times are of time.monotonic."""

    # When the latest request was sent that was answered well.
    good_sent_at: float = float("-inf")
    probe: Future[EmbeddingBlock] | None = None
    probe_sent_at: float = float("-inf")


@dataclass(frozen=True)
class Verdict:
    """What is known of a provider: `health`, or `pending` until the probe is answered; `error` is the probe's own."""

    health: Health | None = None
    pending: Future[EmbeddingBlock] | None = None
    error: EmbedlineError | None = None


def note_answer(session: Session, model_id: int, sent_at: float) -> None:
    """Note that a request that was sent at a time has been answered well."""
    answers = _answers(session, model_id)
    answers.good_sent_at = max(answers.good_sent_at, sent_at)


def ask(session: Session, version: Version, since: float, in_flight: Future[EmbeddingBlock] | None = None) -> Verdict:
    """Say whether the version's model has answered anything that was sent at or after `since`.

    If nothing was, wait for a request that is `in_flight` since then, or else ask for the harmless text.
    """
    answers = _answers(session, version.model.model_id)
    if answers.good_sent_at >= since:
        return Verdict("sound")
    probe = answers.probe
    if in_flight is not None and answers.probe_sent_at < since:
        return Verdict(pending=in_flight)
    if probe is None or probe.cancelled() or (answers.probe_sent_at < since and probe.done()):
        answers.probe_sent_at = time.monotonic()
        probe = answers.probe = embedder_for(session, version.model).submit([PROBE_TEXT], "document")
    if not probe.done():
        return Verdict(pending=probe)
    error = _error_of(probe, version)
    if error is None:
        note_answer(session, version.model.model_id, answers.probe_sent_at)
        return Verdict("sound")
    return Verdict("failing", error=error)


def _answers(session: Session, model_id: int) -> _Answers:
    known: dict[int, _Answers] = session.cache.setdefault(_CACHE_KEY, {})
    return known.setdefault(model_id, _Answers())


def _error_of(probe: Future[EmbeddingBlock], version: Version) -> EmbedlineError | None:
    """Return what is wrong with the probe's answer; one with a useless vector is no good answer either."""
    from embedline.core import vectors

    error = probe.exception()
    if error is not None:
        if isinstance(error, EmbedlineError):
            return error
        raise error
    block = probe.result()
    try:
        matrix = vectors.matrix_from_bytes(block.data, block.count, block.dimensions)
        vectors.check_shape(matrix, 1, version.dimensions)
    except InvalidVectors as invalid:
        return invalid
    faults = vectors.find_faults(matrix, "vector")
    return InvalidVectors(faults[0]) if faults else None
