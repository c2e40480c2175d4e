"""Keep measurements of quality as a series, and compare them with baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from embedline.catalog.values import Pipeline
from embedline.core import statistics
from embedline.core.statistics import FloatArray
from embedline.postgres.session import Session

Kind = Literal["canary", "reach", "fidelity", "drift", "lag"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# A fall by this much below the baseline raises an alert, if the interval excludes the baseline.
FALL = 0.02
# Two equal falls may differ by rounding.
_ROUNDING = 1e-9
_RECORD = """
    INSERT INTO embedline.quality_check
        (pipeline_id, version_id, kind, value, low, high, baseline, query_count, is_poor, error, seconds)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
"""
_RECORD_TYPES = [
    *("bigint", "bigint", "text", "double precision", "double precision", "double precision", "double precision"),
    *("integer", "boolean", "text", "real"),
]
# While a kind is poor it is measured every minute or so. Of an hour the first and the last are kept.
_THIN_OUT = """
    DELETE FROM embedline.quality_check AS q
    WHERE q.pipeline_id = $1 AND q.kind = $2 AND q.is_poor AND EXISTS (
        SELECT FROM embedline.quality_check AS o
        WHERE o.pipeline_id = $1 AND o.kind = $2 AND o.is_poor AND o.measured_at < q.measured_at
            AND o.measured_at > clock_timestamp() - interval '1 hour')
"""
_SET_BASELINE = """
    INSERT INTO embedline.quality_baseline AS b (pipeline_id, kind, value) VALUES ($1, $2, $3)
    ON CONFLICT (pipeline_id, kind) DO UPDATE SET value = b.value RETURNING b.value
"""


@dataclass(frozen=True)
class Measured:
    """A measurement that is to be kept.

    `interval` is that of 95 % around the value.
    """

    kind: Kind
    value: float
    query_count: int = 0
    interval: tuple[float, float] | None = None
    baseline: float | None = None
    is_poor: bool = False


def interval_beside(before: FloatArray, now: FloatArray) -> tuple[float, float]:
    """Return the interval of the mean score now, by the paired differences to before.

    It excludes the mean before if the interval of the mean difference excludes 0. Few queries exclude nothing by chance.
    """
    compared = statistics.judge(before, now, FALL)
    return max(compared.old + compared.low, 0.0), min(compared.old + compared.high, 1.0)


def has_fallen(value: float, interval: tuple[float, float], baseline: float) -> bool:
    """Return True if a value is 2 points below its baseline.

    Its interval must exclude the baseline, too.
    """
    return value <= baseline - FALL + _ROUNDING and interval[1] < baseline


def compared(session: Session, pipeline: Pipeline, kind: Kind, recalls: FloatArray) -> Measured:
    """Return the mean of recalls beside the baseline of its kind.

    The first measurement is the baseline.
    """
    value, interval = float(recalls.mean()), statistics.mean_interval(recalls)
    baseline = float(
        session.scalar(_SET_BASELINE, ["bigint", "text", "double precision"], pipeline.pipeline_id, kind, value)
    )
    return Measured(kind, value, len(recalls), interval, baseline, has_fallen(value, interval, baseline))


def compared_by_query(session: Session, pipeline: Pipeline, before: list[float | None], now: FloatArray) -> Measured:
    """Return the mean recall of the canaries, compared query by query.

    The first time there is nothing to compare with.
    """
    measured = compared(session, pipeline, "canary", now)
    if any(score is None for score in before):
        return measured
    scores = np.array(before, dtype=np.float64)
    interval, baseline = interval_beside(scores, now), float(scores.mean())
    is_poor = has_fallen(measured.value, interval, baseline)
    return Measured("canary", measured.value, len(now), interval, baseline, is_poor)


def record(session: Session, pipeline: Pipeline, measured: Measured, seconds: float) -> dict[str, Any]:
    """Add a measurement to the series; return the row that a person reads."""
    low, high = measured.interval or (None, None)
    if measured.is_poor:
        session.query(_THIN_OUT, ["bigint", "text"], pipeline.pipeline_id, measured.kind)
    session.query(
        _RECORD, _RECORD_TYPES, pipeline.pipeline_id, pipeline.version.version_id, measured.kind, measured.value, low,
        high, measured.baseline, measured.query_count, measured.is_poor, None, seconds,
    )  # fmt: skip
    return {
        "pipeline": pipeline.name, "kind": measured.kind, "value": _rounded(measured.value), "low": _rounded(low),
        "high": _rounded(high), "baseline": _rounded(measured.baseline), "queries": measured.query_count,
        "verdict": "poor" if measured.is_poor else "good", "detail": None,
    }  # fmt: skip


def record_error(session: Session, pipeline: Pipeline, kind: Kind, message: str, seconds: float) -> dict[str, Any]:
    """Add to the series why nothing was measured; return the row that a person reads."""
    session.query(
        _RECORD, _RECORD_TYPES, pipeline.pipeline_id, pipeline.version.version_id, kind, None, None, None, None, 0,
        False, message, seconds,
    )  # fmt: skip
    return {
        "pipeline": pipeline.name, "kind": kind, "value": None, "low": None, "high": None, "baseline": None,
        "queries": 0, "verdict": "not measured", "detail": message,
    }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
