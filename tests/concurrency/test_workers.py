"""Workers beside each other, and beside applications that write at the same time: claims, leases, stale writes."""

from __future__ import annotations

import random
import threading
from collections import Counter

import psycopg
import pytest
from psycopg import errors

from conftest import Connect
from generated_names import PAGE
from support import (
    assert_exact,
    create_pages,
    create_pipeline,
    queued,
    scalar,
    settle,
    take_inbox,
    wait_until,
)


def _run_worker(connection: psycopg.Connection, seconds: float = 60) -> threading.Thread:
    """CALL run_worker in a thread of its own; ends when nothing waits."""
    thread = threading.Thread(
        target=lambda: connection.execute(
            f"CALL embedline.run_worker(max_seconds => {seconds}, until_idle => true)".encode()
        ),
        daemon=True,
    )
    thread.start()
    return thread


def test_two_workers_share_the_work_and_never_embed_the_same_change(
    connect: Connect, database: psycopg.Connection
) -> None:
    create_pages(database, 4000)
    create_pipeline(database)
    database.execute("CREATE TABLE written (key integer)")
    # Each write of a document is noted, by whichever worker it was.
    database.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " IF NEW.embedded_at > '-infinity' THEN INSERT INTO public.written VALUES (NEW.key_id); END IF;"
        " RETURN NULL; END$$"
    )
    database.execute(
        f"CREATE TRIGGER note AFTER INSERT OR UPDATE ON {PAGE('document')} FOR EACH ROW EXECUTE FUNCTION note()"
    )
    database.execute("UPDATE page SET body = body || ' changed' WHERE id % 2 = 0")
    threads = [_run_worker(connect()) for _ in range(3)]
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    settle(database)
    assert assert_exact(database) == 4000
    written = Counter(row[0] for row in database.execute("SELECT key FROM written"))
    assert len(written) == 4000
    # A row of the backfill that is also a live change may be looked at twice, but is embedded by only one of them.
    assert sum(written.values()) <= 4000 + 2000


def test_a_living_workers_claim_is_left_alone_and_a_dead_ones_is_taken_over(
    connect: Connect, database: psycopg.Connection
) -> None:
    create_pages(database, 10)
    create_pipeline(database)
    settle(database)
    database.execute("UPDATE page SET body = body || ' again'")
    # A worker that holds its lock and a claim, and is slow.
    slow = connect()
    take_inbox(database)
    worker_id = scalar(slow, "SELECT nextval('embedline.worker_id_seq')")
    slow.execute("SELECT pg_advisory_lock(1164797804, %s)", (worker_id,))
    slow.execute(f"UPDATE {PAGE('outbox')} SET claimed_by = %s, attempts = 1 WHERE key_id <= 4", (worker_id,))
    assert scalar(database, "SELECT embed_pending(100)") == 6
    assert scalar(database, "SELECT embed_pending(100)") == 0
    assert queued(database) == 4
    # A newer change of a claimed row waits for the claim, too: nobody embeds the same row at the same time.
    database.execute("UPDATE page SET body = body || ' newer' WHERE id = 1")
    assert scalar(database, "SELECT embed_pending(100)") == 0
    slow.close()
    wait_until(lambda: scalar(database, "SELECT count(*) FROM embedline.status WHERE workers_alive = 0") == 1)
    settle(database)
    assert_exact(database)


def test_an_old_embedding_never_overwrites_a_newer_one(connect: Connect, database: psycopg.Connection) -> None:
    create_pages(database, 1)
    create_pipeline(database)
    settle(database)
    database.execute("UPDATE page SET body = 'the old text' WHERE id = 1")
    # Reads the old text, embeds it, and is held at the write, which needs the document row.
    holder = connect(autocommit=False)
    holder.execute(f"SELECT FROM {PAGE('document')} FOR UPDATE")
    worker = connect()
    thread = _run_worker(worker)
    database.execute("UPDATE page SET body = 'the new text' WHERE id = 1")
    holder.rollback()
    thread.join(60)
    settle(database)
    assert_exact(database)
    assert scalar(database, f"SELECT content FROM {PAGE('chunk')}") == "Title 1\n\nthe new text"


def test_deleting_a_row_in_flight_leaves_no_orphan(connect: Connect, database: psycopg.Connection) -> None:
    create_pages(database, 50)
    create_pipeline(database)
    application = connect(autocommit=False)
    # The delete is under way, uncommitted, while the worker comes by: it neither waits nor writes that row.
    application.execute("DELETE FROM page WHERE id <= 10")
    assert scalar(database, "SELECT embed_pending(100)") == 40
    application.commit()
    settle(database)
    assert assert_exact(database) == 40


def test_delete_and_insert_of_the_same_key_in_flight(connect: Connect, database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database)
    application = connect(autocommit=False)
    application.execute("DELETE FROM page WHERE id = 2")
    application.execute("INSERT INTO page VALUES (2, 'born', 'again')")
    assert scalar(database, "SELECT embed_pending(100)") == 2
    application.commit()
    settle(database)
    assert_exact(database)
    assert scalar(database, f"SELECT content FROM {PAGE('chunk')} WHERE key_id = 2") == "born\n\nagain"


def test_the_worker_never_waits_for_an_applications_lock(connect: Connect, database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    application = connect(autocommit=False)
    application.execute("SELECT FROM page WHERE id = 7 FOR UPDATE")
    database.execute("SET lock_timeout = '1s'")
    assert scalar(database, "SELECT embed_pending(100)") == 19
    assert queued(database) == 1
    application.rollback()
    settle(database)
    assert_exact(database)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_snapshot_applications_get_no_serialization_failure_from_us(
    connect: Connect, database: psycopg.Connection, isolation: str
) -> None:
    create_pages(database, 30)
    create_pipeline(database)
    application = connect(autocommit=False)
    application.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
    application.execute("SELECT count(*) FROM page")
    # After the application's snapshot: documents are written that it cannot see.
    assert scalar(database, "SELECT embed_pending(100)") == 30
    application.execute("DELETE FROM page WHERE id <= 10")
    application.execute("UPDATE page SET body = 'x' || body WHERE id BETWEEN 11 AND 20")
    application.execute("INSERT INTO page VALUES (101, 'new', 'row')")
    application.commit()
    settle(database)
    assert assert_exact(database) == 21


def test_mixed_transactions_leave_nothing_stale_and_nothing_orphaned(
    connect: Connect, database: psycopg.Connection
) -> None:
    create_pages(database, 200)
    create_pipeline(database)
    stop = threading.Event()
    failures: list[BaseException] = []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        connection = connect(autocommit=False)
        try:
            for _ in range(150):
                key = rng.randrange(1, 260)
                kind = rng.random()
                try:
                    if kind < 0.5:
                        connection.execute(
                            "UPDATE page SET body = body || %s WHERE id = %s", (f" w{rng.random()}", key)
                        )
                    elif kind < 0.7:
                        connection.execute("DELETE FROM page WHERE id = %s", (key,))
                    elif kind < 0.9:
                        connection.execute(
                            "INSERT INTO page VALUES (%s, 'again', %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                            (key, f"text {rng.random()}"),
                        )
                    else:
                        connection.execute("UPDATE page SET id = id + 1000 WHERE id = %s", (key,))
                    connection.rollback() if rng.random() < 0.1 else connection.commit()
                except errors.UniqueViolation:
                    connection.rollback()
        except BaseException as error:
            failures.append(error)

    def work() -> None:
        try:
            connection = connect()
            while not stop.is_set():
                connection.execute("CALL embedline.run_worker(max_seconds => 0.5)")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in (*workers, *writers):
        thread.start()
    for thread in writers:
        thread.join(120)
    stop.set()
    for thread in workers:
        thread.join(60)
    assert not failures, failures
    settle(database)
    assert_exact(database)


def test_a_cancelled_worker_gives_its_claims_back(connect: Connect, database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    worker = connect()
    result: list[BaseException] = []

    def call() -> None:
        try:
            worker.execute("CALL embedline.run_worker(max_seconds => 60)")
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: scalar(database, "SELECT embedline._workers_alive()") == 1)
    pid = worker.info.backend_pid
    assert scalar(database, "SELECT pg_cancel_backend(%s)", (pid,))
    thread.join(20)
    assert isinstance(result[0], errors.QueryCanceled)
    assert scalar(database, "SELECT embedline._workers_alive()") == 0
    assert queued(database) == 0
    # The session is still good for the next call.
    database.execute("UPDATE page SET body = 'next'")
    worker.execute("CALL embedline.run_worker(until_idle => true)")
    assert_exact(database)


def test_a_paused_pipeline_captures_and_waits(connect: Connect, database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    database.execute("SELECT embedline.pause_pipeline('page')")
    database.execute("UPDATE page SET body = 'later'")
    connect().execute("CALL embedline.run_worker(until_idle => true)")
    assert queued(database) == 5
    database.execute("SELECT embedline.resume_pipeline('page')")
    settle(database)
    assert_exact(database)


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_worker_works_whatever_its_sessions_isolation_level(
    connect: Connect, database: psycopg.Connection, isolation: str
) -> None:
    create_pages(database, 3000)
    create_pipeline(database)
    sessions = [connect() for _ in range(2)]
    for session in sessions:
        session.execute(f"SET default_transaction_isolation = '{isolation}'".encode())
    threads = [_run_worker(session) for session in sessions]
    for number in range(20):
        database.execute("UPDATE page SET body = 'edition ' || %s || ' of ' || id WHERE id %% 100 = 7", (number,))
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    settle(database)
    assert assert_exact(database) == 3000
    assert scalar(database, "SELECT last_error IS NULL FROM embedline.status")


def test_no_transaction_is_open_while_the_provider_works(
    connect: Connect, database: psycopg.Connection, slow_endpoint: str
) -> None:
    database.execute("SELECT embedline.create_model('slow', 'openai', 'm', base_url => %s)", (slow_endpoint,))
    create_pages(database, 3)
    create_pipeline(database, model="slow")
    thread = _run_worker(connect())
    query = (
        "SELECT count(*) FILTER (WHERE claimed.n > 0) FROM (SELECT count(*) AS n FROM embedline.backfill_range"
        " WHERE claimed_by IS NOT NULL) AS claimed"
    )
    wait_until(lambda: scalar(database, query) == 1)
    observed = []

    def look() -> bool:
        observed.append(
            scalar(
                database,
                "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float FROM pg_stat_activity"
                " WHERE query LIKE 'CALL embedline.run_worker%' AND datname = current_database() AND backend_xmin IS NOT NULL",
            )
        )
        return not thread.is_alive()

    # The application is not held up by the row in flight.
    application = connect()
    application.execute("SET lock_timeout = '500ms'")
    application.execute("UPDATE page SET body = 'edited in flight' WHERE id = 1")
    application.execute("DELETE FROM page WHERE id = 2")
    wait_until(look, 30)
    assert max(observed) < 1.0
    thread.join()
    settle(database)
    assert {row[0] for row in database.execute(f"SELECT key_id FROM {PAGE('chunk')}")} == {1, 3}


@pytest.mark.parametrize("seconds", ["NaN", None])
def test_a_worker_is_told_a_time_that_ends(database: psycopg.Connection, seconds: str | None) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="max_seconds must be a number") as refused:
        database.execute("CALL embedline.run_worker(max_seconds => %s::float8)", (seconds,))
    assert refused.value.diag.message_hint == "CALL embedline.run_worker(max_seconds => 60);"


def test_a_worker_that_is_refused_says_why_in_our_words(database: psycopg.Connection) -> None:
    with pytest.raises(errors.UndefinedObject) as refused:
        database.execute("CALL embedline.run_worker(pipeline_name => 'nowhere')")
    assert refused.value.diag.message_primary == 'embedline: there is no pipeline "nowhere"'
    assert refused.value.diag.message_hint
