"""Budgets and rate limits with workers and a provider over HTTP: what is sent, what is counted, and how work goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from conftest import Connect
from generated_names import PAGE
from stub_provider import StubProvider, stub_provider
from support import create_pages, create_pipeline, data_count, queued, scalar, settle, wait_until

_PAGES = 200
_EMBEDDED = f"SELECT count(*) FROM {PAGE('document')} WHERE state = 'embedded'"


@pytest.fixture
def provider() -> Iterator[StubProvider]:
    """A provider of 8 dimensions that answers at once."""
    with stub_provider(8) as provider:
        yield provider


@pytest.fixture
def pages(database: psycopg.Connection, provider: StubProvider) -> psycopg.Connection:
    """Pipeline page over 200 rows with model far, in requests of at most ten texts; nothing is embedded yet."""
    database.execute(
        "SELECT embedline.create_model('far', 'openai', 'stub', base_url => %s, max_batch_items => 10,"
        " price_per_million_tokens => 1000)",
        (provider.url,),
    )
    create_pages(database, _PAGES)
    create_pipeline(database, model="far")
    provider.counts()
    return database


def _work(connection: psycopg.Connection, seconds: float) -> None:
    connection.execute(f"CALL embedline.run_worker(max_seconds => {seconds})".encode())


def _work_until(connection: psycopg.Connection, is_done: Callable[[], bool]) -> None:
    """Work until it is done, and a second more, in which nothing is to happen."""
    wait_until(lambda: is_done() or _work(connection, 1), 30, "the work is done")
    _work(connection, 1)


def _budget(connection: psycopg.Connection) -> dict[str, Any]:
    cursor = connection.execute("SELECT * FROM embedline.budget")
    row = cursor.fetchone()
    assert row is not None
    assert cursor.description is not None
    return dict(zip((column.name for column in cursor.description), row, strict=True))


def _embedded(connection: psycopg.Connection) -> int:
    return int(scalar(connection, _EMBEDDED))


def test_what_the_provider_counted_is_what_the_ledger_says(
    pages: psycopg.Connection, connect: Connect, provider: StubProvider
) -> None:
    connect().execute("CALL embedline.run_worker(until_idle => true)")
    sent = provider.counts()
    used = pages.execute("SELECT requests, tokens, reserved_tokens FROM embedline.usage").fetchone()
    assert used == (sent["requests"], sent["tokens"], 0)
    assert scalar(pages, "SELECT money * 1000 FROM embedline.usage") == sent["tokens"]


@pytest.mark.parametrize("scope", ["pipeline => 'page'", "model => 'far'"])
@pytest.mark.parametrize("amount", ["tokens => 600", "money => 0.6"])
def test_the_worker_stops_at_the_cap_and_goes_on_when_told(
    pages: psycopg.Connection, connect: Connect, provider: StubProvider, scope: str, amount: str
) -> None:
    pages.execute(f"SELECT embedline.set_budget('day', {scope}, {amount})".encode())
    _work_until(connect(), lambda: _budget(pages)["state"] == "exhausted")
    sent = provider.counts()
    # Never above the cap, and no more than one request below it.
    assert 0 < sent["tokens"] <= 600
    assert _budget(pages)["state"] == "exhausted"
    assert _budget(pages)["reserved"] == 0
    # A handful of requests, and no hot loop of refusals.
    assert sent["requests"] <= 600 // 50
    done = _embedded(pages)
    assert 0 < done < _PAGES
    assert scalar(pages, "SELECT count(*) FROM embedline.dead_letter") == 0
    # Nothing was lost, and no try was charged.
    assert scalar(pages, f"SELECT coalesce(max(attempts), 0) FROM {PAGE('outbox')}") <= 1
    pages.execute(f"SELECT embedline.drop_budget({scope})".encode())
    settle(pages, 60)
    assert _embedded(pages) == _PAGES
    assert queued(pages) == 0


def test_more_money_wakes_a_resident_worker(pages: psycopg.Connection, connect: Connect) -> None:
    pages.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 600)")
    worker = connect()
    thread = threading.Thread(target=_work, args=(worker, 20), daemon=True)
    thread.start()
    wait_until(lambda: _budget(pages)["state"] == "exhausted")
    before = _embedded(pages)
    pages.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 1000000)")
    wait_until(lambda: _embedded(pages) == _PAGES, 20)
    assert before < _PAGES
    pages.execute("UPDATE embedline.worker SET stop_requested = true")
    thread.join(20)


def test_an_exhausted_pipeline_stops_no_other(pages: psycopg.Connection, connect: Connect) -> None:
    create_pipeline(pages, "second", model="far", chunking="none")
    pages.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 0)")
    _work_until(connect(), lambda: data_count(pages, "chunk", "second") == _PAGES)
    assert _embedded(pages) == 0


def test_several_workers_share_one_budget(pages: psycopg.Connection, connect: Connect, provider: StubProvider) -> None:
    provider.behave(latency=0.1)
    pages.execute("SELECT embedline.set_budget('day', model => 'far', tokens => 1500)")
    threads = [threading.Thread(target=_work, args=(connect(), 4), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 0 < provider.counts()["tokens"] <= 1500
    assert _budget(pages)["spent"] + _budget(pages)["reserved"] <= 1500


def test_a_killed_workers_requests_stay_counted(
    pages: psycopg.Connection, connect: Connect, provider: StubProvider
) -> None:
    provider.behave(latency=20)
    pages.execute("SELECT embedline.set_budget('day', model => 'far', tokens => 1000000)")
    worker = connect()

    def run() -> None:
        with pytest.raises(psycopg.Error):
            _work(worker, 60)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: _budget(pages)["reserved"] > 0)
    reserved = _budget(pages)["reserved"]
    pages.execute("SELECT pg_terminate_backend(%s)", (worker.info.backend_pid,))
    thread.join(20)
    assert _budget(pages)["reserved"] >= reserved
    provider.behave()
    settle(pages, 60)
    assert _embedded(pages) == _PAGES
    assert _budget(pages)["reserved"] >= reserved


def test_embed_pending_stops_at_the_cap_with_a_warning(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_budget('month', pipeline => 'page', tokens => 600)")
    heard: list[str] = []
    pages.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
    done = scalar(pages, "SELECT embed_pending(1000)")
    assert 0 < done < _PAGES
    assert any("budget" in message for message in heard)
    assert scalar(pages, "SELECT embed_pending(1000)") == 0
    assert "budget" in scalar(pages, "SELECT last_error FROM embedline.status")
    pages.execute("SELECT embedline.drop_budget(pipeline => 'page')")
    settle(pages, 60)
    assert _embedded(pages) == _PAGES
    # A cause that is gone is not shown.
    assert scalar(pages, "SELECT last_error FROM embedline.status") is None


def test_a_rate_limit_spreads_the_requests_of_all_workers(
    pages: psycopg.Connection, connect: Connect, provider: StubProvider
) -> None:
    # Four requests a second; 20 requests are to be made.
    pages.execute("SELECT embedline.set_rate_limit('far', requests_per_minute => 240)")
    threads = [threading.Thread(target=_work, args=(connect(), 2), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # One second's worth at once, then four a second; a worker may be a moment over its time.
    assert 5 <= provider.counts()["requests"] <= 5 + 4 * 3
    assert scalar(pages, "SELECT count(*) FROM embedline.dead_letter") == 0
    pages.execute("SELECT embedline.set_rate_limit('far')")
    settle(pages, 60)
    assert _embedded(pages) == _PAGES


def test_a_local_model_without_limits_leaves_no_trace(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.usage") == 0
