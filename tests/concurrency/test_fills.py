"""Rows that are deleted, changed or born again while a version is filled: the fill brings nothing back and forgets nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pytest

from stub_provider import StubProvider, stub_provider, vector_of
from support import assert_exact, data_count, queued, scalar, settle, wait_until
from upgrading import add_version, cut_over, settle_versions, versions
from working import create_stub_model, create_stub_pipeline, flood, insert_rows, working

ROWS, REQUEST = 40, 10


@pytest.fixture(scope="module")
def slow_running() -> Iterator[StubProvider]:
    """The provider of the version that is filled."""
    with stub_provider(16) as started:
        yield started


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider, slow_running: StubProvider) -> psycopg.Connection:
    """A pipeline that is filled; the model of its next version is slow, so that its rows are long in flight."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=ROWS)
    settle(stub_database)
    slow_running.behave()
    create_stub_model(stub_database, slow_running, "slow", max_batch_items=REQUEST, concurrency=1)
    slow_running.behave(latency=0.5)
    return stub_database


def _vectors(texts: Sequence[str], dimensions: int) -> npt.NDArray[np.float32]:
    return np.stack([vector_of(text, dimensions) for text in texts])


def _assert_exact(connection: psycopg.Connection, rows: int) -> None:
    """Assert that both versions have what the rows ask for and nothing besides, as tables and through the view."""
    for number, dimensions in ((1, 8), (2, 16)):
        embed = functools.partial(_vectors, dimensions=dimensions)
        assert assert_exact(connection, embed=embed, version=number) == rows
    cut_over(connection, 2)
    assert scalar(connection, "SELECT count(*) FROM page_embedding") == rows
    connection.execute("SELECT embedline.rollback('page')")
    assert scalar(connection, "SELECT count(*) FROM page_embedding") == rows


# What an application does while all of it is in flight, and how many rows there are after it.
CHANGES = {
    "deleted": ("DELETE FROM page WHERE id <= 30", ROWS - 30),
    "deleted and born again": (
        "WITH gone AS (DELETE FROM page WHERE id <= 30 RETURNING id) SELECT count(*) FROM gone;"
        " INSERT INTO page SELECT n, 'born again ' || n FROM generate_series(1, 30) AS n",
        ROWS,
    ),
    "deleted and born again as it was": (
        "CREATE TEMP TABLE kept AS SELECT * FROM page; DELETE FROM page; INSERT INTO page TABLE kept; DROP TABLE kept",
        ROWS,
    ),
    "changed and back": (
        "UPDATE page SET body = body || '!'; UPDATE page SET body = rtrim(body, '!')",
        ROWS,
    ),
    "of another key": ("UPDATE page SET id = id + 1000 WHERE id <= 30", ROWS),
    "truncated": ("TRUNCATE page", 0),
    "truncated and born again": (
        "TRUNCATE page; INSERT INTO page SELECT n, 'again ' || n FROM generate_series(1, 5) AS n",
        5,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("chunking", [None, "sentences"])
def test_a_change_of_rows_in_flight_to_a_version_is_not_undone_by_its_fill(
    page: psycopg.Connection, slow_running: StubProvider, change: str, chunking: str | None
) -> None:
    add_version(page, "slow", **({"chunking": chunking} if chunking else {}))
    statements, rows = CHANGES[change]
    with working(page, 2):
        wait_until(lambda: slow_running.in_flight() > 0 and data_count(page, "v2") == 0, 20, "rows are in flight")
        with page.transaction():
            for statement in statements.split(";"):
                page.execute(statement.encode())
        slow_running.behave()
        wait_until(lambda: queued(page) == 0 and versions(page, "missing") == {1: 0, 2: 0}, 20, "both have all")
    settle_versions(page)
    if rows:
        _assert_exact(page, rows)
    else:
        assert versions(page, "chunks") == versions(page, "vectors") == {1: 0, 2: 0}


@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
def test_rows_written_behind_and_ahead_of_a_throttled_fill_are_in_it_once(
    page: psycopg.Connection, slow_running: StubProvider, order: str
) -> None:
    slow_running.behave(remember=True)
    slow_running.forget()
    add_version(page, "slow", backfill_order=order, backfill_rate=REQUEST)
    with working(page, 1):
        wait_until(lambda: data_count(page, "v2") >= REQUEST, 20, "a part is filled")
        page.execute("DELETE FROM page WHERE id IN (1, 20, %s)", (ROWS,))
        page.execute("UPDATE page SET body = 'changed meanwhile ' || id WHERE id IN (2, 21, %s)", (ROWS - 1,))
        insert_rows(page, ROWS + 1, ROWS + 10)
        wait_until(lambda: queued(page) == 0 and versions(page, "missing") == {1: 0, 2: 0}, 20, "both have all")
    settle_versions(page)
    _assert_exact(page, ROWS + 7)
    assert set(slow_running.texts_seen().values()) == {1}


@pytest.mark.parametrize("form", ["run_worker", "embed_pending"])
def test_backfills_end_beside_a_pipeline_that_always_has_work(page: psycopg.Connection, form: str) -> None:
    add_version(page, "stub", column_type="halfvec")
    create_stub_pipeline(page, "other", rows=ROWS)

    def open_backfills() -> set[Any]:
        return set(page.execute("SELECT pipeline, version FROM embedline.versions WHERE state = 'backfilling'"))

    with flood(page), contextlib.ExitStack() as stack:
        if form == "run_worker":
            stack.enter_context(working(page, seconds=120))

        def is_through() -> bool:
            if form == "embed_pending":
                page.execute("SELECT embed_pending(300)")
            return open_backfills() <= {("flood", 1)}

        wait_until(is_through, 40, "the others are complete")
        assert scalar(page, "SELECT pending > 0 FROM embedline.status WHERE pipeline = 'flood'")
