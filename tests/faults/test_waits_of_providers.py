"""A provider that asks to be left alone for long: it is asked again after a while, and at once if an administrator says so."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate

import psycopg
import pytest
from psycopg import errors

from generated_names import PAGE
from stub_provider import StubProvider
from support import queued, scalar, settle, wait_until
from working import assert_all_settled, create_stub_model, create_stub_pipeline, dead_letters, insert_rows, working


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A pipeline on an empty table."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    yield stub_database
    stub_database.execute("SELECT embedline.configure('max_provider_wait_seconds', NULL)")


# The model rests; it rests beyond the default of the setting; a row waits longer than any backoff of its own.
OPEN = "SELECT count(*) FROM embedline.circuit WHERE open_until > now() + interval '10 s'"
BEYOND_CAP = "SELECT count(*) FROM embedline.circuit WHERE open_until > now() + interval '300 s'"
STAMPED = f"SELECT count(*) FROM {PAGE('outbox')} WHERE not_before > now() + interval '17 s'"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("wait", ["86400", "1e9", "date"])
def test_a_provider_that_asks_for_a_day_is_asked_again_at_once_if_an_administrator_says_so(
    page: psycopg.Connection, stub: StubProvider, status: int, wait: str
) -> None:
    header = formatdate(time.time() + 86_400, usegmt=True) if wait == "date" else wait
    stub.behave(rules=[{"status": status, "headers": {"Retry-After": header}, "times": 2}], remember=True)
    insert_rows(page, 1, 50)
    with working(page):
        wait_until(lambda: scalar(page, OPEN) == 1, 20, "the circuit is open")
        assert scalar(page, BEYOND_CAP) == 0
        wait_until(lambda: queued(page) == 50, 20, "the rows are back in the queue")
        assert scalar(page, STAMPED) == 0
        stub.behave(remember=True)
        page.execute("SELECT embedline.resume_model('stub')")
        wait_until(lambda: queued(page) == 0, 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 50
    assert dead_letters(page) == {}


def test_the_longest_wait_is_a_setting_after_which_the_work_goes_on_by_itself(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    page.execute("SELECT embedline.configure('max_provider_wait_seconds', 0.5)")
    stub.behave(rules=[{"status": 429, "headers": {"Retry-After": "86400"}, "times": 2}], remember=True)
    insert_rows(page, 1, 50)
    with working(page):
        wait_until(lambda: queued(page) == 0, 20, "nothing waits")
    assert stub.counts()["rules"] == 2
    assert assert_all_settled(page, stub.dimensions) == 50


@pytest.mark.parametrize("header", ["soon", "-5", "0", "", "Thu, 99 Foo 2026", "nan", "0.001"])
def test_a_wait_that_makes_no_sense_is_no_loop(page: psycopg.Connection, stub: StubProvider, header: str) -> None:
    stub.behave(rules=[{"status": 429, "headers": {"Retry-After": header, "x-ratelimit-reset-requests": "86400s"}}])
    insert_rows(page, 1, 20)
    with working(page):
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.circuit") == 1, 20, "it was asked")
        started = time.monotonic()
        wait_until(lambda: time.monotonic() - started > 3, what="some time is over")
        stub.behave(remember=True)
        page.execute("SELECT embedline.resume_model('stub')")
        wait_until(lambda: queued(page) == 0, 20, "nothing waits")
    # At 0.05, 0.1, 0.2 … s at the worst.
    assert 2 <= stub.counts()["rules"] <= 8


def test_resume_model_frees_rows_that_wait_for_their_next_try(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"status": 500, "match": "page row"}])
    insert_rows(page, 1, 20)
    page.execute("SELECT embed_pending(1000)")
    page.execute(f"UPDATE {PAGE('outbox')} SET not_before = now() + interval '1 day'")
    stub.behave()
    assert scalar(page, "SELECT embed_pending(1000)") == 0
    assert scalar(page, "SELECT embedline.resume_model('stub')") == 20
    assert scalar(page, "SELECT embed_pending(1000)") == 20
    assert scalar(page, "SELECT embedline.resume_model('stub')") == 0


def test_resume_model_ends_the_wait_of_its_own_session_too(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"match": "", "status": 429, "headers": {"Retry-After": "60"}, "times": 1}])
    insert_rows(page, 1, 20)
    assert scalar(page, "SELECT embedline.embed_pending(100)") == 0
    page.execute("SELECT embedline.resume_model('stub')")
    assert scalar(page, "SELECT embedline.embed_pending(100)") == 20


def test_resume_model_is_for_administrators_and_names_an_unknown_model(page: psycopg.Connection) -> None:
    with pytest.raises(errors.UndefinedObject, match='there is no model "nothing"'):
        page.execute("SELECT embedline.resume_model('nothing')")
    for role, may in (("embedline_admin", True), ("embedline_worker", False), ("embedline_reader", False)):
        query = "SELECT has_function_privilege(%s, 'embedline.resume_model(text)', 'EXECUTE')"
        assert scalar(page, query, (role,)) is may
