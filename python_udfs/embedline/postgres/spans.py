"""A hook around the stages of the work: read, chunk, embed, write, claim, search.

It does nothing until an exporter registers, so the stages import no exporter and pay 0.2 µs for a span.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

# What is known of a span: names of embedline.observe.semantic_names are made of them, never a key or a text.
Attributes = Mapping[str, object]
_NONE: Attributes = {}
_NO_SPAN = contextlib.nullcontext()


class Exporter(Protocol):
    """Is told of each span. It must neither raise nor wait."""

    def start(self, name: str, attributes: Attributes) -> AbstractContextManager[object]:
        """Begin a span that ends with the returned context manager."""

    def record(self, name: str, seconds: float, attributes: Attributes) -> None:
        """Take a span that has just ended, such as a request that ran in another thread."""


_exporters: list[Exporter] = []


def register(exporter: Exporter) -> Callable[[], None]:
    """Have an exporter told of each span from now on; return what takes it away again."""
    _exporters.append(exporter)
    return lambda: _exporters.remove(exporter)


def span(name: str, attributes: Attributes = _NONE) -> AbstractContextManager[object]:
    """Return a context manager around one stage."""
    if not _exporters:
        return _NO_SPAN
    stack = contextlib.ExitStack()
    for exporter in _exporters:
        stack.enter_context(exporter.start(name, attributes))
    return stack


def record(name: str, seconds: float, attributes: Callable[[], Attributes]) -> None:
    """Tell of a span that has just ended.

    The attributes are made only for an exporter.
    """
    if _exporters:
        made = attributes()
        for exporter in _exporters:
            exporter.record(name, seconds, made)
