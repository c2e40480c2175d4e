"""A provider that takes fewer texts in a request than was declared: the size that passes is found once and remembered."""

from __future__ import annotations

import psycopg
import pytest

from embedline.models.health_check import PROBE_TEXT
from stub_provider import StubProvider
from support import queued, scalar, settle
from working import (
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    insert_rows,
    work_until_idle,
)

REQUEST_ITEMS = "SELECT request_items FROM embedline.status WHERE pipeline = 'page'"
LATER = "UPDATE embedline.model SET batch_items_at = batch_items_at - interval '1 day' WHERE name = 'stub'"


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on an empty table, whose provider takes ten texts at a time."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    stub.behave(rules=[{"texts_over": 10, "status": 400}], remember=True)
    return stub_database


def refused(stub: StubProvider) -> int:
    return stub.counts().get("rules", 0)


def test_the_size_that_passed_is_shown_and_kept_for_other_sessions(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    assert scalar(page, REQUEST_ITEMS) == 2048
    insert_rows(page, 1, 100)
    work_until_idle(page)
    assert refused(stub) > 0
    found = scalar(page, REQUEST_ITEMS)
    assert 5 < found <= 10
    insert_rows(page, 101, 400)
    # Others than found it, two at a time, and the other form of a worker.
    work_until_idle(page, count=2)
    assert refused(stub) == 0
    insert_rows(page, 401, 450)
    assert scalar(page, "SELECT embed_pending(1000)") == 50
    assert refused(stub) == 0
    assert assert_all_settled(page, stub.dimensions) == 450
    assert {count for text, count in stub.texts_seen().items() if text != PROBE_TEXT} == {1}


def test_the_size_grows_to_the_limit_with_few_refusals_and_no_further(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    insert_rows(page, 1, 100)
    work_until_idle(page)
    refused(stub)
    for attempt in range(8):
        page.execute(LATER)
        insert_rows(page, 1000 * (attempt + 1), 1000 * (attempt + 1) + 99)
        work_until_idle(page)
        # A larger request that is refused, and at most one of its halves.
        assert refused(stub) <= 2
    assert scalar(page, REQUEST_ITEMS) == 10
    assert assert_all_settled(page, stub.dimensions) == 900
    assert dead_letters(page) == {}


def test_a_limit_that_was_lifted_is_found_out(page: psycopg.Connection, stub: StubProvider) -> None:
    insert_rows(page, 1, 100)
    work_until_idle(page)
    stub.behave(remember=True)
    before = scalar(page, REQUEST_ITEMS)
    for attempt in range(10):
        page.execute(LATER)
        insert_rows(page, 1000 * (attempt + 1), 1000 * (attempt + 1) + 499)
        work_until_idle(page)
    assert scalar(page, REQUEST_ITEMS) > 8 * before


def test_a_limit_that_was_lowered_is_followed(page: psycopg.Connection, stub: StubProvider) -> None:
    insert_rows(page, 1, 100)
    work_until_idle(page)
    stub.behave(rules=[{"texts_over": 3, "status": 413}], remember=True)
    insert_rows(page, 101, 200)
    work_until_idle(page)
    assert scalar(page, REQUEST_ITEMS) in (2, 3)
    assert queued(page) == 0


def test_a_text_that_is_refused_changes_no_size(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"match": "row 33 ", "status": 400}], remember=True)
    insert_rows(page, 1, 100)
    work_until_idle(page)
    assert list(dead_letters(page)) == [33]
    assert scalar(page, REQUEST_ITEMS) == 2048
