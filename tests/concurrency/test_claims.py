"""Who has which change in hand: two workers beside each other, slow ones, ones that end, die, or come from a backup."""

from __future__ import annotations

import threading

import psycopg
import pytest

from generated_names import PAGE
from stub_provider import StubProvider
from support import create_pipeline, scalar, settle, take_inbox, wait_until
from working import (
    Worker,
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    dsn_of,
    insert_rows,
    seconds_until_found,
    wait_for_in_flight,
    work_until_idle,
    working,
)

# Higher than any that a sequence has given out: nobody has its lock.
GONE = 2_000_000_000


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on an empty table."""
    create_stub_model(stub_database, stub, max_batch_items=250)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    return stub_database


def _edit(dsn: str, first: int, step: int, last: int) -> threading.Thread:
    """Give every `step`-th row a new text, each in a transaction of its own, in a thread."""

    def edit() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            for key in range(first, last + 1, step):
                connection.execute("UPDATE page SET body = body || ' edited' WHERE id = %s", (key,))

    thread = threading.Thread(target=edit, daemon=True)
    thread.start()
    return thread


def test_two_workers_never_embed_the_same_change_of_rows_that_are_edited_meanwhile(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    insert_rows(page, 1, 20_000)
    with working(page, count=2):
        editors = [_edit(dsn_of(page), first, 20, 20_000) for first in (1, 2, 3)]
        for editor in editors:
            editor.join(60)
            assert not editor.is_alive()
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 60, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 20_000
    seen = stub.texts_seen()
    assert [text for text, count in seen.items() if count > 1] == []
    assert 20_000 <= len(seen) <= 23_000


def test_rows_of_a_backfill_that_are_edited_meanwhile_are_paid_for_once(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub, max_batch_items=250)
    create_stub_pipeline(stub_database, rows=20_000)
    # Each of these is both a change and a row of the backfill.
    stub_database.execute("UPDATE page SET body = body || ' edited' WHERE mod(id, 4) = 0")
    stub.behave(latency=0.02, remember=True)
    work_until_idle(stub_database, count=2)
    settle(stub_database)
    assert assert_all_settled(stub_database, stub.dimensions) == 20_000
    seen = stub.texts_seen()
    assert len(seen) == 20_000
    assert sum(count - 1 for count in seen.values()) == 0


def test_a_slow_worker_is_never_robbed(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(latency=2.5, remember=True)
    insert_rows(page, 1, 100)
    with Worker(dsn_of(page), until_idle=True) as slow:
        wait_for_in_flight(stub, 100)
        # Age does not matter: only whether its session lives.
        page.execute(f"UPDATE {PAGE('claim')} SET enqueued_at = now() - interval '1 year'")
        stub.behave(remember=True)
        with working(page):
            insert_rows(page, 101, 200)
            written = f"SELECT count(*) FROM {PAGE('chunk')} WHERE key_id > 100"
            wait_until(lambda: scalar(page, written) == 100, 20, "the other worker has worked")
            # A newer change of a row in hand waits for the claim.
            page.execute("UPDATE page SET body = body || ' edited' WHERE id = 1")
            moved = f"SELECT count(*) FROM {PAGE('outbox')} WHERE key_id = 1 AND claimed_by IS NULL"
            wait_until(lambda: scalar(page, moved) == 1, 20, "the other worker has put the newer change off")
            assert scalar(page, f"SELECT count(*) FROM {PAGE('claim')}") == 1
            slow.join(20)
            assert slow.error is None
            wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 200
    assert set(stub.texts_seen().values()) == {1}


def test_a_cancelled_worker_gives_back_what_is_in_flight_uncounted(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    insert_rows(page, 1, 100)
    take_inbox(page)
    insert_rows(page, 101, 200)
    stub.behave(latency=20)
    with Worker(dsn_of(page)) as worker:
        wait_for_in_flight(stub, 200)
        worker.cancel()
        assert isinstance(worker.error, psycopg.errors.QueryCanceled)
    given_back = "SELECT array_agg(DISTINCT (attempts, crash_count, claimed_by)::text), count(*)::integer"
    found = page.execute(f"{given_back} FROM {PAGE('outbox')}").fetchone()
    assert found == (["(0,0,)"], 200)
    assert scalar(page, f"SELECT count(*) FROM {PAGE('claim')}") == 0
    stub.behave()
    work_until_idle(page)
    assert assert_all_settled(page, stub.dimensions) == 200


def test_a_worker_that_is_asked_to_stop_writes_what_is_in_flight_first(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    insert_rows(page, 1, 100)
    stub.behave(latency=0.5, remember=True)
    with Worker(dsn_of(page)) as worker:
        wait_for_in_flight(stub, 100)
        worker.stop(page)
        worker.join(20)
        assert worker.error is None
    assert assert_all_settled(page, stub.dimensions) == 100
    assert scalar(page, "SELECT count(*) FROM embedline.worker") == 0


def test_claims_that_come_from_a_backup_are_taken_over(stub_database: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=50)
    insert_rows(stub_database, 51, 150)
    # In each of the three places where a claim may stand.
    stub_database.execute("UPDATE embedline.backfill_range SET claimed_by = %s", (GONE,))
    take_inbox(stub_database)
    stub_database.execute(f"UPDATE {PAGE('outbox')} SET claimed_by = %s WHERE key_id <= 100", (GONE,))
    stub_database.execute(
        f"WITH taken AS (DELETE FROM {PAGE('outbox')} WHERE key_id > 100 RETURNING key_id)"
        f" INSERT INTO {PAGE('claim')} (key_id, claimed_by, enqueued_at)"
        " SELECT array_agg(key_id), %s, now() FROM taken",
        (GONE,),
    )
    work_until_idle(stub_database)
    settle(stub_database)
    assert assert_all_settled(stub_database, stub.dimensions) == 150
    assert dead_letters(stub_database) == {}


@pytest.mark.faults
@pytest.mark.parametrize("crashes", [1, 2, 3, 4, 9])
def test_a_range_of_the_backfill_is_read_however_often_its_workers_died(
    stub_database: psycopg.Connection, stub: StubProvider, crashes: int
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=100)
    stub_database.execute("UPDATE embedline.backfill_range SET crash_count = %s", (crashes,))
    work_until_idle(stub_database)
    settle(stub_database)
    # From the third crash on the row that was next is taken for the cause.
    given_up = dead_letters(stub_database)
    assert list(given_up) == ([1] if crashes >= 3 else [])
    assert assert_all_settled(stub_database, stub.dimensions) == 100 - len(given_up)


@pytest.mark.faults
@pytest.mark.parametrize(
    "end", ["PERFORM pg_terminate_backend(pg_backend_pid())", "RAISE query_canceled USING MESSAGE = 'cancelled'"]
)
def test_rows_that_end_their_worker_are_quarantined_alone_beside_two_workers(
    stub_database: psycopg.Connection, stub: StubProvider, end: str
) -> None:
    create_stub_model(stub_database, stub)
    stub_database.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    # Reading such a row ends the session, as a crash would.
    stub_database.execute(
        b"CREATE OR REPLACE FUNCTION deadly(body text) RETURNS text LANGUAGE plpgsql STABLE AS $$BEGIN"
        + f" IF body LIKE '%deadly%' THEN {end}; END IF; RETURN body; END$$".encode()
    )
    create_pipeline(stub_database, "page", "page", "deadly(body)", "stub", index_method="none")
    settle(stub_database)
    stub_database.execute(
        "INSERT INTO page SELECT g, CASE WHEN g IN (17, 400) THEN 'deadly ' ELSE 'text ' END || g FROM generate_series(1, 500) g"
    )
    deaths = 0

    def all_done() -> bool:
        nonlocal deaths
        workers = [Worker(dsn_of(stub_database), until_idle=True) for _ in range(2)]
        for worker in workers:
            worker.join(60)
        deaths += sum(worker.error is not None for worker in workers)
        return bool(scalar(stub_database, "SELECT pending = 0 FROM embedline.status"))

    wait_until(all_done, 60, "every row is settled")
    letters = dead_letters(stub_database)
    assert {key: letter[:2] for key, letter in letters.items()} == {17: ("claim", "EL020"), 400: ("claim", "EL020")}
    assert assert_all_settled(stub_database, stub.dimensions) == 498
    # Three for each: nothing else was taken for the cause on the way.
    assert 3 <= deaths <= 6
    assert set(stub.texts_seen().values()) == {1}


def test_rows_under_suspicion_do_not_starve_new_ones(page: psycopg.Connection, stub: StubProvider) -> None:
    insert_rows(page, 1, 3000)
    take_inbox(page)
    # As a worker that died has left them: they go 32 at a time now, and nothing beside them.
    page.execute(f"UPDATE {PAGE('outbox')} SET crash_count = 1")
    stub.behave(latency=0.1, remember=True)
    with working(page):
        wait_for_in_flight(stub)
        delays = [seconds_until_found(page, key) for key in range(3001, 3006)]
        assert scalar(page, f"SELECT count(*) FROM {PAGE('outbox')} WHERE crash_count = 1") > 1000
        assert max(delays) < 1.5, delays
        # The rest is no part of the test.
        page.execute(f"UPDATE {PAGE('outbox')} SET crash_count = 0 WHERE claimed_by IS NULL")
        stub.behave(remember=True)
        wait_until(lambda: scalar(page, "SELECT pending = 0 FROM embedline.status"), 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 3005
    assert set(stub.texts_seen().values()) == {1}


def test_a_poll_does_not_read_the_rows_that_are_not_due_yet(page: psycopg.Connection) -> None:
    insert_rows(page, 1, 50_000)
    take_inbox(page)
    page.execute(f"UPDATE {PAGE('outbox')} SET not_before = now() + interval '1 hour'")
    page.execute(f"VACUUM ANALYZE {PAGE('outbox')}")
    before = _blocks_read(page)
    assert scalar(page, "SELECT embed_pending(100)") == 0
    # All of them lie on 500 blocks.
    assert _blocks_read(page) - before < 50
    page.execute("TRUNCATE page")


def _blocks_read(connection: psycopg.Connection) -> int:
    """Return the blocks of the outbox and its indexes that were read so far."""
    connection.execute("SELECT pg_stat_force_next_flush()")
    connection.execute("SELECT pg_stat_clear_snapshot()")
    blocks = "heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read"
    return int(scalar(connection, f"SELECT {blocks} FROM pg_statio_user_tables WHERE relname = 'page_outbox'"))
