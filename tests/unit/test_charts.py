"""Charts stay within their frame and are well formed, whatever they are given."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from embedline.client.report import words
from embedline.client.report.charts import Caption, Line, Point, Span, bar_chart, line_chart, meter, span_chart

_CAPTION = Caption("name", "A <title> & more", "A 'description'")
_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_PERIOD = (_BEGIN, _BEGIN + timedelta(days=30))
_AMOUNTS = st.floats(0, 1e15, allow_nan=False)
_SHARES = st.floats(0, 1)


def _drawn(chart: Markup) -> ElementTree.Element:
    """Return a chart's elements, and check that all lie within its frame."""
    root = ElementTree.fromstring(str(chart))
    assert root.findtext("title") == _CAPTION.title
    assert root.findtext("desc") == _CAPTION.description
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for part in root.iter():
        for name, limit in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height), ("y1", height),
                            ("y2", height), ("cy", height)):  # fmt: skip
            assert 0 <= float(part.get(name, 0)) <= limit, ElementTree.tostring(part)
        if part.tag == "rect":
            assert float(part.get("x", 0)) + float(part.get("width", 0)) <= width + 0.1
            assert float(part.get("y", 0)) + float(part.get("height", 0)) <= height + 0.1
    return root


@given(st.lists(_AMOUNTS, max_size=60))
def test_bars(values: list[float]) -> None:
    labels = [f"<{number}>" for number in range(len(values))]
    root = _drawn(bar_chart(_CAPTION, labels, values))
    bars = [bar for bar in root.iter("rect") if bar.get("class") == "c0"]
    assert len(bars) == sum(value > 0 for value in values)
    if bars:
        # The tallest bar is that of the largest value.
        heights = [float(bar.get("height", 0)) for bar in bars]
        shown = [value for value in values if value > 0]
        assert heights[shown.index(max(shown))] == max(heights)


_POINTS = st.lists(st.tuples(st.floats(0, 30), _SHARES, _SHARES, _SHARES), min_size=1, max_size=40)


@given(st.lists(_POINTS, min_size=1, max_size=5), st.booleans())
def test_lines(series: list[list[tuple[float, float, float, float]]], has_intervals: bool) -> None:
    lines = []
    for number, points in enumerate(series):
        found = [
            Point(_BEGIN + timedelta(days=day), value, min(value, low), max(value, high))
            if has_intervals
            else Point(_BEGIN + timedelta(days=day), value)
            for day, value, low, high in sorted(points)
        ]
        lines.append(Line(f"line {number} <&>", found))
    root = _drawn(line_chart(_CAPTION, lines, _PERIOD, words.ratio, 1.0))
    assert len(list(root.iter("polyline"))) == len(lines)
    _drawn(line_chart(_CAPTION, lines, _PERIOD, words.seconds))


def test_a_recall_that_never_falls_has_a_scale_below_it() -> None:
    line = Line("recall", [Point(_BEGIN, 1.0), Point(_PERIOD[1], 1.0)])
    texts = [text.text for text in _drawn(line_chart(_CAPTION, [line], _PERIOD, words.ratio, 1.0)).iter("text")]
    assert texts[:5] == ["0.980", "0.985", "0.990", "0.995", "1.000"]


@given(st.lists(st.tuples(_SHARES, _SHARES, _SHARES), min_size=1, max_size=8))
def test_spans(found: list[tuple[float, float, float]]) -> None:
    spans = [Span("nDCG@10, new", mid, low, high, 1) for low, mid, high in map(sorted, found)]
    root = _drawn(span_chart(_CAPTION, spans))
    assert len([part for part in root.iter("line") if part.get("class") == "line"]) == len(spans)


@given(_AMOUNTS, _AMOUNTS, _AMOUNTS)
def test_meters(used: float, reserved: float, limit: float) -> None:
    root = _drawn(meter(_CAPTION, used, reserved, limit))
    assert any(part.get("class") == "over" for part in root.iter("rect")) == (used >= limit)


def test_words_of_figures() -> None:
    assert [words.seconds(value) for value in (None, 0.0123, 4.56, 75, 7200, 200000)] == [
        "–", "12 ms", "4.6 s", "1 min 15 s", "2 h 0 min", "2 d 7 h",
    ]  # fmt: skip
    assert [words.size(value) for value in (None, 7, 49152, 1_500_000_000)] == ["–", "7 bytes", "49.2 kB", "1.5 GB"]
    assert [words.amount(value, "money") for value in (0, 0.0042, -1.5, 12345.6)] == [
        "0.00",
        "0.0042",
        "−1.50",
        "12,346",
    ]
    assert [words.compact(value) for value in (0, 950, 12345, 6_808_858)] == ["0", "950", "12.3 k", "6.81 M"]
