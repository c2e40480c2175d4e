"""Fuse two rankings into one by reciprocal ranks.

    score = semantic_weight / (rrf_k + semantic rank) + keyword_weight / (rrf_k + keyword rank)

A chunk that one ranking does not have gets nothing from it. The formula is of Cormack, Clarke and Büttcher, "Reciprocal Rank
Fusion outperforms Condorcet and individual Rank Learning Methods", 2009. Their rrf_k is 60.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def fuse(
    semantic: Sequence[Row], keyword: Sequence[Row], semantic_weight: float, keyword_weight: float, rrf_k: int
) -> list[Row]:
    """Return the chunks of both rankings, best first.

    Rows have chunk_id and key; those returned have score, semantic_rank and keyword_rank, too.
    """
    fused: dict[int, Row] = {}
    for rows, column, weight in (
        (semantic, "semantic_rank", semantic_weight),
        (keyword, "keyword_rank", keyword_weight),
    ):
        for rank, row in enumerate(rows, 1):
            found = fused.setdefault(
                row["chunk_id"], {**row, "score": 0.0, "semantic_rank": None, "keyword_rank": None}
            )
            found["score"] += weight / (rrf_k + rank)
            found[column] = rank
    return sorted(fused.values(), key=lambda row: (-row["score"], str(row["key"]), row["chunk_id"]))


def best_of_documents(rows: Sequence[Row]) -> list[Row]:
    """Return the best chunk of each document, in the order of the rows."""
    best: dict[str, Row] = {}
    for row in rows:
        best.setdefault(row["key"], row)
    return list(best.values())
