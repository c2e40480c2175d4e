"""Check whether a provider that failed a request answers anything at all.

A failure has the same form if a text brings its provider down, if an account is closed, or if the provider is away.
Only an answer to something else tells these cases apart. Each good answer is recorded with the time at which its
request was sent. If none is recent enough, the model is asked for a short, harmless text. The failed rows wait for its
answer in their batch.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from embedline.core.embedding import EmbeddingBlock
from embedline.core.media import harmless_input
from embedline.errors import EmbedlineError, InvalidVectors
from embedline.models.pool import embedder_for
from embedline.models.space import space_fault
from embedline.postgres.session import Session

if TYPE_CHECKING:
    from embedline.catalog.values import Version

Health = Literal["sound", "failing"]

# The harmless text, a handful of tokens.
PROBE_TEXT = "embedline probe"
_CACHE_KEY = "embedline.answers"


@dataclass
class _Answers:
    """The answers of a model in this session; times are of time.monotonic."""

    # Time at which the latest request with a good answer was sent.
    good_sent_at: float = float("-inf")
    probe: Future[EmbeddingBlock] | None = None
    probe_sent_at: float = float("-inf")


@dataclass(frozen=True)
class Verdict:
    """The health of a provider, or the pending probe that will tell it.

    `error` is the probe's own.
    """

    health: Health | None = None
    pending: Future[EmbeddingBlock] | None = None
    error: EmbedlineError | None = None


def note_answer(session: Session, model_id: int, sent_at: float) -> None:
    """Record the good answer to a request that was sent at `sent_at`."""
    answers = _answers(session, model_id)
    answers.good_sent_at = max(answers.good_sent_at, sent_at)


def ask(session: Session, version: Version, since: float, in_flight: Future[EmbeddingBlock] | None = None) -> Verdict:
    """Return the health of the version's model since a time.

    Any good answer to a request sent at or after `since` proves it sound. Without one, the verdict waits for a request
    that is `in_flight` since then, or else for the harmless text.
    """
    answers = _answers(session, version.model.model_id)
    if answers.good_sent_at >= since:
        return Verdict("sound")
    probe = answers.probe
    if in_flight is not None and answers.probe_sent_at < since:
        return Verdict(pending=in_flight)
    if probe is None or probe.cancelled() or (answers.probe_sent_at < since and probe.done()):
        answers.probe_sent_at = time.monotonic()
        harmless = harmless_input(version.model.modalities, PROBE_TEXT)
        probe = answers.probe = embedder_for(session, version.model).submit([harmless], "document")
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
    """Return the error of the probe's answer, None for a good answer.

    An answer with an unusable vector is not a good one.
    """
    from embedline.core import vectors

    error = probe.exception()
    if error is not None:
        if isinstance(error, EmbedlineError):
            return error
        raise error
    block = probe.result()
    if fault := space_fault(version.model, block):
        return fault
    try:
        matrix = vectors.matrix_from_bytes(block.data, block.count, block.dimensions)
        vectors.check_shape(matrix, 1, version.dimensions)
    except InvalidVectors as invalid:
        return invalid
    faults = vectors.find_faults(matrix, "vector")
    return InvalidVectors(faults[0]) if faults else None
