"""The hook around the stages of the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from embedline.postgres.spans import Attributes, record, register, span


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
