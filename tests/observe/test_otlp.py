"""Spans and metrics over OTLP, as a receiver gets them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from embedline.dev.cluster.server import Cluster
from embedline.observe import otlp, semantic_names
from monitors import receiver
from stub_provider import StubProvider
from support import scalar, wait_until
from working import create_stub_model, create_stub_pipeline, insert_rows, work_until_idle

StartCluster = Callable[..., Cluster]
Received = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def received() -> Iterator[tuple[str, Received]]:
    """A receiver of OTLP/HTTP: its address, and the paths and bodies that came."""
    with receiver() as found:
        yield found


@pytest.fixture(scope="module")
def traced(start_cluster: StartCluster, received: tuple[str, Received]) -> Cluster:
    """A server that is told to export."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": received[0],
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    }
    return start_cluster(environment=environment)


def _attributes(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


def _spans(received: Received) -> list[Any]:
    bodies = [body for path, body in list(received) if path == "/v1/traces"]
    resources = [r for body in bodies for r in ExportTraceServiceRequest.FromString(body).resource_spans]
    for resource in resources:
        found = _attributes(resource.resource.attributes)
        assert found["service.name"] == "embedline"
        assert found["deployment.environment.name"] == "test"
    return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


def _metrics(received: Received) -> dict[str, list[tuple[dict[str, Any], int, float]]]:
    """Return attributes, count and sum of each point, by the metric's name."""
    found: dict[str, list[tuple[dict[str, Any], int, float]]] = {}
    for path, body in list(received):
        if path != "/v1/metrics":
            continue
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                points = metric.histogram.data_points
                found.setdefault(metric.name, []).extend((_attributes(p.attributes), p.count, p.sum) for p in points)
    return found


@pytest.mark.faults
def test_a_batch_is_one_trace_and_its_requests_follow_the_conventions(
    traced: Cluster, received: tuple[str, Received], stub: StubProvider
) -> None:
    arrived = received[1]
    with psycopg.connect(traced.dsn(), autocommit=True) as connection:
        create_stub_model(connection, stub)
        create_stub_pipeline(connection, rows=30)
        work_until_idle(connection)
        tokens = scalar(connection, "SELECT sum(tokens) FROM embedline.batch")
        with psycopg.connect(traced.dsn(), autocommit=True) as session:
            assert session.execute("SELECT count(*) FROM embedline.search('page', 'page row 7', 3)").fetchone() == (3,)
        # The sessions have ended, so all has been sent.
        wait_until(lambda: _named(arrived, "embedline search"), 30, "the spans of the search arrive")
        wait_until(lambda: semantic_names.INPUT_TOKENS in _metrics(arrived), 30, "the metrics arrive")
        _assert_batch(arrived, stub, scalar(connection, "SELECT current_database()"))
        counts = [point for point in _metrics(arrived)[semantic_names.INPUT_TOKENS] if point[2] == tokens]
        assert counts, _metrics(arrived)
        assert counts[0][0]["gen_ai.request.model"] == "stub"
    everything = b"".join(body for _, body in arrived)
    assert b"page row" not in everything
    assert b"SELECT" not in everything


def _named(received: Received, name: str) -> list[Any]:
    return [span for span in _spans(received) if span.name == name]


def _assert_batch(arrived: Received, stub: StubProvider, database: str) -> None:
    (root,) = _named(arrived, "embedline batch")
    assert root.parent_span_id == b""
    children = [span for span in _spans(arrived) if span.parent_span_id == root.span_id]
    assert {span.trace_id for span in children} == {root.trace_id}
    assert {span.name for span in children} >= {
        "embeddings stub",
        "embedline claim",
        "embedline read",
        "embedline write",
    }
    request = next(span for span in children if span.name == "embeddings stub")
    found = _attributes(request.attributes)
    assert request.kind == request.SPAN_KIND_CLIENT
    assert found.pop("gen_ai.usage.input_tokens") > 0
    port = int(stub.url.split(":")[2].split("/")[0])
    assert found == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "stub",
        "gen_ai.embeddings.dimension.count": 8,
        "server.address": "127.0.0.1",
        "server.port": port,
        "embedline.pipeline": "page",
        "embedline.version": 1,
        "embedline.request.texts": 30,
    }
    assert root.start_time_unix_nano <= request.start_time_unix_nano < request.end_time_unix_nano
    write = _attributes(next(span for span in children if span.name == "embedline write").attributes)
    assert (write["db.system.name"], write["db.namespace"], write["db.operation.batch.size"]) == (
        "postgresql",
        database,
        30,
    )


@pytest.mark.faults
def test_a_failed_request_is_an_error_of_its_class(
    traced: Cluster, received: tuple[str, Received], stub: StubProvider
) -> None:
    with psycopg.connect(traced.dsn(), autocommit=True) as connection:
        create_stub_model(connection, stub, "failing")
        create_stub_pipeline(connection, "other", "failing", rows=3)
        stub.behave(rules=[{"match": "", "status": 429, "times": 1}])
        work_until_idle(connection)

    def failed() -> list[Any]:
        return [s for s in _spans(received[1]) if _attributes(s.attributes).get("error.type") == "rate_limited"]

    wait_until(failed, 30, "the span of the failed request arrives")
    assert failed()[0].status.code == failed()[0].status.STATUS_CODE_ERROR


@pytest.mark.faults
def test_an_endpoint_that_hangs_or_is_away_stops_no_work(start_cluster: StartCluster, stub: StubProvider) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        cluster = start_cluster(environment=environment)
        with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
            create_stub_model(connection, stub)
            create_stub_pipeline(connection, rows=300)
            for round_ in range(2):
                work_until_idle(connection)
                assert scalar(connection, "SELECT count(*) FROM page_embedding") == 300 + round_ * 100
                insert_rows(connection, 301, 400) if not round_ else None
                # Then nothing listens any more.
                silent.close()
            backends = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            wait_until(lambda: scalar(connection, backends) == 1, 30, "the workers' sessions have ended")
            # No crash has restarted the server: this session lives.
            assert scalar(connection, "SELECT count(*) FROM embedline.search('page', 'page row 7', 3)") == 3


def test_without_an_endpoint_nothing_of_it_is_loaded(stub_database: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=3)
    with psycopg.connect(stub_database.info.dsn, password=stub_database.info.password, autocommit=True) as session:
        session.execute("CALL embedline.run_worker(until_idle => true)")
        assert scalar(session, "SELECT count(*) FROM embedline.search('page', 'x', 3)") == 3
        session.execute(
            """
            DO LANGUAGE plpython3u $$
                import sys
                loaded = [name for name in sys.modules if name.startswith(("opentelemetry", "embedline.observe.otlp"))]
                if loaded:
                    plpy.error(str(loaded))
            $$
            """
        )


@pytest.mark.parametrize("headers", ["authorization=Bearer%20{}", "api-key={}", "x=y,{}", "authorization:{}"])
def test_a_complaint_does_not_repeat_a_header(
    headers: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "c0llect0r-0123456789abcdef"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", headers.format(key))
    for words in ("Failed to export spans batch code: 401, reason: Bad Bearer {}", "Header format invalid: {}", "{}"):
        for form in (key, key.upper(), headers.format(key), f"{key}\nX"):
            otlp._say(words.format(form))
            told = capsys.readouterr().err
            assert "[redacted]" in told
            assert "0123456789" not in told
    otlp._say("Failed to export spans batch code: 401, reason: Unauthorized")
    assert "401, reason: Unauthorized" in capsys.readouterr().err


def test_only_attributes_of_the_table_are_exported() -> None:
    given = {"model": "m", "rows": 3, "text": "a secret", "key": "7", "sqlstate": "57014"}
    found = semantic_names.span_attributes("write", given, "shop")
    assert found == {
        "db.system.name": "postgresql",
        "db.namespace": "shop",
        "db.operation.batch.size": 3,
        "db.response.status_code": "57014",
    }


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("https://user:word@api.example.com/v1", {"server.address": "api.example.com", "server.port": 443}),
        ("http://[::1]:8080/v1", {"server.address": "::1", "server.port": 8080}),
        (None, {}),
        ("nothing", {}),
    ],
)
def test_the_address_has_neither_path_nor_password(address: str | None, server: dict[str, object]) -> None:
    given = {"model": "m", "provider": "openai", "address": address}
    found = semantic_names.span_attributes("embed", given, "shop")
    assert {name: value for name, value in found.items() if name.startswith("server.")} == server
    assert semantic_names.span_name("embed", given) == "embeddings m"
