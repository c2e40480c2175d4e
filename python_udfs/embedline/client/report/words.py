"""Write figures as a person reads them."""

from __future__ import annotations

from datetime import datetime, timedelta

_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
_BYTES = ("bytes", "kB", "MB", "GB", "TB", "PB")
_COMPACT = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Cents are of interest only in small sums.
_LARGE_SUM = 1000.0
ABSENT = "–"


def signed(text: str) -> str:
    """Return numbers with the sign of mathematics, which is as wide as a digit."""
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """Return a whole number with separators, such as 12,345."""
    return ABSENT if value is None else signed(f"{value:,.0f}")


def compact(value: float) -> str:
    """Return a number for an axis, such as 1.2 M."""
    for size, unit in _COMPACT:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def ratio(value: float | None) -> str:
    """Return a measure between 0 and 1, such as a recall."""
    return ABSENT if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Return a share that is given in percent."""
    return ABSENT if value is None else f"{value:.4g} %"


def interval(edges: tuple[float | None, float | None] | None) -> str:
    """Return an interval, such as 0.81 to 0.86."""
    if edges is None or edges[0] is None or edges[1] is None:
        return ABSENT
    return signed(f"{edges[0]:.3f} to {edges[1]:.3f}")


def seconds(value: float | None) -> str:
    """Return a length of time in two units at most."""
    if value is None:
        return ABSENT
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    for index, (size, unit) in enumerate(_UNITS):
        if value >= size:
            whole, rest = divmod(value, size)
            smaller = _UNITS[index + 1] if index + 1 < len(_UNITS) else (1.0, "s")
            return f"{whole:.0f} {unit} {rest // smaller[0]:.0f} {smaller[1]}"
    raise AssertionError(value)


def size(value: int | None) -> str:
    """Return bytes in a unit of 1,000s."""
    if value is None:
        return ABSENT
    shown, unit = float(value), 0
    while shown >= 1000 and unit < len(_BYTES) - 1:
        shown, unit = shown / 1000, unit + 1
    return f"{shown:.0f} {_BYTES[unit]}" if not unit else f"{shown:.3g} {_BYTES[unit]}"


def amount(value: float, unit: str) -> str:
    """Return tokens as a count, and money with cents if the sum is small."""
    if unit == "tokens" or abs(value) >= _LARGE_SUM:
        return count(value)
    return signed(f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.4f}")


def moment(value: datetime | None) -> str:
    """Return a time (UTC) to the minute."""
    return ABSENT if value is None else f"{value:%Y-%m-%d %H:%M}"


def step(value: datetime, length: timedelta) -> str:
    """Return the name of a step of the period: its day, or its hour."""
    return f"{value:%d %b %H:%M}" if length < timedelta(days=1) else f"{value:%d %b %Y}"


def plural(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
