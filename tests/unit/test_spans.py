"""The hook around the stages of the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from embedline.postgres.spans import register, span


def test_exporters_are_told_of_each_span_until_they_are_taken_away() -> None:
    told: list[str] = []

    @contextlib.contextmanager
    def exporter(name: str) -> Iterator[None]:
        told.append(f"{name} begins")
        try:
            yield
        finally:
            told.append(f"{name} ends")

    with span("read"):
        pass
    remove = register(exporter)
    with span("embed"), span("write"):
        told.append("work")
    remove()
    with span("search"):
        pass
    assert told == ["embed begins", "write begins", "work", "write ends", "embed ends"]


def test_a_span_ends_when_its_stage_raises() -> None:
    ended: list[str] = []

    @contextlib.contextmanager
    def exporter(name: str) -> Iterator[None]:
        try:
            yield
        finally:
            ended.append(name)

    remove = register(exporter)
    with pytest.raises(ValueError, match="a fault"), span("claim"):
        raise ValueError("a fault")
    remove()
    assert ended == ["claim"]
