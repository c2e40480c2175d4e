"""Report a gate to a person: one row for each measure, the verdict first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embedline.core import statistics
from embedline.core.statistics import Comparison, FloatArray, Verdict
from embedline.gate.index_fidelity import Fidelity
from embedline.gate.options import GateOptions

# Share of common results below which old and new are worth checking, although a better model finds other things.
_FEW_IN_COMMON = 0.2
# Most groups shown, the largest first.
MAX_GROUPS = 50
# Decimals of the figures that are returned and stored, of a measure or of a millisecond.
_DECIMALS = 4
_SHOWN = {"recall": "recall@{k}", "ndcg": "nDCG@{k}", "mrr": "MRR@{k}"}


@dataclass(frozen=True)
class Row:
    """A row of evaluate's result.

    low and high are the 95 % interval of the difference, or of `new` if there is no difference.
    """

    measure: str
    old: float | None = None
    new: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str | None = None
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as PL/Python and JSON take it."""
        # Rounded for a person, after the exact figures have decided.
        return {
            name: round(float(value), _DECIMALS) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def overall(fidelity: Verdict, quality: Verdict) -> Verdict:
    """Return fail if either fails, pass if both pass, else inconclusive."""
    if "fail" in (fidelity, quality):
        return "fail"
    return "pass" if (fidelity, quality) == ("pass", "pass") else "inconclusive"


def fidelity_rows(fidelity: Fidelity, k: int) -> list[Row]:
    """Return the share of the exact result that the index finds.

    If there are several indexes, the figures of each follow.
    """
    chosen, measure = fidelity.chosen, f"index recall@{k}"
    if chosen is None:
        rows = [Row(measure, verdict=fidelity.verdict, detail=fidelity.detail)]
    else:
        rows = [Row(
            measure, None, chosen.recall, None, chosen.low, chosen.high, fidelity.verdict, fidelity.detail
        )]  # fmt: skip
    if len(fidelity.figures) > 1 or (chosen is None and fidelity.figures):
        for figures in fidelity.figures:
            name = f"{figures.name or 'own'} index"
            detail = figures.index + (", which search uses" if figures == chosen else "")
            p95 = 1000 * float(np.percentile(figures.seconds, 95))
            rows += [
                Row(f"{name}, recall@{k}", None, figures.recall, None, figures.low, figures.high, None, detail),
                Row(f"{name}, search p95 ms", new=p95, detail=f"{k} chunks, {len(figures.seconds)} queries"),
                Row(f"{name}, bytes", new=float(figures.bytes)),
            ]
    return rows


def quality_rows(compared: Sequence[Comparison], k: int, margin: float, more_come_from: str) -> list[Row]:
    """Return the measures of both versions, the deciding one first.

    `more_come_from` is that of QuerySet.
    """
    order = sorted(range(len(compared)), key=lambda column: column != statistics.DECIDING)
    return [_quality_row(column, compared[column], k, margin, more_come_from) for column in order]


def _quality_row(column: int, compared: Comparison, k: int, margin: float, more_come_from: str) -> Row:
    is_deciding = column == statistics.DECIDING
    detail = f"old {_interval(compared.old_interval)}, new {_interval(compared.new_interval)}"
    if is_deciding:
        detail = f"decides: a loss of up to {margin:g} passes; {compared.queries} queries; {detail}"
        detail += more_queries(compared, more_come_from)
    return Row(
        _SHOWN[statistics.MEASURES[column]].format(k=k), compared.old, compared.new, compared.difference, compared.low,
        compared.high, compared.verdict if is_deciding else None, detail,
    )  # fmt: skip


def more_queries(compared: Comparison, more_come_from: str) -> str:
    """Return how many queries would decide, empty if it is decided."""
    if compared.queries_to_decide is None:
        return ""
    how = more_come_from.replace("query_count", f"query_count => {compared.queries_to_decide}")
    return f"; about {compared.queries_to_decide} queries would decide ({how})"


def own_quality_rows(scores: FloatArray, k: int, seed: int) -> list[Row]:
    """Return the measures of one version alone."""
    rows = []
    for column in sorted(range(scores.shape[1]), key=lambda column: column != statistics.DECIDING):
        low, high = statistics.mean_interval(scores[:, column], seed)
        name = _SHOWN[statistics.MEASURES[column]].format(k=k)
        rows.append(Row(name, None, float(scores[:, column].mean()), None, low, high, None, f"{len(scores)} queries"))
    return rows


def overlap_row(old: Sequence[Sequence[str]], new: Sequence[Sequence[str]], k: int) -> Row:
    """Return the share of the found documents that both versions find.

    It is an alarm at most.
    """
    shares = [len(set(a) & set(b)) / max(len(a), len(b), 1) for a, b in zip(old, new, strict=True)]
    mean = float(np.mean(shares))
    few = mean < _FEW_IN_COMMON
    detail = "documents that both find; never decides" + (": look at some queries yourself" if few else "")
    return Row(f"overlap@{k}", None, mean, verdict="alarm" if few else None, detail=detail)


def latency_rows(what: str, old: Sequence[float] | None, new: Sequence[float], detail: str) -> list[Row]:
    """Return median and 95th percentile in milliseconds."""
    rows = []
    for percent in (50, 95):
        before = None if old is None else 1000 * float(np.percentile(old, percent))
        after = 1000 * float(np.percentile(new, percent))
        difference = None if before is None else after - before
        rows.append(Row(f"{what} p{percent} ms", before, after, difference, detail=detail))
    return rows


def group_rows(
    old: FloatArray, new: FloatArray, groups: Sequence[str | None], column: str, options: GateOptions
) -> list[Row]:
    """Return the deciding measure of each group.

    It never decides, but a group that falls beyond chance is an alarm. Of n groups one would seem to fall by chance n
    times as often as a single one. So each interval is that much wider (Bonferroni).
    """
    labels = np.array(["(none)" if group is None else group for group in groups])
    names, counts = np.unique(labels, return_counts=True)
    largest = [str(names[i]) for i in np.lexsort((names, -counts))[:MAX_GROUPS]]
    confidence = 1 - (1 - statistics.CONFIDENCE) / len(largest)
    rows = []
    for name in largest:
        chosen = labels == name
        compared = statistics.judge(
            old[chosen, statistics.DECIDING], new[chosen, statistics.DECIDING], options.margin, options.seed, confidence
        )
        falls = compared.high < 0
        detail = f"{compared.queries} queries" + ("; falls by more than chance explains" if falls else "")
        rows.append(Row(
            f"nDCG@{options.k}, {column} = {name}", compared.old, compared.new, compared.difference, compared.low, compared.high,
            "alarm" if falls else None, detail,
        ))  # fmt: skip
    return rows


def verdict_row(verdict: Verdict, fidelity: Fidelity, quality: Verdict, note: str) -> Row:
    """Return the verdict that follows from all of it."""
    return Row("verdict", verdict=verdict, detail=f"index {fidelity.verdict}, quality {quality}; {note}")


def _interval(edges: tuple[float, float]) -> str:
    return f"[{edges[0]:.3f}, {edges[1]:.3f}]"
