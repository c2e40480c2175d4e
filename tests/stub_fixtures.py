"""A provider that can be told to misbehave, and one database for all tests of a module that use it.

For the conftest.py of the folders that use them.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from stub_provider import StubProvider, stub_provider
from working import remove_all

DIMENSIONS = 8


@pytest.fixture(scope="module")
def running_stub() -> Iterator[StubProvider]:
    """One stub for all tests of a module."""
    with stub_provider(DIMENSIONS) as started:
        yield started


@pytest.fixture
def stub(running_stub: StubProvider) -> Iterator[StubProvider]:
    """The stub, behaving well, with nothing counted yet."""
    running_stub.behave(remember=True)
    running_stub.forget()
    yield running_stub
    running_stub.behave()


@pytest.fixture
def stub_database(module_database: psycopg.Connection, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A connection to a database of this module; pipelines and models of the stub are gone after each test."""
    yield module_database
    remove_all(module_database)
