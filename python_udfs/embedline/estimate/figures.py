"""Figures of an answer, and those of storage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from embedline.catalog.values import Model
from embedline.core import ivfflat, storage_size
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
    """Return the size of vectors and index, and the memory to build it.

    Those of the other index method stand beside those of the one that is chosen.
    """
    chunks = measured.sample.total(measured.chunks)
    dimensions = model.config.dimensions or 0
    kind = f"{plan.column_type}({dimensions})"

    def size(bytes_of: Callable[[float], float]) -> Amount:
        low, value, high = (bytes_of(count) / MEGABYTE for count in (chunks.low, chunks.value, min(chunks.high, 1e15)))
        return Amount(value, max(high - value, value - low) if chunks.margin else 0.0)

    def lists(count: float) -> int:
        return plan.lists or ivfflat.default_lists(count)

    shape = (dimensions, plan.column_type)
    vectors = size(lambda count: storage_size.table_bytes(count, *shape))
    figures = [Figure("vectors", vectors, "MB", f"{kind} with the primary key", 1)]
    if plan.method == "none" or not storage_size.has_hnsw(*shape):
        note = f"none; indexes take vector up to 2000 dimensions, halfvec up to 4000, this is {kind}"
        return [*figures, Figure("index", None, "MB", note)]
    methods = {
        "hnsw": (
            f"HNSW, m = {plan.m}",
            size(lambda count: storage_size.hnsw_bytes(count, *shape, plan.m)),
            size(lambda count: storage_size.hnsw_build_memory(count, *shape, plan.m, server_version)),
            "while it is built; set maintenance_work_mem to at least that",
        ),
        "ivfflat": (
            f"IVFFlat, lists = {lists(chunks.value)}",
            size(lambda count: ivfflat.index_bytes(count, *shape, lists(count))),
            size(lambda count: ivfflat.build_memory(count, *shape, lists(count))),
            "while it is built; pgvector refuses to build it with less maintenance_work_mem",
        ),
    }
    for method in (plan.method, "ivfflat" if plan.method == "hnsw" else "hnsw"):
        label = "" if method == plan.method else "other "
        what, index, memory, note = methods[method]
        figures.append(Figure(f"{label}index", index, "MB", what, 1))
        figures.append(Figure(f"{label}index memory", memory, "MB", note, 1))
    return figures
