"""Decide how long a row waits after a failure, and when it is quarantined."""

from __future__ import annotations

import random

MAX_ATTEMPTS = 5
# A row is taken for the cause once this many workers died while they had it claimed.
MAX_CRASHES = 3
# Largest claims, in rows, for rows that were in flight when a worker died, by deaths. The second time a row is claimed
# alone.
ROWS_PER_CLAIM_AFTER_CRASHES = {1: 32, 2: 1}

_BASE_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)


def backoff_seconds(attempts: int, retry_after: float | None = None, *, draw: float | None = None) -> float:
    """Return the seconds to wait after the `attempts`-th failed attempt.

    Full jitter below 1, 2, 4, 8, 16 s, after "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015). The
    provider's own Retry-After is a floor. `draw` in [0, 1) replaces the random draw, for tests.
    """
    base = _BASE_SECONDS[min(max(attempts, 1), len(_BASE_SECONDS)) - 1]
    jitter = (random.random() if draw is None else draw) * base
    return max(jitter, retry_after or 0.0)


def circuit_seconds(failures: int, retry_after: float | None = None) -> float:
    """Return the seconds that a model's circuit stays open.

    `failures` counts the earlier provider-wide failures in a row. With `retry_after` the circuit stays open that long,
    but at least 50 ms, doubling to 60 s with each failure. Without it, 0.5 s double to 60 s.
    """
    if retry_after is not None:
        return max(retry_after, min(0.05 * 2.0 ** min(max(failures, 0), 11), 60.0))
    return float(min(0.5 * 2.0 ** min(max(failures, 0), 10), 60.0))
