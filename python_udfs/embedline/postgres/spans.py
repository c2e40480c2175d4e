"""A hook around the stages of the work: read, chunk, embed, write, claim, search.

It does nothing until an exporter registers, so the stages import no exporter and pay 0.2 µs for a span.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from embedline.postgres.session import Session

# What is known of a span: names of embedline.observe.semantic_names are made of them, never a key or a text.
Attributes = Mapping[str, object]
_NONE: Attributes = {}
_NO_SPAN = contextlib.nullcontext()
# The server's environment names an endpoint of OTLP with one of these. No setting of SQL does: who may set one could have
# the server send to any address.
_ENDPOINTS = tuple(f"OTEL_EXPORTER_OTLP_{part}ENDPOINT" for part in ("", "TRACES_", "METRICS_"))
# Loaded by its name, because stages import no exporter.
_OTLP = "embedline.observe.otlp"


class Exporter(Protocol):
    """Is told of each span. It must neither raise nor wait."""

    def start(self, name: str, attributes: Attributes) -> AbstractContextManager[object]:
        """Begin a span that ends with the returned context manager."""

    def record(self, name: str, seconds: float, attributes: Attributes) -> None:
        """Take a span that has just ended, such as a request that ran in another thread."""


_exporters: list[Exporter] = []
_is_started = False


def register(exporter: Exporter) -> Callable[[], None]:
    """Have an exporter told of each span from now on; return what takes it away again."""
    _exporters.append(exporter)
    return lambda: _exporters.remove(exporter)


def start_exporters(session: Session) -> str | None:
    """Load the exporters that the server's environment asks for, once in each session.

    Returns what is missing for that, if anything is.
    """
    global _is_started
    if _is_started:
        return None
    _is_started = True
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, _ENDPOINTS)):
        return None
    trouble: str | None = importlib.import_module(_OTLP).start(session)
    return trouble


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
