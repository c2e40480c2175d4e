"""Send spans and metrics of a worker or a search over OTLP/HTTP.

The server's environment names the endpoint; without one this module is not imported.
The session appends ended spans to a bounded queue. One thread makes OpenTelemetry's spans of them and sends them. So neither
the import of the SDK nor an endpoint that is away holds the session back. The SDK's own processors start threads that would
take PostgreSQL's signals; this one has them blocked and ends before exit().
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import unquote

from embedline.core.processes import start_thread
from embedline.core.redaction import redact
from embedline.observe.ended_span import Ended
from embedline.postgres.session import Session
from embedline.postgres.spans import Attributes, register

if TYPE_CHECKING:
    from embedline.observe.otlp_pipe import Pipe

# Spans that wait at most; older ones are dropped for newer ones. As many as the SDK's own processor keeps.
_QUEUE = 2048
# The thread is woken when so many wait.
_BATCH = 512
# Seconds between two exports of spans and of metrics, unless the environment sets others.
_SPAN_SECONDS, _METRIC_SECONDS = 5.0, 60.0
# Seconds that the end of a session waits for the last export, and for an export to be given up.
_LAST_SECONDS, _ABORT_SECONDS = 1.0, 0.5
# Seconds between two messages about an endpoint that is away.
_COMPLAINT_SECONDS = 300.0
_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class _Open:
    """A span that is open."""

    def __init__(self, exporter: OtlpExporter, name: str, attributes: Attributes) -> None:
        self._exporter = exporter
        self._name = name
        self._attributes = attributes
        self._started_ns = 0

    def __enter__(self) -> None:
        self._started_ns = time.time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exporter.append(Ended(self._name, self._started_ns, time.time_ns(), self._attributes, error))


class OtlpExporter:
    """Queues spans of this session, and sends them in a thread."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._queue: deque[Ended] = deque(maxlen=_QUEUE)
        self._wake = threading.Event()
        self._closing = False
        self._pipe: Pipe | None = None
        self._span_seconds = _seconds("OTEL_BSP_SCHEDULE_DELAY", _SPAN_SECONDS)
        self._metric_seconds = _seconds("OTEL_METRIC_EXPORT_INTERVAL", _METRIC_SECONDS)
        self._thread = threading.Thread(target=self._run, name="embedline-otlp", daemon=True)
        start_thread(self._thread, self)

    def start(self, name: str, attributes: Attributes) -> _Open:
        """Begin a span that ends with the returned context manager."""
        return _Open(self, name, attributes)

    def record(self, name: str, seconds: float, attributes: Attributes) -> None:
        """Take a span that has just ended."""
        finished = time.time_ns()
        self.append(Ended(name, finished - int(seconds * 1e9), finished, attributes, None))

    def append(self, ended: Ended) -> None:
        """Queue a span; never waits."""
        self._queue.append(ended)
        if len(self._queue) == _BATCH:
            self._wake.set()

    def close(self) -> None:
        """Send what waits and end the thread, within a second and a half."""
        self._closing = True
        self._wake.set()
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive() and self._pipe is not None:
            self._pipe.abort()
            self._thread.join(_ABORT_SECONDS)

    def _run(self) -> None:
        try:
            from embedline.observe.otlp_pipe import Pipe

            _complain_seldom()
            pipe = self._pipe = Pipe(self._namespace)
        except Exception as error:
            # Such as a wrong setting in the environment. The session works on without an exporter.
            _say(f"nothing is exported: {error}")
            return
        metrics_at = time.monotonic() + self._metric_seconds
        while not self._closing:
            self._wake.wait(self._span_seconds)
            self._wake.clear()
            is_due = time.monotonic() >= metrics_at
            if is_due:
                metrics_at = time.monotonic() + self._metric_seconds
            self._send(pipe, with_metrics=is_due)
        self._send(pipe, with_metrics=True)
        pipe.shut_down()

    def _send(self, pipe: Pipe, with_metrics: bool) -> None:
        ended = []
        while self._queue:
            ended.append(self._queue.popleft())
        try:
            pipe.send(ended, with_metrics)
        except Exception as error:
            # No fault of an exporter may end the thread: the next spans may do.
            logging.getLogger("opentelemetry.embedline").warning("spans were lost: %s", error)


def start(session: Session) -> str | None:
    """Have this session's spans exported; return what is missing for that."""
    for package in _PACKAGES:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return (
                "OTEL_EXPORTER_OTLP_ENDPOINT is set, but the server has no opentelemetry: pip install 'embedline[otel]'"
            )
    register(OtlpExporter(str(session.scalar("SELECT current_database()"))))
    return None


def _seconds(variable: str, default: float) -> float:
    """Return a time of the environment, which gives milliseconds, in seconds."""
    try:
        return max(float(os.environ[variable]) / 1000, 0.05)
    except (KeyError, ValueError):
        return default


class _Seldom(logging.Handler):
    """Writes a message to the server's log, unless it wrote one not long ago."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._next_at = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _COMPLAINT_SECONDS
            _say(record.getMessage())


def _complain_seldom() -> None:
    logger = logging.getLogger("opentelemetry")
    if not any(isinstance(handler, _Seldom) for handler in logger.handlers):
        logger.addHandler(_Seldom())
        logger.propagate = False


def _say(message: str) -> None:
    # The SDK repeats a header that it cannot read, and a collector may repeat the ones that it was sent.
    for secret in sorted(_header_values(os.environ), key=len, reverse=True):
        message = redact(message, secret)
    # A backend's stderr is the server's log. Only the main thread may call plpy.
    print(f"embedline OTLP: {message}", file=sys.stderr, flush=True)


def _header_values(environment: Mapping[str, str]) -> set[str]:
    """Return the values of the environment's headers, with and without a scheme."""
    found = set()
    for signal in ("", "TRACES_", "METRICS_"):
        for header in environment.get(f"OTEL_EXPORTER_OTLP_{signal}HEADERS", "").split(","):
            # Without "=" it is no header, and the SDK says so.
            value = (header.partition("=")[2] or header).strip()
            found |= {value, unquote(value).strip(), *unquote(value).split()[-1:]}
    return found - {""}
