"""Recall: how much of what should have been found was found."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import numpy as np
import numpy.typing as npt


def recall_at_k(found: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """Return the share of `relevant` among the first k of `found`; a query with more than k relevant is out of k.

    Definition: Manning, Raghavan, Schuetze, "Introduction to Information Retrieval", 8.4, with the denominator bounded by k.
    Raises ValueError where nothing is relevant, since the share of nothing is not a number.
    """
    wanted = set(relevant)
    if not wanted:
        raise ValueError("recall needs at least one relevant item")
    return len(wanted & set(found[:k])) / min(k, len(wanted))


# Two distances are the same within this: pgvector adds up in float32.
_SAME_DISTANCE = 1e-5


def recall_by_distance(found: Sequence[float], exact: npt.NDArray[np.float64]) -> float:
    """Return the share of the nearest that were found; `exact` are their distances, in order."""
    if len(exact) == 0:
        return 1.0
    farthest = exact[-1] + _SAME_DISTANCE * (1 + abs(exact[-1]))
    return min(sum(bool(distance <= farthest) for distance in found), len(exact)) / len(exact)
