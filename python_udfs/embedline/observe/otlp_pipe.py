"""Make OpenTelemetry's spans and metrics of ended spans, and send them.

All of it runs in the exporter's thread.
"""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

import embedline
from embedline.observe import semantic_names as names

if TYPE_CHECKING:
    from embedline.observe.ended_span import Ended

# The span that is the parent of all others of its batch; it is recorded last.
_ROOT = "batch"
# Batches whose spans may still come; a worker has a few in flight.
_OPEN_BATCHES = 256
# Spans of one export.
_EXPORTED = 512


class _Collected(SpanProcessor):
    """Keeps the spans that ended, until they are sent."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        if span.context.trace_flags.sampled:
            self.spans.append(span)


class _Ids(RandomIdGenerator):
    """Gives the next span the ids that its children have named already."""

    def __init__(self) -> None:
        self.next: SpanContext | None = None

    def generate_trace_id(self) -> int:
        return self.next.trace_id if self.next is not None else super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self.next.span_id if self.next is not None else super().generate_span_id()


class _Reader(MetricReader):
    """Sends metrics when it is asked to; has no thread."""

    def __init__(self, exporter: OTLPMetricExporter) -> None:
        super().__init__()
        self._exporter = exporter

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        self._exporter.export(metrics_data, timeout_millis=timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        self._exporter.shutdown(timeout_millis)


class Pipe:
    """The way of one session's spans and metrics to the endpoint."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._batches: OrderedDict[object, SpanContext] = OrderedDict()
        resource = _resource()
        self._collected, self._ids = _Collected(), _Ids()
        # Without the SDK's own atexit functions: PL/Python never ends its interpreter.
        self._tracing = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._tracing.add_span_processor(self._collected)
        self._tracer = self._tracing.get_tracer("embedline", embedline.__version__)
        self._span_exporter = OTLPSpanExporter()
        self._reader = _Reader(OTLPMetricExporter())
        self._metering = MeterProvider(metric_readers=[self._reader], resource=resource, shutdown_on_exit=False)
        meter = self._metering.get_meter("embedline", embedline.__version__)
        self._duration = meter.create_histogram(
            names.DURATION,
            unit="s",
            description="GenAI client embeddings operation duration.",
            explicit_bucket_boundaries_advisory=names.DURATION_BUCKETS,
        )
        self._tokens = meter.create_histogram(
            names.INPUT_TOKENS,
            unit="{token}",
            description="The number of input tokens used per embeddings operation.",
            explicit_bucket_boundaries_advisory=names.TOKEN_BUCKETS,
        )

    def send(self, ended: Sequence[Ended], with_metrics: bool) -> None:
        """Send spans, and all metrics if they are due."""
        for one in ended:
            self._take(one)
        spans, self._collected.spans = self._collected.spans, []
        for first in range(0, len(spans), _EXPORTED):
            self._span_exporter.export(spans[first : first + _EXPORTED])
        if with_metrics:
            self._reader.collect()

    def abort(self) -> None:
        """End an export that waits for its next try; called from another thread."""
        self._span_exporter.shutdown()  # type: ignore[no-untyped-call]

    def shut_down(self) -> None:
        """Close the connections."""
        self._span_exporter.shutdown()  # type: ignore[no-untyped-call]
        self._metering.shutdown()

    def _take(self, ended: Ended) -> None:
        given = dict(ended.attributes)
        if ended.error is not None:
            given["error"], sqlstate = ended.error
            given |= {"sqlstate": sqlstate} if sqlstate else {}
        attributes = names.span_attributes(ended.name, given, self._namespace)
        batch = given.get("batch")
        context = Context()
        if batch is not None and ended.name == _ROOT:
            self._ids.next = self._context_of(batch)
        elif batch is not None:
            context = set_span_in_context(NonRecordingSpan(self._context_of(batch)), context)
        is_request = names.is_request(given)
        span = self._tracer.start_span(
            names.span_name(ended.name, given),
            context,
            SpanKind.CLIENT if is_request else SpanKind.INTERNAL,
            attributes,
            start_time=ended.started_ns,
        )
        self._ids.next = None
        if "error.type" in attributes:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended.finished_ns)
        if is_request:
            measured = names.measured_attributes(attributes)
            self._duration.record((ended.finished_ns - ended.started_ns) / 1e9, measured)
            if ended.error is None and "error.type" not in attributes:
                self._tokens.record(int(attributes.get("gen_ai.usage.input_tokens", 0)), measured)

    def _context_of(self, batch: object) -> SpanContext:
        """Return the ids of a batch's own span, which ends after all others of the batch."""
        found = self._batches.get(batch)
        if found is None:
            trace_id, span_id = random.getrandbits(128) or 1, random.getrandbits(64) or 1
            decision = self._tracing.sampler.should_sample(None, trace_id, f"embedline {_ROOT}").decision
            flags = TraceFlags(TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT)
            found = self._batches[batch] = SpanContext(trace_id, span_id, is_remote=False, trace_flags=flags)
            if len(self._batches) > _OPEN_BATCHES:
                self._batches.popitem(last=False)
        return found


def _resource() -> Resource:
    """Return what the environment says of this service, or else its name."""
    own: dict[str, str | int] = {"service.version": embedline.__version__, "process.pid": os.getpid()}
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return Resource.create({**own, **({} if named else {"service.name": "embedline"})})
