"""Estimate totals of a table from a sample of its rows, with standard errors.

Cluster sampling with a ratio estimator: Cochran, Sampling Techniques (1977), sections 9A.1 and 6.3. The finite
population correction is that of simple random sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Amount:
    """An estimated total and the half width of its 95 % interval, 0 if exact."""

    value: float
    margin: float = 0.0

    @property
    def low(self) -> float:
        """Return the lower end of the interval; totals are never negative."""
        return max(self.value - self.margin, 0.0)

    @property
    def high(self) -> float:
        """Return the upper end of the interval."""
        return self.value + self.margin

    def times(self, factor: float) -> Amount:
        """Return the amount in another unit, or a share of it."""
        return Amount(self.value * factor, self.margin * factor)


@dataclass(frozen=True)
class Sample:
    """The rows of a sample.

    `clusters` holds the block of each row, `population` the number of rows in the table. If `every_block`, rows were
    drawn from all blocks of the table, and rows are the units; else blocks are.
    """

    population: Amount
    clusters: Sequence[tuple[int, int]]
    every_block: bool

    def total(self, values: Sequence[float]) -> Amount:
        """Return the total over the whole table of a value known for each sampled row."""
        size = len(values)
        if size == 0 or self.population.value == 0:
            return Amount(0.0)
        array = np.asarray(values, dtype=np.float64)
        mean = float(array.mean())
        share = min(size / self.population.value, 1.0)
        units = self._unit_sums(array - mean)
        count = len(units)
        if share >= 1.0:
            error = 0.0
        elif count < 2:
            error = math.inf
        else:
            error = math.sqrt((1 - share) * count / (count - 1) * float((units**2).sum())) / size
        value = self.population.value * mean
        margin = _student(count - 1) * error * self.population.value if error else 0.0
        return Amount(value, math.hypot(margin, self.population.margin * mean))

    def _unit_sums(self, residuals: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.every_block:
            return residuals
        _, places = np.unique(np.asarray(self.clusters, dtype=np.int64), axis=0, return_inverse=True)
        sums: npt.NDArray[np.float64] = np.bincount(places.reshape(-1), weights=residuals).astype(np.float64)
        return sums


def block_total(rows_a_block: Sequence[int], blocks: int) -> Amount:
    """Return the rows of a table of this many blocks from the rows of some of them."""
    if not rows_a_block:
        return Amount(0.0)
    counts = np.asarray(rows_a_block, dtype=np.float64)
    deviation = float(counts.std(ddof=1)) if len(counts) > 1 else math.inf
    share = min(len(counts) / blocks, 1.0)
    error = deviation * math.sqrt(1 - share) / math.sqrt(len(counts)) if share < 1 else 0.0
    return Amount(blocks * float(counts.mean()), _student(len(counts) - 1) * error * blocks)


def _student(freedom: int) -> float:
    # 0.975 quantile of Student's t; the expansion is within 1 % from 3 degrees of freedom on.
    return 1.96 + 2.4 / freedom + 2.8 / freedom**2 if freedom > 0 else math.inf
