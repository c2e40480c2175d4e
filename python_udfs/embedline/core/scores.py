"""Score the rankings of labelled queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedline.core import statistics
from embedline.core.statistics import FloatArray


def score_rankings(keys: Sequence[Sequence[str]], grades: Sequence[dict[str, float]], k: int) -> FloatArray:
    """Return the measures of rankings, shape (queries, measures)."""
    return np.array([statistics.score_ranking(found, wanted, k) for found, wanted in zip(keys, grades, strict=True)])
