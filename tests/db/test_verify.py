"""What triggers could not see, and what was damaged: verify finds it, and repair puts it right."""

from __future__ import annotations

import json
import threading
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from conftest import Connect
from generated_names import PAGE, Generated
from support import (
    assert_exact,
    create_pages,
    create_pipeline,
    data_count,
    drain,
    queued,
    scalar,
    settle,
    take_inbox,
    wait_until,
)

Found = dict[str, tuple[int | None, int]]


def verify(connection: psycopg.Connection, pipeline: str = "page", repair: bool = False, sample: int = 0) -> Found:
    """Return {finding: (count, repaired)} of embedline.verify."""
    rows = connection.execute("SELECT * FROM embedline.verify(%s, %s, %s)", (pipeline, repair, sample))
    return {finding: (count, repaired) for finding, count, repaired, _ in rows}


def example(connection: psycopg.Connection, finding: str, sample: int = 0) -> Any:
    """Return the example of one finding."""
    query = "SELECT example FROM embedline.verify('page', sample => %s) WHERE finding = %s"
    return scalar(connection, query, (sample, finding))


def unseen(connection: psycopg.Connection, *statements: str) -> None:
    """Run statements that fire no trigger, as a load with session_replication_role = replica does."""
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        for statement in statements:
            connection.execute(statement)


def repair_and_settle(connection: psycopg.Connection, pipeline: str = "page") -> None:
    """Repair, embed what was queued, and assert that nothing is amiss any more."""
    verify(connection, pipeline, repair=True)
    settle(connection)
    assert verify(connection, pipeline) == {}


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    create_pages(database, 30)
    create_pipeline(database)
    settle(database)
    return database


def test_a_pipeline_in_order_has_no_finding(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET body = 'embedded' WHERE id = 1")
    settle(pages)
    assert verify(pages, sample=20) == {}
    assert verify(pages, repair=True, sample=20) == {}
    assert queued(pages) == 0


def test_what_is_queued_or_in_a_workers_hands_is_no_finding(pages: psycopg.Connection, connect: Connect) -> None:
    pages.execute("UPDATE page SET body = 'new' WHERE id <= 3")
    pages.execute("INSERT INTO page (id, title, body) VALUES (100, 'New', 'row')")
    assert verify(pages) == {}
    take_inbox(pages)
    assert verify(pages) == {}
    pages.execute(f"UPDATE {PAGE('outbox')} SET claimed_by = 1")
    assert verify(pages, repair=True) == {}


def test_rows_of_a_load_in_replica_mode_are_missing_stale_and_orphaned(pages: psycopg.Connection) -> None:
    unseen(
        pages,
        "INSERT INTO page (id, title, body) VALUES (100, 'Loaded', 'by a replica'), (101, 'Loaded', 'too')",
        "UPDATE page SET body = 'unseen' WHERE id IN (1, 2, 3)",
        "DELETE FROM page WHERE id IN (10, 11, 12, 13)",
    )
    assert verify(pages) == {"missing": (2, 0), "stale": (3, 0), "orphaned": (4, 0)}
    assert example(pages, "missing")["id"] in ("100", "101")
    assert queued(pages) == 0
    assert verify(pages, repair=True) == {"missing": (2, 2), "stale": (3, 3), "orphaned": (4, 4)}
    # What no row asks for is gone at once; the rest waits for a worker.
    assert data_count(pages, "document") == data_count(pages, "v1") == 26
    assert queued(pages) == 5
    assert verify(pages) == {}
    settle(pages)
    assert assert_exact(pages) == 28


def test_an_update_that_no_trigger_saw_is_stale_and_the_trigger_is_named(pages: psycopg.Connection) -> None:
    pages.execute("ALTER TABLE page DISABLE TRIGGER embedline_page_update")
    pages.execute("UPDATE page SET body = 'unseen' WHERE id = 7")
    assert verify(pages) == {"capture_off": (1, 0), "stale": (1, 0)}
    hint = example(pages, "capture_off")["hint"]
    assert hint == "ALTER TABLE public.page ENABLE TRIGGER embedline_page_update;"
    pages.execute(hint.encode())
    repair_and_settle(pages)
    assert_exact(pages)


@pytest.mark.parametrize("switch", ["DISABLE TRIGGER", "ENABLE TRIGGER", "ENABLE REPLICA TRIGGER"])
def test_a_trigger_that_must_always_fire_is_made_to_by_the_hint(database: psycopg.Connection, switch: str) -> None:
    create_pages(database, 5)
    create_pipeline(database, capture="row")
    settle(database)
    assert verify(database) == {}
    database.execute(f"ALTER TABLE page {switch} embedline_page_insert")
    query = "SELECT count, example ->> 'hint' FROM embedline.verify('page') WHERE finding = 'capture_off'"
    count, hint = database.execute(query).fetchall()[0]
    assert count == 1
    database.execute(hint)
    assert verify(database) == {}
    enabled = "SELECT array_agg(DISTINCT tgenabled::text) FROM pg_trigger WHERE tgname ~ '^embedline_page_'"
    assert scalar(database, enabled) == ["A"]
    # Nor does a refresh that makes the update trigger anew lose it.
    database.execute("CREATE FUNCTION same() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    database.execute("CREATE TRIGGER same BEFORE UPDATE ON page FOR EACH ROW EXECUTE FUNCTION same()")
    database.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(database, enabled) == ["A"]


def test_a_truncated_partition_leaves_orphans_that_a_repair_removes(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE part (id integer PRIMARY KEY, body text) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (1) TO (50)")
    database.execute("CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM (50) TO (100)")
    database.execute("INSERT INTO part SELECT n, 'Number ' || n FROM generate_series(1, 99) AS n")
    create_pipeline(database, "part", "part", "body")
    settle(database)
    database.execute("TRUNCATE part_2")
    assert verify(database, "part") == {"orphaned": (50, 0)}
    assert verify(database, "part", repair=True) == {"orphaned": (50, 50)}
    assert assert_exact(database, "part") == 49


def test_rows_of_an_attached_partition_are_missing(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE part (id integer PRIMARY KEY, body text) PARTITION BY RANGE (id)")
    create_pipeline(database, "part", "part", "body")
    settle(database)
    database.execute("CREATE TABLE part_1 (id integer PRIMARY KEY, body text)")
    database.execute("INSERT INTO part_1 SELECT n, 'Number ' || n FROM generate_series(1, 20) AS n")
    database.execute("ALTER TABLE part ATTACH PARTITION part_1 FOR VALUES FROM (1) TO (50)")
    assert verify(database, "part") == {"missing": (20, 0)}
    repair_and_settle(database, "part")
    assert assert_exact(database, "part") == 20


def test_rows_that_the_filter_refuses_by_now_are_taken_out(database: psycopg.Connection) -> None:
    create_pages(database, 10)
    create_pipeline(database, filter="views = 0")
    settle(database)
    unseen(database, "UPDATE page SET views = 1 WHERE id <= 4")
    assert verify(database) == {"filtered_out": (4, 0)}
    repair_and_settle(database)
    assert assert_exact(database) == 6
    unseen(database, "UPDATE page SET views = 0 WHERE id <= 2")
    assert verify(database) == {"missing": (2, 0)}
    repair_and_settle(database)
    assert assert_exact(database) == 8


def test_what_the_backfill_has_still_to_read_is_pending(database: psycopg.Connection) -> None:
    create_pages(database, 50)
    create_pipeline(database)
    assert verify(database, repair=True) == {"pending": (50, 0)}
    assert queued(database) == 0
    drain(database, max_rows=20)
    settle(database)
    assert verify(database) == {}


def test_a_row_whose_expression_raises_does_not_end_the_audit(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database, content="(100 / views)::text || body", filter="10 / (views - 1) IS NOT NULL")
    database.execute("UPDATE page SET views = id + 1")
    settle(database)
    # Seen by no trigger: the content of one row raises now, the filter of another.
    unseen(database, "UPDATE page SET views = 0 WHERE id = 1", "UPDATE page SET views = 1 WHERE id = 2")
    assert verify(database) == {"stale": (2, 0)}
    repair_and_settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 2
    # Dead, and still raising: no sweep tries them again.
    assert verify(database, repair=True) == {}
    # The content is another by now, which nobody saw: worth another try.
    unseen(database, "UPDATE page SET views = 5 WHERE id <= 2")
    assert verify(database) == {}


def test_a_dead_row_is_tried_again_only_where_its_content_is_another(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    database.execute("UPDATE page SET title = U&'\\200B', body = U&'\\200B' WHERE id = 3")
    create_pipeline(database, content="title || body")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 1
    assert verify(database, repair=True) == {}
    assert queued(database) == 0
    unseen(database, "UPDATE page SET body = 'readable' WHERE id = 3")
    assert verify(database) == {"stale": (1, 0)}
    repair_and_settle(database)
    assert assert_exact(database) == 5


def test_a_prefix_that_changed_unseen_is_stale(database: psycopg.Connection) -> None:
    create_pages(database, 10)
    create_pipeline(database, content="body", document_prefix="title")
    settle(database)
    assert verify(database, sample=10) == {}
    unseen(database, "UPDATE page SET title = 'Another' WHERE id <= 2", "UPDATE page SET title = NULL WHERE id = 3")
    assert verify(database) == {"stale": (3, 0)}
    assert verify(database, repair=True) == {"stale": (3, 3)}


def test_rows_without_content_are_in_order(database: psycopg.Connection) -> None:
    create_pages(database, 6)
    database.execute("UPDATE page SET body = NULL WHERE id <= 2")
    create_pipeline(database)
    settle(database)
    assert verify(database) == {}
    unseen(database, "UPDATE page SET body = NULL WHERE id = 3", "UPDATE page SET body = 'there' WHERE id = 1")
    assert verify(database) == {"stale": (2, 0)}
    repair_and_settle(database)
    assert_exact(database)


def test_an_outdated_recipe_is_found_and_an_unknown_one_is_left(pages: psycopg.Connection) -> None:
    pages.execute(f"UPDATE {PAGE('document')} SET recipe = NULL")
    assert verify(pages) == {}
    pages.execute(
        f"UPDATE {PAGE('document')} SET recipe = 1 WHERE key_id <= 5"
        " AND 1 <> (SELECT ('x' || left(fingerprint, 8))::bit(32)::integer FROM embedline.version)"
    )
    assert verify(pages) == {"outdated": (5, 0)}
    assert verify(pages, repair=True) == {"outdated": (5, 5)}
    assert queued(pages) == 5


@pytest.mark.parametrize(
    ("damage", "finding", "count"),
    [
        (f"DELETE FROM {PAGE.version(1)} WHERE chunk_id <= 3", "missing_vector", 3),
        (f"DELETE FROM {PAGE('chunk')} WHERE key_id <= 4", "missing_vector", 4),
        (f"UPDATE {PAGE('chunk')} SET seq = 1 WHERE key_id = 4", "missing_vector", 1),
        (f"DELETE FROM {PAGE('document')} WHERE key_id <= 2", "missing", 2),
        (f"UPDATE {PAGE('document')} SET state = 'empty' WHERE key_id <= 2", "orphaned", 2),
        (f"UPDATE {PAGE.version(1)} SET embedding_v1 = embedding_v1 * array_fill(3, ARRAY[256])::vector"
         " WHERE chunk_id <= 5", "unnormalised", 5),
        (f"UPDATE {PAGE.version(1)} SET embedding_v1 = array_fill(0, ARRAY[256])::vector WHERE chunk_id <= 2",
         "unnormalised", 2),
    ],
)  # fmt: skip
def test_damage_to_what_is_stored_is_found_and_repaired(
    pages: psycopg.Connection, damage: str, finding: str, count: int
) -> None:
    pages.execute(damage.encode())
    assert verify(pages)[finding] == (count, 0)
    assert verify(pages, repair=True)[finding] == (count, count)
    settle(pages)
    assert assert_exact(pages) == 30
    assert verify(pages) == {}


def test_vectors_and_chunks_of_nothing_are_removed(pages: psycopg.Connection) -> None:
    pages.execute("SET session_replication_role = replica")
    pages.execute(f"DELETE FROM {PAGE('chunk')} WHERE key_id <= 3")
    pages.execute(f"DELETE FROM {PAGE('document')} WHERE key_id <= 5")
    pages.execute("DELETE FROM page WHERE id <= 5")
    pages.execute("RESET session_replication_role")
    # Three vectors without a chunk; two chunks that no document has.
    assert verify(pages) == {"orphaned": (5, 0)}
    repair_and_settle(pages)
    assert assert_exact(pages) == 25


def test_halfvec_and_unnormalised_distances_are_in_order(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database, "half", column_type="halfvec")
    create_pipeline(database, "far", distance="l2")
    settle(database)
    assert verify(database, "half", sample=20) == verify(database, "far", sample=20) == {}
    database.execute(
        f"UPDATE {Generated('half').version(1)} SET embedding_v1 = embedding_v1 * array_fill(2, ARRAY[256])::halfvec"
    )
    assert verify(database, "half", repair=True) == {"unnormalised": (20, 20)}
    assert assert_exact(database, "half") == 20
    database.execute(
        f"UPDATE {Generated('far').version(1)} SET embedding_v1 = array_fill(0, ARRAY[256])::vector WHERE chunk_id < 3"
    )
    assert verify(database, "far", repair=True)["unnormalised"] == (2, 2)
    settle(database)
    assert verify(database, "far") == {}


def test_keys_of_several_columns_and_odd_names(database: psycopg.Connection) -> None:
    database.execute(
        'CREATE TABLE "Odd" ("the ""key""" text COLLATE "C", at timestamptz, n numeric, body text,'
        ' PRIMARY KEY ("the ""key""", at, n))'
    )
    database.execute(
        "INSERT INTO \"Odd\" SELECT 'a,''b' || n, '2024-01-01'::timestamptz + n * interval '1 hour', n / 10.0, 'Text ' || n"
        " FROM generate_series(1, 20) AS n"
    )
    create_pipeline(database, "odd", '"Odd"', "body")
    settle(database)
    unseen(database, 'DELETE FROM "Odd" WHERE n < 0.35', "UPDATE \"Odd\" SET body = 'other' WHERE n > 1.8")
    assert verify(database, "odd") == {"orphaned": (3, 0), "stale": (2, 0)}
    database.execute("SET datestyle = 'SQL, DMY'")
    repair_and_settle(database, "odd")
    assert assert_exact(database, "odd") == 17


def test_many_rows_are_left_to_a_new_pass_of_the_backfill(database: psycopg.Connection) -> None:
    create_pages(database, 10)
    create_pipeline(database)
    settle(database)
    unseen(
        database,
        "INSERT INTO page (id, title, body) SELECT n, 'Loaded ' || n % 7, 'text' FROM generate_series(100, 10110) AS n",
    )
    assert verify(database, repair=True) == {"missing": (10_011, 10_011)}
    # Live changes do not wait behind ten thousand others.
    assert queued(database) == 0
    assert scalar(database, "SELECT NOT backfill_complete AND backfill_done < backfill_total FROM embedline.status")
    assert verify(database, repair=True) == {"pending": (10_011, 0)}


def test_a_table_of_vectors_that_is_gone_is_left_to_a_new_pass_of_the_backfill(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE word (id integer PRIMARY KEY, body text)")
    create_pipeline(database, "word", "word", "body")
    settle(database)
    database.execute("INSERT INTO word SELECT n, 'Number ' || n % 5 FROM generate_series(1, 10001) AS n")
    settle(database, 60)
    database.execute(f"TRUNCATE {Generated('word').version(1)}")
    assert verify(database, "word", repair=True) == {"missing_vector": (10_001, 10_001)}
    assert queued(database, "word") == 0
    assert scalar(database, "SELECT NOT backfill_complete FROM embedline.status")


def test_bad_arguments_say_what_to_do(pages: psycopg.Connection) -> None:
    with pytest.raises(errors.UndefinedObject, match="no pipeline") as unknown:
        verify(pages, "nothing")
    assert "embedline.status" in str(unknown.value.diag.message_hint)
    with pytest.raises(errors.InvalidParameterValue, match="sample must be between") as caught:
        verify(pages, sample=-1)
    assert "sample => 0" in str(caught.value.diag.message_hint)
    pages.execute("DROP TABLE page CASCADE")
    with pytest.raises(errors.UndefinedObject, match="source of pipeline") as gone:
        verify(pages)
    assert "drop_pipeline" in str(gone.value.diag.message_hint)


def test_every_run_is_noted(pages: psycopg.Connection) -> None:
    unseen(pages, "DELETE FROM page WHERE id = 1")
    verify(pages)
    verify(pages, repair=True)
    rows = pages.execute(
        "SELECT repair, finding_count, repaired_count, findings -> 0 ->> 'name', error FROM embedline.verification"
        " ORDER BY verification_id"
    ).fetchall()
    assert rows == [(False, 1, 0, "orphaned", None), (True, 1, 1, "orphaned", None)]


# A model that changed behind its name


class Provider:
    """An endpoint whose model a test can replace."""

    def __init__(self, server: HTTPServer) -> None:
        self.shift = 0
        self.texts: list[str] = []
        self.status = 200
        self.asked, self.answering = threading.Event(), threading.Event()
        self.answering.set()
        self.url = server.url_for("/v1")
        server.expect_request("/v1/embeddings").respond_with_handler(self._handle)

    def _handle(self, request: Request) -> Response:
        texts = request.get_json()["input"]
        self.asked.set()
        self.answering.wait(30)
        if self.status != 200:
            return Response("down", status=self.status)
        self.texts += texts
        data = [{"object": "embedding", "index": n, "embedding": self.vector(text)} for n, text in enumerate(texts)]
        body = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        return Response(json.dumps(body), content_type="application/json")

    def vector(self, text: str) -> list[float]:
        vector = [0.05 * (1 + sum(text.encode()) % (n + 2)) for n in range(8)]
        vector[self.shift] += 10.0
        return vector


@pytest.fixture
def provider(httpserver: HTTPServer) -> Provider:
    return Provider(httpserver)


@pytest.fixture
def remote(database: psycopg.Connection, provider: Provider) -> psycopg.Connection:
    """30 pages embedded by a model behind HTTP."""
    database.execute("SELECT embedline.create_model('http', 'openai', 'm', base_url => %s)", (provider.url,))
    create_pages(database, 30)
    create_pipeline(database, model="http")
    settle(database)
    provider.texts.clear()
    return database


def test_a_sample_keeps_to_the_budget(remote: psycopg.Connection, provider: Provider) -> None:
    remote.execute("SELECT embedline.set_budget(model => 'http', period => 'day', tokens => 1)")
    assert verify(remote, sample=5) == {"foreign": (None, 0)}
    assert provider.texts == []


def test_without_a_sample_the_model_is_not_asked(remote: psycopg.Connection, provider: Provider) -> None:
    assert verify(remote, repair=True) == {}
    assert provider.texts == []


def test_a_sample_asks_for_no_more_than_it_names(remote: psycopg.Connection, provider: Provider) -> None:
    assert verify(remote, sample=5) == {}
    # The probe, and at most five texts: random picks may coincide.
    assert 2 <= len(provider.texts) <= 6


def test_another_model_behind_the_name_is_foreign(remote: psycopg.Connection, provider: Provider) -> None:
    provider.shift = 1
    found = verify(remote, sample=20)
    assert set(found) == {"foreign"}
    assert found["foreign"][0] and found["foreign"][0] >= 5
    shown = example(remote, "foreign", sample=20)
    assert shown["lowest_cosine"] < 0.5
    assert "repair => true" in shown["hint"]


def test_a_pipeline_of_foreign_vectors_is_left_to_the_backfill_and_stays_searchable(
    remote: psycopg.Connection, provider: Provider
) -> None:
    provider.shift = 1
    count, repaired = verify(remote, repair=True, sample=20)["foreign"]
    assert count == repaired
    assert scalar(remote, "SELECT vectors_valid_from IS NOT NULL AND state = 'backfilling' FROM embedline.version")
    assert scalar(remote, "SELECT count(*) FROM embedline.backfill_range WHERE NOT done") == 1
    assert data_count(remote, "v1") == 30
    # Known to be foreign: neither asked for again nor begun anew the next night.
    provider.texts.clear()
    since = scalar(remote, "SELECT vectors_valid_from FROM embedline.version")
    assert verify(remote, repair=True, sample=20) == {"pending": (30, 0)}
    assert provider.texts == []
    assert scalar(remote, "SELECT vectors_valid_from FROM embedline.version") == since


def test_single_foreign_vectors_are_replaced_at_once(remote: psycopg.Connection, provider: Provider) -> None:
    remote.execute(
        f"UPDATE {PAGE.version(1)} SET embedding_v1 = '[0,0,0,0,0,0,0,1]' WHERE chunk_id IN (SELECT chunk_id"
        f" FROM {PAGE('chunk')} WHERE key_id IN (3, 4))"
    )
    count, repaired = verify(remote, repair=True, sample=1000)["foreign"]
    assert (count, repaired) == (2, 2)
    assert verify(remote, sample=1000) == {}
    assert scalar(remote, "SELECT vectors_valid_from IS NULL FROM embedline.version")
    assert queued(remote) == 0


def test_a_provider_that_is_down_leaves_the_other_checks_standing(
    remote: psycopg.Connection, provider: Provider
) -> None:
    provider.status = 401
    unseen(remote, "DELETE FROM page WHERE id = 1")
    assert verify(remote, repair=True, sample=5) == {"orphaned": (1, 1), "foreign": (None, 0)}
    assert "not_checked" in example(remote, "foreign", sample=5)


def test_a_changed_fingerprint_is_told_and_taken_over_where_the_vectors_are_the_same(
    pages: psycopg.Connection,
) -> None:
    pages.execute("UPDATE embedline.model SET fingerprint = 'another' WHERE name = 'static-256'")
    assert verify(pages, sample=5) == {"foreign": (0, 0)}
    assert len(example(pages, "foreign", sample=5)["fingerprint"]) == 64
    verify(pages, repair=True, sample=5)
    assert verify(pages, sample=5) == {}


# Beside writers


def test_a_truncate_neither_waits_for_the_model_nor_fails(
    remote: psycopg.Connection, provider: Provider, connect: Connect
) -> None:
    # Who has read chunks and then wants the source makes a deadlock with it, and the application may lose.
    application, found = connect(), []
    provider.asked.clear()
    provider.answering.clear()
    checking = threading.Thread(target=lambda: found.append(verify(remote, repair=True, sample=5)), daemon=True)
    checking.start()
    try:
        assert provider.asked.wait(20)
        application.execute("SET statement_timeout = '20s'")
        application.execute("TRUNCATE page")
    finally:
        provider.answering.set()
        checking.join(30)
    assert found == [{}]
    settle(application)
    assert data_count(application, "document") == data_count(application, "v1") == 0


def test_a_row_that_an_application_has_locked_is_not_waited_for(pages: psycopg.Connection, connect: Connect) -> None:
    unseen(
        pages,
        "DELETE FROM page WHERE id = 1",
        "UPDATE page SET body = 'x' WHERE id = 2",
        "DELETE FROM page WHERE id = 3",
    )
    pages.execute(
        f"DELETE FROM {PAGE.version(1)} AS v USING {PAGE('chunk')} AS c"
        " WHERE c.chunk_id = v.chunk_id AND c.key_id >= 20"
    )
    holder = connect(autocommit=False)
    holder.execute("SELECT FROM page FOR UPDATE")
    holder.execute(f"SELECT FROM {PAGE('document')} WHERE key_id <= 5 FOR UPDATE")
    holder.execute(f"SELECT FROM {PAGE('chunk')} FOR UPDATE")
    pages.execute("SET lock_timeout = '1s'")
    found = verify(pages, repair=True)
    assert found == {"stale": (1, 1), "missing_vector": (11, 11), "orphaned": (2, 0)}
    holder.rollback()
    pages.execute("RESET lock_timeout")
    verify(pages, repair=True)
    settle(pages)
    # The chunks that could not be removed had no vector: the next run sees to them.
    repair_and_settle(pages)
    assert_exact(pages)


def test_a_snapshot_of_before_does_not_remove_a_row_that_came_since(
    pages: psycopg.Connection, connect: Connect
) -> None:
    """A repair inside a REPEATABLE READ transaction decides by an old snapshot: it must not harm what is newer."""
    unseen(pages, "DELETE FROM page WHERE id = 5")
    old = connect(autocommit=False)
    old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT 1 FROM page LIMIT 1")
    pages.execute("INSERT INTO page (id, title, body) VALUES (5, 'Title 5', 'is back')")
    settle(pages)
    try:
        verify(old, repair=True)
        old.commit()
    except errors.SerializationFailure:
        old.rollback()
    settle(pages)
    assert verify(pages, repair=True) == {}
    assert_exact(pages)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_repairs_beside_writers_and_workers_harm_nothing(
    pages: psycopg.Connection, connect: Connect, isolation: str
) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def loop(work: Any) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failures.append(error)

    writer = connect(options=f"-c default_transaction_isolation={isolation.replace(' ', chr(92) + ' ')}")
    turn = iter(range(10**9))

    def write() -> None:
        n = next(turn) % 30 + 1
        try:
            writer.execute("UPDATE page SET body = 'Turn ' || clock_timestamp() WHERE id = %s", (n,))
            writer.execute("DELETE FROM page WHERE id = %s", (n % 30 + 1,))
            writer.execute(
                "INSERT INTO page (id, title, body) VALUES (%s, 'Title', 'back') ON CONFLICT DO NOTHING", (n % 30 + 1,)
            )
        except errors.SerializationFailure:
            pass

    worker, verifier = connect(), connect()
    threads = [
        threading.Thread(target=loop, args=(work,))
        for work in (write, lambda: drain(worker), lambda: verified.append(verify(verifier, repair=True)))
    ]
    verified: list[Found] = []
    for thread in threads:
        thread.start()
    wait_until(lambda: len(verified) >= 25 or failures, 60, "25 repairs ran")
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    # Every change was captured: nothing was ever amiss.
    assert [found for found in verified if found] == []
    settle(pages)
    assert_exact(pages)


# Rights


def test_an_administrator_verifies_a_source_that_it_may_not_read(
    pages: psycopg.Connection, connect: Connect, make_role: Any
) -> None:
    admin = connect(make_role("embedline_admin"))
    unseen(pages, "DELETE FROM page WHERE id = 1")
    assert verify(admin, repair=True) == {"orphaned": (1, 1)}
    with pytest.raises(errors.InsufficientPrivilege):
        admin.execute("SELECT * FROM page")


@pytest.mark.parametrize("membership", ["embedline_reader", "embedline_worker"])
def test_others_may_not_verify(pages: psycopg.Connection, connect: Connect, make_role: Any, membership: str) -> None:
    role = connect(make_role(membership))
    for statement in (
        "SELECT * FROM embedline.verify('page')",
        "SELECT embedline.requeue('page')",
        "SELECT embedline.purge_dead_letters()",
        "SELECT embedline.schedule_nightly()",
        "SELECT embedline._nightly_step('purge', NULL, true, NULL)",
        "CALL embedline.run_nightly()",
        "SELECT * FROM embedline.verification",
        f"SELECT * FROM {PAGE('audit')}(1, NULL)",
        f"SELECT {PAGE('digest')}('a', 'b')",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            role.execute(statement.encode())


def test_the_audit_reads_as_the_sources_owner(database: psycopg.Connection) -> None:
    create_pages(database, 1)
    create_pipeline(database)
    names = ["page_audit", "page_digest", "page_gone", "page_present"]
    rows = database.execute(
        "SELECT proname, proowner = (SELECT relowner FROM pg_class WHERE oid = 'page'::regclass),"
        " has_function_privilege('public', p.oid, 'EXECUTE') FROM pg_proc AS p WHERE proname = ANY (%s) ORDER BY 1",
        (names,),
    ).fetchall()
    assert rows == [(name, True, False) for name in names]
    database.execute("SELECT embedline.drop_pipeline('page')")
    query = sql.SQL("SELECT count(*) FROM pg_proc WHERE proname = ANY ({})").format(names)
    assert scalar(database, query) == 0
