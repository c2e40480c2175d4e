"""The hook around the stages of the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from embedline.observe import otlp
from embedline.postgres import spans
from embedline.postgres.session import Session
from embedline.postgres.spans import Attributes, record, register, span, start_exporters


class _Told:
    """An exporter that notes what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextlib.contextmanager
    def start(self, name: str, attributes: Attributes) -> Iterator[None]:
        self.notes.append(f"{name} begins {dict(attributes)}")
        try:
            yield
        finally:
            self.notes.append(f"{name} ends")

    def record(self, name: str, seconds: float, attributes: Attributes) -> None:
        self.notes.append(f"{name} took {seconds} {dict(attributes)}")


def test_exporters_are_told_of_each_span_until_they_are_taken_away() -> None:
    told = _Told()
    with span("read"):
        pass
    remove = register(told)
    with span("embed", {"model": "m"}), span("write"):
        told.notes.append("work")
    remove()
    with span("search"):
        pass
    assert told.notes == ["embed begins {'model': 'm'}", "write begins {}", "work", "write ends", "embed ends"]


def test_a_span_ends_when_its_stage_raises() -> None:
    told = _Told()
    remove = register(told)
    with pytest.raises(ValueError, match="a fault"), span("claim"):
        raise ValueError("a fault")
    remove()
    assert told.notes == ["claim begins {}", "claim ends"]


def test_attributes_of_an_ended_span_are_made_only_for_an_exporter() -> None:
    told = _Told()
    made: list[str] = []

    def attributes() -> Attributes:
        made.append("made")
        return {"model": "m"}

    record("embed", 0.5, attributes)
    assert not made
    remove = register(told)
    record("embed", 0.5, attributes)
    remove()
    assert told.notes == ["embed took 0.5 {'model': 'm'}"]


@pytest.fixture
def told_to_export(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names an endpoint, in a session that has not started exporters."""
    monkeypatch.setattr(spans, "_is_started", False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
    return monkeypatch


def test_a_server_without_the_packages_says_so_once(told_to_export: pytest.MonkeyPatch) -> None:
    told_to_export.setattr(otlp, "_PACKAGES", ("opentelemetry.nothing_of_that_name",))
    # It is not asked for anything.
    session = Session(None, {})  # type: ignore[arg-type]
    assert "pip install 'embedline[otel]'" in (start_exporters(session) or "")
    assert start_exporters(session) is None


def test_opentelemetry_can_be_switched_off(told_to_export: pytest.MonkeyPatch) -> None:
    told_to_export.setenv("OTEL_SDK_DISABLED", "true")
    told_to_export.setattr(otlp, "start", lambda _: pytest.fail("it was started"))
    assert start_exporters(Session(None, {})) is None  # type: ignore[arg-type]
