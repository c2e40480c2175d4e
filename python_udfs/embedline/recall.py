"""Recall: how much of what should have been found was found."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence


def recall_at_k(found: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """Return the share of `relevant` among the first k of `found`; a query with more than k relevant is out of k.

    Definition: Manning, Raghavan, Schuetze, "Introduction to Information Retrieval", 8.4, with the denominator bounded by k.
    Raises ValueError where nothing is relevant, since the share of nothing is not a number.
    """
    wanted = set(relevant)
    if not wanted:
        raise ValueError("recall needs at least one relevant item")
    return len(wanted & set(found[:k])) / min(k, len(wanted))
