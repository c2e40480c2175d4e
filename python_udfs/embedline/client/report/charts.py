"""Draw charts as SVG.

Each has a title and a description for those who do not see it.
A chart is as wide as a phone in its own units, so that its letters are readable there.
Colours come from the page's style sheet: classes c0 to c3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from markupsafe import Markup

from embedline.client.report import words

_WIDTH, _HEIGHT = 360, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 24
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
# Lines across the plot, about: more would crowd it.
_TICKS = 4
# Steps between ticks that a person reads easily, times a power of ten.
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
# Part of the scale below the largest possible value that is shown at least.
_LEAST_SPAN = 0.02
# Differences below this part of the values are none; ticks are rounded, so a scale must not be smaller.
_LEAST_PART = 1e-6
COLOURS = 4
_ROW_HEIGHT, _LABEL_WIDTH, _VALUE_WIDTH = 22, 112, 50

Format = Callable[[float], str]


@dataclass(frozen=True)
class Caption:
    """The name of a chart in the page, its title, and its content in a sentence."""

    name: str
    title: str
    description: str


@dataclass(frozen=True)
class Point:
    """A point of a line; low and high are its interval, if it has one."""

    at: datetime
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Span:
    """A value with its interval, in a chart of several; `colour` is that of its class."""

    label: str
    value: float
    low: float
    high: float
    colour: int


def bar_chart(caption: Caption, labels: Sequence[str], values: Sequence[float], form: Format = words.compact) -> Markup:
    """Draw a bar for each value above its label; a few labels are shown."""
    ticks = _ticks(0.0, max(values, default=0.0) or 1.0, whole=all(value == int(value) for value in values))
    scale = _Scale(ticks[0], ticks[-1])
    wide = _PLOT_WIDTH / max(len(values), 1)
    parts = [_grid(scale, ticks, form)]
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        if value > 0:
            # A value that is not 0 is never invisible.
            height = max(_TOP + _PLOT_HEIGHT - scale.y(value), 1.0)
            x, y = _LEFT + index * wide + wide * 0.1, _TOP + _PLOT_HEIGHT - height
            parts.append(
                Markup('<rect class="c0" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}: {}</title></rect>')
                .format(x, y, wide * 0.8, height, label, words.compact(value))
            )  # fmt: skip
    places = [_LEFT + wide * (index + 0.5) for index in range(len(labels))]
    parts.append(_labels(labels, places))
    return _svg(caption, _HEIGHT, parts)


def line_chart(
    caption: Caption, lines: Sequence[Line], period: tuple[datetime, datetime], form: Format, most: float | None = None
) -> Markup:
    """Draw lines over a period, with their intervals behind them.

    `most` is the largest possible value, if there is one.
    """
    edges = [edge for line in lines for point in line.points for edge in (point.value, point.low, point.high)]
    known = [edge for edge in edges if edge is not None]
    ticks = _ticks(min(known), max(known), most=most)
    scale, seconds = _Scale(ticks[0], ticks[-1]), (period[1] - period[0]).total_seconds() or 1.0

    def x(at: datetime) -> float:
        return _LEFT + _PLOT_WIDTH * min(max((at - period[0]).total_seconds() / seconds, 0.0), 1.0)

    parts = [_grid(scale, ticks, form)]
    parts += [_band(line.points, number, x, scale) for number, line in enumerate(lines)]
    parts += [_line(line, number, x, scale, form) for number, line in enumerate(lines)]
    middle = period[0] + (period[1] - period[0]) / 2
    shown = (period[0], middle, period[1])
    # Of a short period three labels would be the same day.
    step = timedelta(hours=1) if period[1] - period[0] <= timedelta(days=2) else timedelta(days=1)
    parts.append(_labels([words.step(at, step) for at in shown], [x(at) for at in shown]))
    return _svg(caption, _HEIGHT, parts)


def span_chart(caption: Caption, spans: Sequence[Span]) -> Markup:
    """Draw values between 0 and 1 as dots on their intervals, one below the other."""
    least = math.floor(min(span.low for span in spans) * 10) / 10
    ticks = _ticks(max(least, 0.0), 1.0, most=1.0)
    left, plot = _LABEL_WIDTH, _WIDTH - _LABEL_WIDTH - _VALUE_WIDTH
    bottom = _TOP + _ROW_HEIGHT * len(spans)

    def x(value: float) -> float:
        return left + plot * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [
        Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/><text x="{0:.1f}" y="{3}" {4}>{5}</text>')
        .format(x(tick), _TOP, bottom, bottom + 15, Markup('text-anchor="middle"'), f"{tick:.3g}")
        for tick in ticks
    ]  # fmt: skip
    for row, span in enumerate(spans):
        y = _TOP + _ROW_HEIGHT * (row + 0.5)
        parts.append(
            Markup(
                '<text x="0" y="{y4:.1f}">{label}</text><g class="c{colour}">'
                '<line class="line" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>{mark}</g>'
                '<text x="{edge}" y="{y4:.1f}" text-anchor="end">{value:.3f}</text>'
            ).format(
                y=y, y4=y + 4, label=span.label, colour=span.colour, low=x(span.low), high=x(span.high),
                mark=_mark(span.colour, x(span.value), y), edge=_WIDTH, value=span.value,
            )
        )  # fmt: skip
    return _svg(caption, bottom + _BOTTOM, parts)


def meter(caption: Caption, used: float, reserved: float, limit: float) -> Markup:
    """Draw a share of a limit as a bar: the used part, then the reserved part."""
    whole = max(limit, used + reserved) or 1.0
    width, height = 240.0, 14
    first, second = width * used / whole, width * reserved / whole
    body = Markup(
        '<rect class="track" x="0.5" y="0.5" width="{:.1f}" height="{}"/>'
        '<rect class="{}" x="0" y="0" width="{:.1f}" height="{}"/>'
        '<rect class="c1" x="{:.1f}" y="0" width="{:.1f}" height="{}"/>'
    ).format(width - 1, height - 1, "over" if used >= limit else "c0", first, height, first, second, height)
    return _svg(caption, height, [body], width=int(width), kind="meter")


def swatch(colour: int) -> Markup:
    """Draw the mark and the stroke of a line, for a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 24 12" width="24" height="12" aria-hidden="true"><g class="c{}">'
        '<line class="line" x1="0" x2="24" y1="6" y2="6"/>{}</g></svg>'
    ).format(colour % COLOURS, _mark(colour, 12, 6))


class _Scale:
    """From a value to its height in the plot."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._span = low, high - low

    def y(self, value: float) -> float:
        """Return the place from above, within the plot."""
        share = min(max((value - self._low) / self._span, 0.0), 1.0)
        return _TOP + _PLOT_HEIGHT * (1 - share)


def _ticks(low: float, high: float, *, whole: bool = False, most: float | None = None) -> list[float]:
    """Return evenly spaced round numbers around the values, two at least."""
    if most is not None:
        low, high = min(low, most - _LEAST_SPAN), most
    span = high - low
    if span < _LEAST_PART * max(abs(high), 1.0):
        # Values that differ by a rounding have the scale of their size.
        span = max(abs(high), _LEAST_PART)
    rough = span / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(candidate * power for candidate in _STEPS if candidate * power >= rough * 0.999)
    if whole:
        step = max(math.ceil(step), 1)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    if most is not None:
        # The scale ends at the largest possible value.
        return [value for number in range(first, last + 1) if (value := round(number * step, 10)) <= most + 1e-9]
    return [round(number * step, 10) for number in range(first, last + 1)]


def _grid(scale: _Scale, ticks: Sequence[float], form: Format) -> Markup:
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
            '<text x="{}" y="{text:.1f}" text-anchor="end">{}</text>'
        ).format(_LEFT, _WIDTH - _RIGHT, _LEFT - 6, form(tick), y=scale.y(tick), text=scale.y(tick) + 4)
        for tick in ticks
    )


def _labels(labels: Sequence[str], places: Sequence[float]) -> Markup:
    """Return the first, the middle and the last label below the plot."""
    if not labels:
        return Markup("")
    last = len(labels) - 1
    chosen = {0: "start", last // 2: "middle", last: "end"} if last > 1 else {0: "start", last: "end"}
    return Markup("").join(
        Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
            {"start": _LEFT, "middle": places[index], "end": _WIDTH - _RIGHT}[anchor], _HEIGHT - 6, anchor, labels[index]
        )
        for index, anchor in chosen.items()
    )  # fmt: skip


def _band(points: Iterable[Point], number: int, x: Callable[[datetime], float], scale: _Scale) -> Markup:
    """Return the intervals of a line.

    They are a band behind several points, and a stroke through a single one.
    """
    known = [(x(p.at), scale.y(p.low), scale.y(p.high)) for p in points if p.low is not None and p.high is not None]
    if not known:
        return Markup("")
    if len(known) == 1:
        place, low, high = known[0]
        return Markup('<line class="line c{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
            number % COLOURS, place, place, low, high
        )
    outline = [f"{place:.1f},{low:.1f}" for place, low, _ in known]
    outline += [f"{place:.1f},{high:.1f}" for place, _, high in reversed(known)]
    return Markup('<polygon class="band c{}" points="{}"/>').format(number % COLOURS, " ".join(outline))


def _line(line: Line, number: int, x: Callable[[datetime], float], scale: _Scale, form: Format) -> Markup:
    places = [(x(point.at), scale.y(point.value)) for point in line.points]
    path = " ".join(f"{place:.1f},{height:.1f}" for place, height in places)
    marks = Markup("").join(
        Markup("<g><title>{}, {}: {}</title>{}</g>").format(
            line.label, words.moment(point.at), form(point.value), _mark(number, *place)
        )
        for point, place in zip(line.points, places, strict=True)
    )
    return Markup('<g class="c{}"><polyline class="line" points="{}"/>{}</g>').format(number % COLOURS, path, marks)


def _mark(number: int, x: float, y: float) -> Markup:
    """Return a dot, a square, a triangle or a diamond.

    So lines differ not only by their colours.
    """
    if number % COLOURS == 0:
        return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"/>').format(x, y)
    shapes = {
        1: ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        2: ((0, -4), (3.6, 3), (-3.6, 3)),
        3: ((0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0)),
    }
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[number % COLOURS])
    return Markup('<polygon points="{}"/>').format(corners)


def _svg(caption: Caption, height: int, parts: Iterable[Markup], *, width: int = _WIDTH, kind: str = "chart") -> Markup:
    return Markup(
        '<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        '<title id="{name}-title">{title}</title><desc id="{name}-desc">{description}</desc>{body}</svg>'
    ).format(
        kind=kind, width=width, height=height, name=caption.name, title=caption.title,
        description=caption.description, body=Markup("").join(parts),
    )  # fmt: skip
