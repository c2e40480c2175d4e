"""Put quality in words: recall over time, and the evidence of model upgrades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedline.client.report import words
from embedline.client.report.blocks import Cell, Column, Figure, Group, Section, Table, text_cells, verdict_cell
from embedline.client.report.charts import Caption, Format, Line, Point, Span, line_chart, span_chart, swatch
from embedline.client.report.figures import Evaluation, Measure, Quality, Report, VersionState

# Pipelines with a chart of each family at most, as in the other sections.
_MOST_CHARTS = 6
_SOURCES = {"canary": "labelled queries", "known_item": "queries made from the corpus"}


@dataclass(frozen=True)
class _Family:
    """Kinds of measurements that share a scale; `most` is the largest possible value."""

    name: str
    title: str
    kinds: dict[str, str]
    form: Format
    most: float | None


_FAMILIES = (
    _Family(
        "recall",
        "Recall@10",
        {"canary": "of the canaries", "reach": "of the index, made-up queries", "fidelity": "of the index, real queries"},
        words.ratio,
        1.0,
    ),
    _Family("drift", "Cosine of probe texts to their stored vectors", {"drift": "lowest cosine"}, words.ratio, 1.0),
    _Family("lag", "Indexing lag", {"lag": "from commit to write"}, words.seconds, None),
)  # fmt: skip


def over_time(report: Report) -> Section:
    """Return the series of measurements, a chart for each pipeline and family."""
    title = "Recall over time"
    if not report.quality:
        return Section("quality", title, ["Recall was not measured in this period."])
    figures: list[Figure] = []
    pipelines = sorted({found.pipeline for found in report.quality})
    for family in _FAMILIES:
        for pipeline in pipelines[:_MOST_CHARTS]:
            found = [q for q in report.quality if q.pipeline == pipeline and q.kind in family.kinds]
            if found:
                figures.append(_series(report, family, pipeline, found))
    sentences = ["A shade, or a stroke through a single mark, is the interval of 95 %."]
    if len(pipelines) > _MOST_CHARTS:
        sentences.append(f"Charts show the first {_MOST_CHARTS} of {len(pipelines)} pipelines.")
    return Section("quality", title, sentences, figures=figures)


def _series(report: Report, family: _Family, pipeline: str, found: Sequence[Quality]) -> Figure:
    lines = [
        Line(label, [Point(q.measured_at, q.value, q.low, q.high) for q in found if q.kind == kind])
        for kind, label in family.kinds.items()
        if any(q.kind == kind for q in found)
    ]
    last = ", ".join(f"{family.form(line.points[-1].value)} {line.label}" for line in lines)
    caption = Caption(f"{family.name}-{pipeline}", f"{family.title} of {pipeline}", f"The last measurement: {last}.")
    rows = [
        text_cells(
            words.moment(q.measured_at),
            family.kinds[q.kind],
            str(q.version),
            family.form(q.value),
            words.interval((q.low, q.high)),
        )
        for q in found
    ]
    columns = [Column("Measured"), Column("Kind"), Column("Version")]
    table = Table(caption.title, [*columns, Column("Value", True), Column("Interval", True)], rows)
    period = (report.scope.since, report.scope.until)
    legend = [(swatch(number), line.label) for number, line in enumerate(lines)]
    return Figure(caption.title, line_chart(caption, lines, period, family.form, family.most), table, legend)


def evidence(report: Report) -> Section | None:
    """Return the gates of the versions and the swaps.

    None if the role may not read them.
    """
    if report.evaluations is None or report.cutovers is None:
        return None
    title = "Evidence of model upgrades"
    # A version that serves and was measured alone is no upgrade.
    found = sorted(
        (e for e in report.evaluations if e.baseline is not None), key=lambda e: e.evaluated_at, reverse=True
    )
    versions = {(version.pipeline, version.version): version for version in report.versions}
    groups = [_evaluation(e, versions, number) for number, e in enumerate(found[:_MOST_CHARTS])]
    sentences = [] if found else ["No version was measured against another one."]
    if len(found) > _MOST_CHARTS:
        sentences.append(f"The last {_MOST_CHARTS} of {len(found)} measurements.")
    return Section("evidence", title, sentences, [_swaps(report)] if report.cutovers else [], groups=groups)


def _swaps(report: Report) -> Table:
    columns = [Column(name) for name in ("Pipeline", "Swap", "Time", "Gate")]
    rows = [
        (
            *text_cells(
                swap.pipeline,
                f"{swap.kind} from version {swap.from_version} to {swap.to_version}",
                words.moment(swap.performed_at),
            ),
            Cell("overridden", "badge", "warn") if swap.overridden else verdict_cell(swap.verdict),
            Cell(words.seconds(swap.swap_seconds)),
        )
        for swap in (report.cutovers or ())[:50]
    ]
    return Table("Cutovers and rollbacks of the period", [*columns, Column("Took", True)], rows)


def _evaluation(found: Evaluation, versions: dict[tuple[str, int], VersionState], number: int) -> Group:
    old = found.baseline_model or "the version that served"
    if found.kind == "preview":
        title = f"{found.pipeline}: preview of {found.model} beside {old}"
    else:
        title = f"{found.pipeline}: version {found.version} ({found.model}) against version {found.baseline} ({old})"
    if found.kind == "preview":
        sentences = [
            f"{found.verdict.capitalize()}. A preview maps old vectors, so it understates the new model, and opens no"
            " cutover."
        ]
    else:
        sentences = [
            f"{found.verdict.capitalize()}. Index: {found.fidelity_verdict}. Quality: {found.quality_verdict}."
            f" A loss of nDCG up to {found.margin:g} passes.",
            f"{found.query_count:,} {_SOURCES[found.query_source]}, measured {words.moment(found.evaluated_at)}.",
        ]
    names = ("Old", "Interval of old", "New", "Interval of new", "Difference", "Interval of difference")
    columns = [Column("Measure"), *(Column(name, True) for name in names), Column("Verdict")]
    rows = [_measure(measure) for measure in found.measures]
    if found.kind == "gate":
        rows += _sizes(found, versions)
    table = Table(f"Both models of the {found.kind}", columns, rows)
    spans = [span for measure in found.measures for span in _spans(measure)]
    if not spans:
        return Group(title, sentences, [table])
    caption = Caption(
        f"evidence-{number}",
        f"Both models with their intervals of 95 %, pipeline {found.pipeline}",
        "; ".join(f"{span.label} {span.value:.3f}" for span in spans),
    )
    values = [text_cells(s.label, words.ratio(s.value), words.interval((s.low, s.high))) for s in spans]
    columns = [Column("Measure"), Column("Value", True), Column("Interval", True)]
    legend = [(swatch(1), f"old: {old}"), (swatch(0), f"new: {found.model}")]
    figure = Figure(caption.title, span_chart(caption, spans), Table(caption.title, columns, values), legend)
    return Group(title, sentences, [table], [figure])


def _measure(measure: Measure) -> Sequence[Cell]:
    form = _milliseconds if measure.name.endswith(" ms") else words.ratio
    sign = "+" if (measure.difference or 0) > 0 else "−" if (measure.difference or 0) < 0 else ""
    difference = words.ABSENT if measure.difference is None else sign + form(abs(measure.difference))
    return (
        *text_cells(
            measure.name,
            form(measure.old),
            words.interval(measure.old_interval),
            form(measure.new),
            words.interval(measure.new_interval),
            difference,
            words.interval((measure.low, measure.high)),
        ),
        verdict_cell(measure.verdict),
    )


def _milliseconds(value: float | None) -> str:
    return words.ABSENT if value is None else f"{value:.1f}"


def _sizes(found: Evaluation, versions: dict[tuple[str, int], VersionState]) -> list[Sequence[Cell]]:
    """Return the sizes of both versions now; a dropped one has none."""
    old = versions.get((found.pipeline, found.baseline or 0))
    new = versions.get((found.pipeline, found.version))
    if old is not None and found.baseline_model not in (None, old.model):
        # Another version has the number of the dropped one.
        old = None
    pairs = {
        "dimensions": (old and str(old.dimensions), new and str(new.dimensions)),
        "vectors, size": (old and words.size(old.table_bytes), new and words.size(new.table_bytes)),
        "index, size": (old and words.size(old.index_bytes), new and words.size(new.index_bytes)),
    }
    return [
        text_cells(name, before or "dropped", words.ABSENT, after or "dropped", *[words.ABSENT] * 4)
        for name, (before, after) in pairs.items()
    ]


def _spans(measure: Measure) -> list[Span]:
    if measure.old is None or measure.new is None or measure.old_interval is None or measure.new_interval is None:
        return []
    return [
        Span(f"{measure.name}, old", measure.old, *measure.old_interval, colour=1),
        Span(f"{measure.name}, new", measure.new, *measure.new_interval, colour=0),
    ]
