"""Measure a model by held-out queries: exact ranking of rows by their best chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from embedline.client.training.corpus import Corpus
from embedline.core import statistics
from embedline.core.scores import score_rankings
from embedline.core.statistics import Comparison, FloatArray

K = 10
Matrix = npt.NDArray[np.float32]
Encode = Callable[[Sequence[str]], Matrix]
# Queries that are ranked at a time: with 50,000 chunks 13 MB of scores.
_BLOCK = 64
# A model that is not better is not wanted, so the margin of a gate is 0 here.
_MARGIN = 0.0
# Columns of the scores that are told.
_TOLD = ("recall", "ndcg")


def unit(matrix: Matrix) -> Matrix:
    """Return the rows with a length of 1; a row of zeros stays."""
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    result: Matrix = matrix / np.maximum(lengths, np.float32(1e-12))
    return result


def rank(queries: Matrix, chunks: Matrix, corpus: Corpus, k: int = K) -> list[list[str]]:
    """Return the keys of the k best rows for each query, the best first."""
    ranked: list[list[str]] = []
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ chunks.T
        best = np.maximum.reduceat(scores, corpus.starts, axis=1)
        # Stable, so that equal scores do not change places from run to run.
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        ranked += [[corpus.documents[place] for place in row] for row in order.tolist()]
    return ranked


def score(queries: Matrix, chunks: Matrix, corpus: Corpus, grades: Sequence[dict[str, float]]) -> FloatArray:
    """Return recall@10, nDCG@10 and the reciprocal rank of each query."""
    return score_rankings(rank(queries, chunks, corpus), grades, K)


def compare(before: FloatArray, after: FloatArray, seed: int) -> tuple[str, dict[str, Any]]:
    """Return the outcome, and the measures before and after with intervals of 95 %.

    The outcome is gain, loss or inconclusive, by the interval of the difference in nDCG@10.
    """
    compared = statistics.judge_columns(before, after, _MARGIN, seed)
    deciding = compared[statistics.DECIDING]
    outcome = "gain" if deciding.low > 0 else "loss" if deciding.high < 0 else "inconclusive"
    metrics = {f"{name}@{K}": _told(compared[statistics.MEASURES.index(name)]) for name in _TOLD}
    return outcome, {"queries": len(before), **metrics}


def _told(compared: Comparison) -> dict[str, Any]:
    return {
        "before": compared.old, "before_interval": list(compared.old_interval),
        "after": compared.new, "after_interval": list(compared.new_interval),
        "difference": compared.difference, "difference_interval": [compared.low, compared.high],
        "queries_to_decide": compared.queries_to_decide,
    }  # fmt: skip
