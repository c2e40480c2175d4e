"""Providers that limit or fail one pipeline, and who has to wait for it: rate limits, retries, shares of the work."""

from __future__ import annotations

import time

import psycopg
import pytest

from embedline.models.health_check import PROBE_TEXT
from generated_names import PAGE, Generated
from stub_provider import StubProvider
from support import queued, scalar, settle, take_inbox, wait_until
from working import (
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    insert_rows,
    seconds_until_found,
    work_until_idle,
    working,
)


@pytest.fixture
def small_batches(stub_database: psycopg.Connection) -> psycopg.Connection:
    """The database, whose workers take 100 rows at a time: as many as one row of the inbox holds."""
    stub_database.execute("SELECT embedline.configure('min_rows', 100), embedline.configure('max_rows', 100)")
    return stub_database


@pytest.fixture(autouse=True)
def default_settings(stub_database: psycopg.Connection) -> None:
    """Put back what the test before has set."""
    stub_database.execute("SELECT embedline.configure('min_rows', NULL), embedline.configure('max_rows', NULL)")


def order_of_embedding(connection: psycopg.Connection, *tables: str) -> list[tuple[str, int]]:
    """Return (table, key) of every document in the order in which they were embedded."""
    queries = [f"SELECT '{table}', key_id, embedded_at FROM {Generated(table)('document')}" for table in tables]
    query = f"SELECT * FROM ({' UNION ALL '.join(queries)}) AS d ORDER BY embedded_at"
    return [(table, key) for table, key, _ in connection.execute(query)]


# Rate limits


def test_a_rate_limit_burns_no_try_and_keeps_every_row(stub_database: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=50)
    insert_rows(stub_database, 51, 100)
    stub.behave(rules=[{"status": 429, "headers": {"Retry-After": "0.1"}}], remember=True)
    with working(stub_database):
        # More often than a row may fail.
        wait_for_requests(stub, 8)
        assert queued(stub_database) >= 50
        assert dead_letters(stub_database) == {}
        stub.behave(remember=True)
        wait_until(lambda: scalar(stub_database, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    settle(stub_database)
    assert assert_all_settled(stub_database, stub.dimensions) == 100
    assert dead_letters(stub_database) == {}


def wait_for_requests(stub: StubProvider, count: int) -> None:
    """Wait until the stub was asked so often."""
    asked = 0

    def often() -> bool:
        nonlocal asked
        asked += stub.counts().get("requests", 0)
        return asked >= count

    wait_until(often, 20, f"it was asked {count} times")


def test_a_provider_without_a_rate_header_is_not_asked_in_a_loop(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    insert_rows(stub_database, 1, 20)
    stub.behave(rules=[{"status": 429}])
    started = time.monotonic()
    with working(stub_database):
        wait_until(lambda: time.monotonic() - started > 3, what="some time is over")
    # After 0.5, 1, 2 s.
    assert 2 <= stub.counts()["requests"] <= 4


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_sent_before_retry_after_is_over(
    stub_database: psycopg.Connection, stub: StubProvider, workers: int
) -> None:
    # Many requests of a batch wait behind the two that are in flight.
    create_stub_model(stub_database, stub, max_batch_items=20, concurrency=2)
    create_stub_pipeline(stub_database)
    insert_rows(stub_database, 1, 1000)
    stub.behave(rules=[{"status": 429, "headers": {"Retry-After": "1.5"}, "times": 1}], latency=0.05, remember=True)
    with working(stub_database, count=workers):
        wait_until(lambda: scalar(stub_database, "SELECT pending = 0 FROM embedline.status"), 30, "nothing waits")
    asked = stub.asked()
    refused = next(request for request in asked if request.status == 429)
    early = [request for request in asked if refused.came + 0.1 < request.came < refused.came + 1.5]
    # Another worker hears of it at its next claim; the batch that it has in work by then goes on.
    assert len(early) <= (workers - 1) * 25, f"{len(early)} requests were sent before the time"
    assert assert_all_settled(stub_database, stub.dimensions) == 1000
    assert set(stub.texts_seen().values()) == {1}


def test_a_limit_that_is_lifted_lets_a_waiting_batch_go(stub_database: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(stub_database, stub, max_batch_items=20)
    create_stub_pipeline(stub_database, rows=100)
    # One request leaves; the next is due in almost a minute, which a batch waits for.
    stub_database.execute("SELECT embedline.set_rate_limit('stub', requests_per_minute => 1)")
    with working(stub_database):
        # Where its answer is written the rest asks for its grant, and is told to wait.
        written = "SELECT bool_or(settled_at IS NOT NULL) FROM embedline.reservation"
        wait_until(lambda: scalar(stub_database, written), 20, "one is written")
        stub_database.execute("SELECT embedline.set_rate_limit('stub')")
        wait_until(lambda: scalar(stub_database, f"SELECT count(*) = 100 FROM {PAGE('chunk')}"), 20, "all are sent")
    assert assert_all_settled(stub_database, stub.dimensions) == 100


# One pipeline's trouble


@pytest.mark.parametrize("trouble", [{"answer": "silence"}, {"status": 500}, {"status": 429}, {"status": 401}])
def test_a_dead_provider_does_not_delay_another_pipeline(
    stub_database: psycopg.Connection, stub: StubProvider, trouble: dict[str, object]
) -> None:
    for name in ("dead", "page"):
        create_stub_model(stub_database, stub, name=f"{name}-model", max_batch_items=100)
        create_stub_pipeline(stub_database, name, f"{name}-model")
    settle(stub_database)
    insert_rows(stub_database, 1, 5000, "dead")
    stub.behave(rules=[trouble | {"match": "dead row"}], remember=True)
    with working(stub_database) as (worker,):
        wait_until(lambda: stub.counts().get("rules", 0) > 0, 20, "the dead provider was asked")
        delays = [seconds_until_found(stub_database, key) for key in range(1, 11)]
        # It waits for the silence's time-out at its end; the test does not.
        worker.cancel()
        worker.error = None
    # Rows that waited for the dead provider would wait for its time-out of 60 s, or for its circuit.
    assert max(delays) < 3, delays


def test_rows_that_fail_again_and_again_do_not_starve_new_ones(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub, max_batch_items=100)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    stub_database.execute("INSERT INTO page SELECT -g, 'bad row ' || g FROM generate_series(1, 3000) AS g")
    stub.behave(rules=[{"status": 500, "match": "bad row"}])
    with working(stub_database):
        wait_until(lambda: stub.counts().get("rules", 0) > 0, 20, "the bad rows were tried")
        for first in range(1, 10):
            # The backoff is real; here all of them are due at any time.
            stub_database.execute(f"UPDATE {PAGE('outbox')} SET not_before = now() WHERE claimed_by IS NULL")
            assert seconds_until_found(stub_database, first) < 3


def test_a_worker_that_is_to_end_looks_no_longer_for_what_fails(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub, max_batch_items=100)
    create_stub_pipeline(stub_database)
    stub.behave(rules=[{"status": 500, "match": "bad row"}])
    stub_database.execute("INSERT INTO page SELECT g, 'bad row ' || g FROM generate_series(1, 1000) AS g")
    with working(stub_database) as (worker,):
        # All of them fail: to look for each takes two thousand requests.
        failed = 0
        while failed < 60:
            stub_database.execute(f"UPDATE {PAGE('outbox')} SET not_before = now() WHERE claimed_by IS NULL")
            failed += stub.counts().get("rules", 0)
        worker.stop(stub_database)
        worker.join()
    # To look through all of them takes about two thousand.
    assert stub.counts().get("rules", 0) < 600
    assert scalar(stub_database, f"SELECT count(*) FROM {PAGE('outbox')} WHERE claimed_by IS NOT NULL") == 0
    assert scalar(stub_database, "SELECT pending FROM embedline.status") == 1000
    assert scalar(stub_database, "SELECT count(*) FROM embedline.dead_letter") == 0


def test_retries_and_new_changes_take_turns_in_every_pipeline(
    small_batches: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(small_batches, stub, concurrency=1)
    for table in ("first", "second"):
        create_stub_pipeline(small_batches, table)
        insert_rows(small_batches, 1, 600, table)
        # These were tried before and are due again.
        take_inbox(small_batches, table)
        insert_rows(small_batches, 601, 1200, table)
    work_until_idle(small_batches)
    for table in ("first", "second"):
        order = [key for _, key in order_of_embedding(small_batches, table)]
        retried = sum(key <= 600 for key in order[:600])
        assert 200 <= retried <= 400, f"{retried} of the first 600 rows of {table} are retries"


def test_deleted_rows_at_the_head_of_the_queue_do_not_end_a_run(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    insert_rows(stub_database, 1, 5000)
    stub_database.execute("DELETE FROM page WHERE id <= 4000")
    assert scalar(stub_database, "SELECT embed_pending(1000)") == 1000
    insert_rows(stub_database, 5001, 10_000)
    stub_database.execute("DELETE FROM page WHERE id BETWEEN 5001 AND 9000")
    work_until_idle(stub_database)
    assert assert_all_settled(stub_database, stub.dimensions) == 2000
    assert stub.counts()["texts"] == 2000


def test_a_page_of_rows_that_always_fail_does_not_stop_the_others(
    small_batches: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(small_batches, stub)
    create_stub_pipeline(small_batches)
    settle(small_batches)
    small_batches.execute("INSERT INTO page SELECT -g, 'bad row ' || g FROM generate_series(1, 120) AS g")
    insert_rows(small_batches, 1, 200)
    stub.behave(rules=[{"status": 400, "match": "bad row"}], remember=True)
    # The first of it in one call that may not take more.
    assert scalar(small_batches, "SELECT embed_pending(50)") >= 50
    work_until_idle(small_batches)
    assert assert_all_settled(small_batches, stub.dimensions) == 200
    assert set(dead_letters(small_batches)) == set(range(-120, 0))
    seen = stub.texts_seen()
    seen.pop(PROBE_TEXT, None)
    assert set(seen.values()) == {1}


# Shares of the work


def test_pipelines_share_a_worker_by_their_weights(small_batches: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(small_batches, stub, concurrency=1)
    for table, weight in (("light", 1.0), ("heavy", 3.0)):
        create_stub_pipeline(small_batches, table, weight=weight)
        insert_rows(small_batches, 1, 3000, table)
    work_until_idle(small_batches)
    # While both have work.
    first = [table for table, _ in order_of_embedding(small_batches, "light", "heavy")][:3000]
    assert 2.5 <= first.count("heavy") / first.count("light") <= 3.5


def test_live_changes_come_first_within_their_share_while_a_backfill_runs(
    small_batches: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(small_batches, stub, concurrency=1)
    create_stub_pipeline(small_batches, rows=3000)
    insert_rows(small_batches, 3001, 6000)
    work_until_idle(small_batches)
    first = [key > 3000 for _, key in order_of_embedding(small_batches, "page")][:2000]
    assert first[0], "the first batch is of live changes"
    assert 0.75 <= sum(first) / len(first) <= 0.85


def test_a_worker_of_one_pipeline_ends_although_others_have_work(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    for table in ("page", "other"):
        create_stub_pipeline(stub_database, table)
        insert_rows(stub_database, 1, 10, table)
    started = time.monotonic()
    stub_database.execute("CALL embedline.run_worker(max_seconds => 10, pipeline_name => 'page', until_idle => true)")
    assert time.monotonic() - started < 5
    assert queued(stub_database, "page") == 0
    assert queued(stub_database, "other") == 10


def test_a_row_that_changes_faster_than_it_is_embedded_is_no_dead_letter(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    insert_rows(stub_database, 1, 2)
    work_until_idle(stub_database)
    stub.behave(latency=0.15)
    with working(stub_database):
        stub.forget()
        asked = versions = 0

        def tried_often() -> bool:
            nonlocal asked, versions
            versions += 1
            stub_database.execute("UPDATE page SET body = 'version ' || %s::text WHERE id = 1", (versions,))
            asked += stub.counts().get("requests", 0)
            return asked >= 8

        wait_until(tried_often, 20, "the row was embedded in vain eight times")
        assert dead_letters(stub_database) == {}
        assert scalar(stub_database, "SELECT count(*) FROM page_embedding WHERE id = 1") == 1, "it has left search"
        wait_until(lambda: scalar(stub_database, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    assert assert_all_settled(stub_database, stub.dimensions) == 2
