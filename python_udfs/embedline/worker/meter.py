"""Measure a batch: seconds of each stage, requests, tokens, and failures by class."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from embedline.errors import (
    EmbedlineError,
    InputRejected,
    InvalidVectors,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.postgres.spans import Attributes, span


class Stage(StrEnum):
    """A stage of a batch; its value names the span and the column."""

    CLAIM = "claim"
    READ = "read"
    CHUNK = "chunk"
    EMBED = "embed"
    WRITE = "write"


class FailureClass(StrEnum):
    """Why a request failed, as metrics count it."""

    # Status 429.
    RATE_LIMITED = "rate_limited"
    # Any status of 500 and above.
    SERVER_ERROR = "server_error"
    # No connection, a time-out, or an answer that was cut off.
    UNREACHABLE = "unreachable"
    # The texts were refused.
    REJECTED = "rejected"
    # Address, key, account or model name were refused.
    REFUSED = "refused"
    # The answer held no usable vectors.
    INVALID_ANSWER = "invalid_answer"
    # None of these, such as status 408.
    OTHER = "other"


class Meter:
    """The measurements of one batch. Seconds are of its stages, in this session."""

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        self.seconds: defaultdict[Stage, float] = defaultdict(float)
        self.failures: Counter[FailureClass] = Counter()
        self.chunk_count = 0
        self.token_count = 0
        self.request_count = 0
        self.dead_count = 0
        # When the first request was sent and the last one answered, of time.monotonic; 0 for never.
        self._sent_at = 0.0

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Measure a block as a part of a stage, and tell exporters of it."""
        started = time.perf_counter()
        with span(stage, self.attributes):
            yield
        self.seconds[stage] += time.perf_counter() - started

    def sent(self, now: float) -> None:
        """Note that a request is sent."""
        self._sent_at = self._sent_at or now

    def answered(self, now: float, error: EmbedlineError | None, tokens: int) -> None:
        """Count an answer.

        Requests overlap, so their seconds do not add up: those to the last answer count.
        """
        if isinstance(error, TransientProviderError) and error.throttled and error.status is None:
            # Refused here, because the provider asked for a pause; it never left.
            return
        self.request_count += 1
        self.seconds[Stage.EMBED] = now - self._sent_at
        if error is None:
            self.token_count += tokens
        else:
            self.failures[failure_class(error)] += 1


def failure_class(error: EmbedlineError) -> FailureClass:
    """Return the class under which a failure is counted."""
    if isinstance(error, TransientProviderError):
        if error.throttled:
            return FailureClass.RATE_LIMITED
        if error.status is None:
            return FailureClass.UNREACHABLE
        return FailureClass.SERVER_ERROR if error.status >= 500 else FailureClass.OTHER
    if isinstance(error, InputRejected):
        return FailureClass.REJECTED
    if isinstance(error, ProviderMisconfigured):
        return FailureClass.REFUSED
    return FailureClass.INVALID_ANSWER if isinstance(error, InvalidVectors) else FailureClass.OTHER
