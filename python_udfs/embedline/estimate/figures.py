"""Figures of an answer, and those of storage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from embedline.catalog.values import Model
from embedline.core import storage_size
from embedline.estimate.estimators import Amount
from embedline.estimate.measure import Measured
from embedline.estimate.plan import Plan

MEGABYTE = 1024 * 1024
_LONGEST = 1e20


@dataclass(frozen=True)
class Figure:
    """One line of the answer; `amount` is None if it is not known."""

    name: str
    amount: Amount | None
    unit: str
    note: str
    decimals: int = 0

    def row(self) -> dict[str, Any]:
        """Return the line as embedline.estimate's columns."""
        values: dict[str, Any] = {"figure": self.name, "value": None, "low": None, "high": None}
        if self.amount is not None:
            for column, number in (("value", self.amount.value), ("low", self.amount.low), ("high", self.amount.high)):
                values[column] = None if math.isinf(number) else _rounded(number, self.decimals)
        return {**values, "unit": self.unit, "note": self.note}


def _rounded(number: float, decimals: int) -> str:
    # A decimal has 28 digits.
    return f"{number:.0f}" if abs(number) >= _LONGEST else str(round(Decimal(str(number)), decimals))


def sizes(plan: Plan, model: Model, measured: Measured, server_version: int) -> list[Figure]:
    """Return the size of vectors and index, and the memory to build it."""
    chunks = measured.sample.total(measured.chunks)
    dimensions = model.config.dimensions or 0
    kind = f"{plan.column_type}({dimensions})"

    def size(bytes_of: Any, *more: int) -> Amount:
        low, value, high = (
            bytes_of(count, dimensions, plan.column_type, *more) / MEGABYTE
            for count in (chunks.low, chunks.value, min(chunks.high, 1e15))
        )
        return Amount(value, max(high - value, value - low) if chunks.margin else 0.0)

    figures = [Figure("vectors", size(storage_size.table_bytes), "MB", f"{kind} with the primary key", 1)]
    if plan.has_index and storage_size.has_hnsw(dimensions, plan.column_type):
        index = f"HNSW, m = {plan.m}"
        memory = "while it is built; set maintenance_work_mem to at least that"
        figures.append(Figure("index", size(storage_size.hnsw_bytes, plan.m), "MB", index, 1))
        figures.append(
            Figure("index memory", size(storage_size.hnsw_build_memory, plan.m, server_version), "MB", memory, 1)
        )
    else:
        note = f"none; HNSW indexes vector up to 2000 dimensions, halfvec up to 4000, this is {kind}"
        figures.append(Figure("index", None, "MB", note))
    return figures
