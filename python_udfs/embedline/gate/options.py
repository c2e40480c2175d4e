"""Options of a gate, checked."""

from __future__ import annotations

from dataclasses import dataclass

from embedline.errors import InvalidParameter


@dataclass(frozen=True)
class GateOptions:
    """What a caller decides of a gate."""

    k: int
    margin: float
    query_count: int
    breakdown: str | None
    seed: int
    min_recall: float

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 100:
            raise InvalidParameter(f"k must be between 1 and 100, not {self.k}")
        if not 0 <= self.margin < 1:
            raise InvalidParameter(
                f"margin must be at least 0 and below 1, not {self.margin:g}",
                hint="0.01 lets a version lose one point.",
            )
        if not 1 <= self.query_count <= 100_000:
            raise InvalidParameter(f"query_count must be between 1 and 100000, not {self.query_count}")
        if not 0 <= self.seed < 2**63:
            raise InvalidParameter("seed must be at least 0")
        if not 0 < self.min_recall <= 1:
            raise InvalidParameter(f"min_recall must be above 0 and at most 1, not {self.min_recall:g}")
