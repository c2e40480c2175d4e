"""A pipeline on the stub, and a login that may embed it from outside."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import conninfo

from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from working import create_stub_model, create_stub_pipeline

__all__ = ["running_stub", "stub"]


@pytest.fixture
def login(make_role: Callable[..., str]) -> str:
    """A login that has no right but those of remote workers."""
    return make_role("embedline_remote")


@pytest.fixture
def remote_dsn(database_dsn: str, role_passwords: dict[str, str], login: str) -> str:
    """The connection string of that login."""
    return conninfo.make_conninfo(database_dsn, user=login, password=role_passwords[login])


@pytest.fixture
def page(database: psycopg.Connection, stub: StubProvider, login: str) -> psycopg.Connection:
    """A pipeline "page" on the stub whose texts the login may have; workers in the database leave it alone."""
    stub.behave()
    create_stub_model(database, stub, max_batch_items=10, concurrency=4)
    create_stub_pipeline(database, rows=25)
    database.execute("SELECT embedline.grant_remote('page', %s, true)", (login,))
    return database
