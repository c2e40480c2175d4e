"""Retry policy: how long a row waits after a transient failure, and when it is given up."""

from __future__ import annotations

import random

MAX_ATTEMPTS = 5
# A row whose worker died this many times while it was claimed is taken for the cause.
MAX_CRASHES = 3
# Rows that were in flight when a worker died come back in smaller claims, the second time alone.
ROWS_PER_CLAIM_AFTER_CRASHES = {1: 32, 2: 1}

_BASE_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)


def backoff_seconds(attempts: int, retry_after: float | None = None, *, draw: float | None = None) -> float:
    """Return the seconds to wait after the `attempts`-th failed try: full jitter below 1, 2, 4, 8, 16 s.

    Full jitter after "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015). The provider's own Retry-After is
    a floor. `draw` in [0, 1) replaces the random draw, for tests.
    """
    base = _BASE_SECONDS[min(max(attempts, 1), len(_BASE_SECONDS)) - 1]
    jitter = (random.random() if draw is None else draw) * base
    return max(jitter, retry_after or 0.0)


def circuit_seconds(failures: int, retry_after: float | None = None) -> float:
    """Return how long a model stays untried after `failures` earlier provider-wide failures in a row.

    What the provider asks for, but 50 ms at least, doubling to 60 s as long as that does not help; without its wish 0.5 s
    doubling to 60 s.
    """
    if retry_after is not None:
        return max(retry_after, min(0.05 * 2.0 ** min(max(failures, 0), 11), 60.0))
    return float(min(0.5 * 2.0 ** min(max(failures, 0), 10), 60.0))
