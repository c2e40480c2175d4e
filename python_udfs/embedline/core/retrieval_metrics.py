"""Measure recall, the share of the relevant items that a search found."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import numpy as np
import numpy.typing as npt


def recall_at_k(found: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """Return the share of `relevant` among the first k of `found`.

    If a query has more than k relevant items, the share is out of k. Definition: Manning, Raghavan, Schuetze,
    "Introduction to Information Retrieval", 8.4, with the denominator bounded by k. Raises ValueError if nothing is
    relevant, because the share of nothing is not a number.
    """
    wanted = set(relevant)
    if not wanted:
        raise ValueError("recall needs at least one relevant item")
    return len(wanted & set(found[:k])) / min(k, len(wanted))


# Relative difference up to which two distances count as the same, because pgvector adds up in float32.
_SAME_DISTANCE = 1e-5


def recall_by_distance(found: Sequence[float], exact: npt.NDArray[np.float64]) -> float:
    """Return the share of the nearest that were found.

    `exact` are the distances of the nearest, in ascending order.
    """
    if len(exact) == 0:
        return 1.0
    farthest = exact[-1] + _SAME_DISTANCE * (1 + abs(exact[-1]))
    return min(sum(bool(distance <= farthest) for distance in found), len(exact)) / len(exact)
