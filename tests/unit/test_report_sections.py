"""A report of very many pipelines stays one that a person reads."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from embedline.client.report import page, sections
from embedline.client.report.figures import PipelineState, Report, Scope, Work

_UNTIL = datetime(2026, 3, 31, 12, tzinfo=UTC)
_SINCE = datetime(2026, 3, 2, tzinfo=UTC)


def _report(count: int) -> Report:
    names = [f"pipeline_{number:04}" for number in range(count)]
    return Report(
        scope=Scope("shop", "reader", "17.2", "0.1.0", 30, _SINCE, _UNTIL, timedelta(days=1)),
        alerts=(),
        pipelines=tuple(
            PipelineState(name, name, "small", "active", number, None, 100.0, 0, "valid", None, 0, None, None)
            for number, name in enumerate(names)
        ),
        work=tuple(Work(name, _SINCE, 1, 1, 0, 0, number, 1, 0.0, 0.0) for number, name in enumerate(names)),
        quality=(),
        evaluations=None,
        cutovers=None,
        usage=(),
        budgets=(),
        dead_letters=None,
        versions=(),
        unreadable=("evidence of model upgrades", "reasons of dead letters"),
    )


def test_long_tables_are_cut_and_only_the_busiest_have_charts() -> None:
    report = _report(1000)
    freshness = sections.freshness(report).tables[0]
    # Those that wait longest come first.
    assert [row[0].text for row in freshness.rows[:2]] == ["pipeline_0999", "pipeline_0998"]
    assert (len(freshness.rows), freshness.left_out) == (sections.MOST_ROWS, 1000 - sections.MOST_ROWS)
    throughput = sections.throughput(report)
    assert [figure.title for figure in throughput.figures][:1] == ["Chunks of pipeline_0999"]
    assert len(throughput.figures) == sections.MOST_CHARTS
    assert f"Charts show the first {sections.MOST_CHARTS} of 1000 pipelines." in throughput.sentences
    text = page.render(report)
    assert "950 more are left out" in text
    assert "may not read the evidence of model upgrades and the reasons of dead letters" in text
    assert len(text) < 150_000
