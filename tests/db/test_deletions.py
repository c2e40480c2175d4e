"""Deleted rows and rows that come back: nothing is paid for twice, and no chunk is shown with a row that is not its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from generated_names import PAGE
from stub_provider import StubProvider, stub_provider
from support import assert_exact, create_pages, create_pipeline, data_count, queued, scalar, searching, settle
from working import Worker, create_stub_model, create_stub_pipeline, dsn_of, work_until_idle

Connect = Callable[..., psycopg.Connection]
ROWS = 60
SHOWN = "SELECT id, chunk FROM page_embedding ORDER BY id"
OWN = "SELECT count(*) FROM page_embedding WHERE chunk <> body"


@pytest.fixture(scope="module")
def stub() -> Iterator[StubProvider]:
    """A provider that remembers the texts that it was paid for."""
    with stub_provider(8) as started:
        started.behave(remember=True)
        yield started


@pytest.fixture
def paid(database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """Table page with 60 rows that were paid for."""
    create_stub_model(database, stub)
    create_stub_pipeline(database, rows=ROWS)
    settle(database)
    stub.forget()
    return database


def shown(connection: psycopg.Connection) -> list[tuple[int, str]]:
    """Return key and chunk of every row of the routing view."""
    return connection.execute(SHOWN).fetchall()


def move_keys(connection: psycopg.Connection, expression: str) -> None:
    """Give every row another key, whatever keys are in use."""
    with connection.transaction():
        connection.execute("UPDATE page SET id = -id")
        connection.execute(sql.SQL("UPDATE page SET id = {}").format(sql.SQL(expression)))


RELOADS = {
    "delete and insert": ("DELETE FROM page", "INSERT INTO page SELECT * FROM copy"),
    "delete and insert in pieces": (
        "DELETE FROM page WHERE id % 2 = 0", "INSERT INTO page SELECT * FROM copy WHERE id % 2 = 0",
        "DELETE FROM page WHERE id % 2 = 1", "INSERT INTO page SELECT * FROM copy WHERE id % 2 = 1",
    ),
    "one statement": (
        "WITH gone AS (DELETE FROM page RETURNING *) INSERT INTO page SELECT * FROM gone",
    ),
    "merge": (
        "DELETE FROM page",
        "MERGE INTO page AS p USING copy AS c ON p.id = c.id WHEN NOT MATCHED THEN INSERT VALUES (c.id, c.body)",
    ),
    "upsert": ("DELETE FROM page", "INSERT INTO page SELECT * FROM copy ON CONFLICT (id) DO UPDATE SET body = 'never'"),
    "truncate": ("TRUNCATE page", "INSERT INTO page SELECT * FROM copy"),
}  # fmt: skip


@pytest.mark.parametrize("statements", RELOADS.values(), ids=RELOADS)
def test_a_reload_pays_for_nothing_and_search_is_not_empty_for_a_moment(
    paid: psycopg.Connection, stub: StubProvider, statements: tuple[str, ...]
) -> None:
    paid.execute("CREATE TABLE copy AS TABLE page")
    before = shown(paid)
    with paid.transaction():
        for statement in statements:
            paid.execute(statement.encode())
        assert shown(paid) == before
    assert shown(paid) == before
    settle(paid)
    assert stub.texts_seen() == {}
    assert shown(paid) == before
    assert data_count(paid, "hidden") == data_count(paid, "deleted") == 0


@pytest.mark.parametrize("expression", ["-id + 1000", "-id + 1", "-id - 1", "id + 61"])
def test_a_key_move_pays_for_nothing_and_shows_no_foreign_chunk(
    paid: psycopg.Connection, stub: StubProvider, expression: str
) -> None:
    texts = sorted(chunk for _, chunk in shown(paid))
    move_keys(paid, expression)
    assert scalar(paid, OWN) == 0
    settle(paid)
    assert scalar(paid, OWN) == 0
    assert sorted(chunk for _, chunk in shown(paid)) == texts
    assert stub.texts_seen() == {}
    assert data_count(paid, "chunk") == data_count(paid, "document") == ROWS
    assert data_count(paid, "hidden") == data_count(paid, "deleted") == 0


@pytest.mark.parametrize("move", ["id + 1000", "id * 7 % 61 + 1000"])
def test_keys_that_change_places_pay_for_nothing_though_batches_are_small(
    paid: psycopg.Connection, stub: StubProvider, move: str
) -> None:
    """Each batch replaces chunks whose texts later batches ask for."""
    paid.execute("SELECT embedline.configure('max_rows', 5), embedline.configure('min_rows', 1)")
    with paid.transaction():
        paid.execute(sql.SQL("UPDATE page SET id = {}").format(sql.SQL(move)))
        paid.execute("UPDATE page SET id = id - 999")
    assert scalar(paid, OWN) == 0
    work_until_idle(paid, count=2)
    assert scalar(paid, OWN) == 0
    assert len(shown(paid)) == ROWS
    assert stub.texts_seen() == {}
    assert [data_count(paid, suffix) for suffix in ("hidden", "deleted", "lent")] == [0, 0, 0]


def test_a_reload_with_other_keys_by_several_workers_pays_for_nothing(
    paid: psycopg.Connection, stub: StubProvider
) -> None:
    paid.execute("CREATE TABLE copy AS TABLE page")
    paid.execute("SELECT embedline.configure('max_rows', 10), embedline.configure('min_rows', 1)")
    workers = [Worker(dsn_of(paid)) for _ in range(3)]
    with paid.transaction():
        paid.execute("DELETE FROM page")
        paid.execute("INSERT INTO page SELECT id + 500, body FROM copy ORDER BY md5(id::text)")
    for worker in workers:
        worker.stop(paid)
    work_until_idle(paid)
    assert scalar(paid, "SELECT count(*) FROM page_embedding WHERE id > 500") == ROWS
    assert stub.texts_seen() == {}


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("same_transaction", [True, False])
def test_the_chunk_of_a_deleted_row_is_never_shown_with_a_new_row_of_its_key(
    paid: psycopg.Connection, connect: Connect, isolation: str, same_transaction: bool
) -> None:
    application = connect(autocommit=False)
    application.execute(f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {isolation}".encode())
    application.execute("DELETE FROM page WHERE id <= 3")
    if not same_transaction:
        application.commit()
    application.execute("INSERT INTO page VALUES (1, 'new row'), (2, 'other row')")
    query = "SELECT count(*) FROM page_embedding WHERE id <= 3"
    assert scalar(application, query) == 0
    application.commit()
    assert scalar(paid, query) == 0
    assert not {"1", "2", "3"} & {key for key, _, _ in searching(paid, "page", "row", ROWS)}
    settle(paid)
    assert scalar(paid, query) == 2
    assert scalar(paid, OWN) == 0
    assert data_count(paid, "hidden") == 0


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_older_than_the_deletion_does_not_bring_its_chunk_back(
    paid: psycopg.Connection, connect: Connect, isolation: str
) -> None:
    """The insert sees neither the deletion nor what a worker wrote of the row before it."""
    application = connect(autocommit=False)
    application.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
    application.execute("SELECT count(*) FROM page WHERE id = 1000")
    paid.execute("INSERT INTO page VALUES (1000, 'first row')")
    settle(paid)
    paid.execute("DELETE FROM page WHERE id = 1000")
    application.execute("INSERT INTO page VALUES (1000, 'second row')")
    application.commit()
    assert scalar(paid, "SELECT count(*) FROM page_embedding WHERE id = 1000") == 0
    settle(paid)
    assert paid.execute("SELECT chunk FROM page_embedding WHERE id = 1000").fetchall() == [("second row",)]


def test_an_unchanged_row_inserted_with_an_old_snapshot_is_shown_after_a_workers_pass(
    paid: psycopg.Connection, stub: StubProvider, connect: Connect
) -> None:
    application = connect(autocommit=False)
    application.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    application.execute("CREATE TABLE copy AS TABLE page")
    application.execute("DELETE FROM page")
    application.execute("INSERT INTO page SELECT * FROM copy")
    application.commit()
    settle(paid)
    assert len(shown(paid)) == ROWS
    assert stub.texts_seen() == {}
    assert data_count(paid, "hidden") == 0


def test_a_row_that_changes_within_a_reload_is_hidden_alone_and_paid_for_alone(
    paid: psycopg.Connection, stub: StubProvider
) -> None:
    paid.execute("CREATE TABLE copy AS TABLE page")
    paid.execute("UPDATE copy SET body = 'another text' WHERE id = 7")
    with paid.transaction():
        paid.execute("DELETE FROM page")
        paid.execute("INSERT INTO page SELECT * FROM copy")
    assert {key for key, _ in shown(paid)} == set(range(1, ROWS + 1)) - {7}
    settle(paid)
    assert len(shown(paid)) == ROWS
    assert scalar(paid, OWN) == 0
    assert len(stub.texts_seen()) == 1


def test_a_savepoint_takes_the_mark_with_it(paid: psycopg.Connection) -> None:
    before = shown(paid)
    with paid.transaction():
        with paid.transaction(force_rollback=True):
            paid.execute("DELETE FROM page WHERE id = 1")
            paid.execute("INSERT INTO page VALUES (1, 'not kept')")
            assert len(shown(paid)) == ROWS - 1
        assert shown(paid) == before
    assert shown(paid) == before


def test_a_claim_in_flight_does_not_bring_the_old_row_back(paid: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(latency=1.0, remember=True)
    try:
        with Worker(dsn_of(paid)):
            paid.execute("UPDATE page SET body = 'the old row, edited' WHERE id = 1")
            while not stub.in_flight():
                pass
            with paid.transaction():
                paid.execute("DELETE FROM page WHERE id = 1")
                paid.execute("INSERT INTO page VALUES (1, 'the new row')")
            while queued(paid):
                assert {chunk for key, chunk in shown(paid) if key == 1} <= {"the new row"}
    finally:
        stub.behave(remember=True)
    assert scalar(paid, OWN) == 0
    assert len(shown(paid)) == ROWS


def test_the_application_waits_for_no_worker_that_removes_its_rows(paid: psycopg.Connection, connect: Connect) -> None:
    paid.execute("DELETE FROM page WHERE id <= 10")
    worker = connect(autocommit=False)
    worker.execute("SELECT embed_pending(100)")
    application = connect()
    application.execute("SET lock_timeout = '1s'")
    application.execute("INSERT INTO page SELECT n, 'row again ' || n FROM generate_series(1, 10) AS n")
    application.execute("DELETE FROM page WHERE id = 1")
    application.execute("UPDATE page SET id = 1 WHERE id = 2")
    worker.commit()
    settle(paid)
    assert scalar(paid, OWN) == 0
    assert len(shown(paid)) == ROWS - 1


def test_a_moved_row_that_an_application_has_locked_finds_its_vector_later(
    paid: psycopg.Connection, stub: StubProvider, connect: Connect
) -> None:
    paid.execute("UPDATE page SET id = 1001 WHERE id = 1")
    application = connect(autocommit=False)
    application.execute("SELECT FROM page WHERE id = 1001 FOR UPDATE")
    paid.execute("SELECT embed_pending(100)")
    assert data_count(paid, "deleted") == 1
    application.rollback()
    settle(paid)
    assert stub.texts_seen() == {}
    assert data_count(paid, "chunk") == ROWS


def test_what_deleted_rows_leave_goes_in_the_end_though_the_provider_is_away(paid: psycopg.Connection) -> None:
    paid.execute("UPDATE page SET body = body || ' edited' WHERE id = 2")
    paid.execute("DELETE FROM page WHERE id = 1")
    paid.execute(
        "INSERT INTO embedline.circuit SELECT model_id, 1, now() + interval '1 hour', 'away' FROM embedline.model"
        " WHERE name = 'stub'"
    )
    paid.execute("SELECT embed_pending(100)")
    assert data_count(paid, "chunk") == ROWS
    paid.execute(f"UPDATE {PAGE('deleted')} SET enqueued_at = enqueued_at - interval '11 minutes'")
    paid.execute("SELECT embed_pending(100)")
    assert data_count(paid, "chunk") == ROWS - 1


def test_no_write_waits_for_a_version_that_is_being_added(
    paid: psycopg.Connection, stub: StubProvider, connect: Connect
) -> None:
    paid.execute("SELECT embedline.create_model('second', 'openai', 'second', base_url => %s)", (stub.url,))
    operator = connect(autocommit=False)
    operator.execute("SELECT embedline.add_embedding_version('page', 'second', index_method => 'none')")
    application = connect()
    application.execute("SET lock_timeout = '2s'")
    application.execute("DELETE FROM page WHERE id = 1")
    application.execute("INSERT INTO page VALUES (1, 'another row')")
    application.execute("UPDATE page SET id = 1002 WHERE id = 2")
    operator.commit()


def test_a_partitioned_source_hides_and_lends_as_well(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text) PARTITION BY RANGE (id)")
    for number in range(2):
        database.execute(
            f"CREATE TABLE page_{number} PARTITION OF page FOR VALUES FROM ({number * 100}) TO ({number * 100 + 100})".encode()
        )
    database.execute("INSERT INTO page SELECT n, 'Body ' || n FROM generate_series(1, 20) AS n")
    create_pipeline(database, content="body")
    settle(database)
    before = shown(database)
    database.execute("CREATE TABLE copy AS TABLE page")
    with database.transaction():
        database.execute("DELETE FROM page")
        database.execute("INSERT INTO page SELECT * FROM copy")
    assert shown(database) == before
    with database.transaction():
        database.execute("DELETE FROM page WHERE id = 5")
        database.execute("INSERT INTO page_0 VALUES (5, 'other text')")
    assert {key for key, _ in shown(database)} == set(range(1, 21)) - {5}
    database.execute("UPDATE page SET id = id + 100 WHERE id <= 10")
    settle(database)
    assert scalar(database, OWN) == 0
    assert_exact(database)


def test_a_version_beside_the_serving_one_takes_its_vectors_along(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute("SELECT embedline.create_model('second', 'openai', 'second', base_url => %s)", (stub.url,))
    paid.execute("SELECT embedline.add_embedding_version('page', 'second', index_method => 'none')")
    settle(paid)
    work_until_idle(paid)
    stub.forget()
    paid.execute("UPDATE page SET id = id + 1000")
    work_until_idle(paid)
    assert stub.texts_seen() == {}
    assert data_count(paid, "v1") == data_count(paid, "v2") == data_count(paid, "chunk") == ROWS


def test_verify_takes_a_waiting_delete_for_no_orphan_and_finds_a_mark_without_a_change(
    database: psycopg.Connection,
) -> None:
    create_pages(database, 10)
    create_pipeline(database)
    settle(database)
    database.execute("DELETE FROM page WHERE id = 1")
    assert database.execute("SELECT * FROM embedline.verify('page', sample => 0)").fetchall() == []
    settle(database)
    database.execute(f"INSERT INTO {PAGE('hidden')} VALUES (2)")
    found = database.execute(
        "SELECT finding, count FROM embedline.verify('page', repair => true, sample => 0)"
    ).fetchall()
    assert found == [("hidden", 1)]
    settle(database)
    assert database.execute("SELECT * FROM embedline.verify('page', sample => 0)").fetchall() == []
    assert len(shown(database)) == 9
