"""Derived vectors: what they are, that they stay true, and who sees them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from generated_names import PAGE, derived
from small_models import register_static
from support import create_pages, create_pipeline, drain, scalar, wait_until
from upgrading import add_version, cut_over, settle_versions
from working import working

EVENTS = """
    CREATE TABLE event (
        event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, reader integer, page integer,
        stars double precision, read_at timestamptz NOT NULL DEFAULT '2026-01-01'
    );
    CREATE INDEX ON event (reader); CREATE INDEX ON event (page);
"""
HALF_LIFE_DAYS = 30
SMALL_DIMENSIONS = 64
WAITING = "SELECT waiting FROM embedline.derived_status"


def derive(connection: psycopg.Connection, name: str = "readers", **options: Any) -> str:
    """Create derived vectors over event."""
    given = {
        "name": name, "pipeline": "page", "events": "event", "subject": "reader", "item_key": "page", "weight": "stars",
        "at": "read_at", "half_life": f"{HALF_LIFE_DAYS} days", **options,
    }  # fmt: skip
    parameters = ", ".join(f"{key} => %({key})s" for key in given)
    return str(scalar(connection, f"SELECT embedline.create_derived({parameters})", given))


def expected(connection: psycopg.Connection, version: int = 1) -> dict[int, npt.NDArray[np.float64]]:
    """Compute the vectors in another way than the worker: event by event."""
    items: dict[int, list[npt.NDArray[np.float64]]] = {}
    chunks = connection.execute(
        f"SELECT c.key_id, v.embedding_v{version}::real[] FROM {PAGE('chunk')} AS c"
        f" JOIN {PAGE.version(version)} AS v USING (chunk_id) JOIN page AS p ON p.id = c.key_id"
    ).fetchall()
    for key, values in chunks:
        items.setdefault(key, []).append(np.array(values, dtype=np.float64))
    sums: dict[int, npt.NDArray[np.float64]] = {}
    for reader, page, stars, age in connection.execute(
        "SELECT reader, page, stars, extract(epoch FROM '2026-03-01' - read_at)::float8 / 86400 FROM event"
        " WHERE reader IS NOT NULL AND stars IS NOT NULL AND page IS NOT NULL"
    ):
        if page in items:
            sums[reader] = sums.get(reader, 0) + stars * 0.5 ** (age / HALF_LIFE_DAYS) * np.mean(items[page], axis=0)
    return {reader: total / np.linalg.norm(total) for reader, total in sums.items() if np.linalg.norm(total) > 1e-9}


def stored(connection: psycopg.Connection, view: str = "readers_derived") -> dict[int, npt.NDArray[np.float64]]:
    rows = connection.execute(f"SELECT subject, embedding::real[] FROM {view}").fetchall()
    return {subject: np.array(values, dtype=np.float64) for subject, values in rows}


def assert_true(connection: psycopg.Connection, version: int = 1) -> None:
    wanted, found = expected(connection, version), stored(connection)
    assert found.keys() == wanted.keys()
    for subject, vector in wanted.items():
        assert np.allclose(found[subject], vector, atol=1e-5), subject


@pytest.fixture
def page(database: psycopg.Connection) -> psycopg.Connection:
    """60 embedded pages, and a table of events over them."""
    create_pages(database, 60)
    create_pipeline(database, index_method="none")
    database.execute(EVENTS)
    drain(database)
    return database


def _change(connection: psycopg.Connection, chance: random.Random) -> None:
    """Write some events and items in one of many ways."""
    reader, page, stars = chance.randrange(8), chance.randrange(1, 70), chance.choice([1, 2, 5, -1, 0.5])
    statement = chance.choice(
        [
            "INSERT INTO event (reader, page, stars, read_at) SELECT %(reader)s + g %% 2, %(page)s + g, %(stars)s + g / 7.0,"
            " '2026-01-01'::timestamptz + make_interval(days => %(page)s) FROM generate_series(0, 3) AS g",
            "INSERT INTO event (reader, page, stars) VALUES (%(reader)s, %(page)s, %(stars)s), (NULL, 1, 1), (3, NULL, 1)",
            "UPDATE event SET stars = stars + 1 WHERE page = %(page)s",
            "UPDATE event SET reader = %(reader)s WHERE event_id %% 7 = 1 AND page %% 3 = 0",
            "UPDATE event SET page = %(page)s WHERE event_id %% 9 = 2",
            "DELETE FROM event WHERE reader = %(reader)s AND event_id %% 2 = 0",
            "DELETE FROM page WHERE id = %(page)s",
            "UPDATE page SET body = body || ' changed ' || %(page)s WHERE id BETWEEN %(page)s AND %(page)s + 2",
            "INSERT INTO page (id, title, body) VALUES (%(page)s, 'new', 'text of a new page ' || %(page)s)"
            " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
        ]
    )
    connection.execute(statement, {"reader": reader, "page": page, "stars": stars})


@pytest.mark.parametrize("seed", range(3))
def test_vectors_are_the_weighted_means_after_any_changes(page: psycopg.Connection, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(5):
        _change(page, chance)
    derive(page)
    for _ in range(6):
        for _ in range(chance.randrange(1, 8)):
            _change(page, chance)
        drain(page)
        assert_true(page)
    page.execute("DELETE FROM event WHERE reader < 4")
    drain(page)
    assert_true(page)
    page.execute("TRUNCATE event")
    drain(page)
    assert not stored(page)
    assert scalar(page, "SELECT subjects FROM embedline.derived_status") == 0


def test_an_old_event_counts_by_its_age_alone_and_no_age_overflows(page: psycopg.Connection) -> None:
    page.execute(
        "INSERT INTO event (reader, page, stars, read_at) VALUES (1, 1, 1, '1970-01-01'), (1, 2, 1, '1970-01-31'),"
        " (2, 1, 1, '2020-01-01'), (2, 2, 1, '2020-01-31'), (3, 5, 3, '0044-03-15 BC'), (3, 6, 3, '2400-01-01'),"
        " (4, 7, 'Infinity', now()), (5, 7, 'NaN', now()), (6, 7, 1, 'infinity'), (7, 7, 1e300, now())"
    )
    derive(page)
    drain(page)
    found = stored(page)
    # Both are a half-life apart: the direction is the same whatever the time is.
    assert np.allclose(found[1], found[2], atol=1e-6)
    items = dict(
        page.execute(
            f"SELECT c.key_id, v.embedding_v1::real[] FROM {PAGE('chunk')} AS c JOIN {PAGE.version(1)} AS v USING (chunk_id)"
        )
    )
    mean = np.array(items[1]) + 2 * np.array(items[2])
    assert np.allclose(found[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert np.allclose(found[3], items[6], atol=1e-6)
    assert found.keys() == {1, 2, 3}


def test_a_write_of_an_application_waits_for_no_worker(page: psycopg.Connection, connect: Connect) -> None:
    page.execute("INSERT INTO event (reader, page, stars) SELECT g % 5, g, 1 FROM generate_series(1, 50) AS g")
    derive(page)
    with connect(autocommit=False) as worker:
        # All rows that a worker locks are locked now, and stay so.
        drain(worker)
        assert scalar(worker, "SELECT count(*) FROM readers_derived") == 5
        with connect(options="-c lock_timeout=1") as writer:
            writer.execute(
                "INSERT INTO event (reader, page, stars) SELECT g % 9, g, 2 FROM generate_series(1, 50) AS g"
            )
            writer.execute("UPDATE event SET reader = 7 WHERE reader = 3")
            writer.execute("DELETE FROM event WHERE reader = 1")
            writer.execute("UPDATE page SET body = body || '!' WHERE id < 5")
        worker.commit()
    drain(page)
    assert_true(page)


def test_a_transaction_with_an_old_snapshot_can_write_events(page: psycopg.Connection, connect: Connect) -> None:
    page.execute("INSERT INTO event (reader, page, stars) VALUES (1, 1, 1)")
    derive(page)
    with connect(autocommit=False) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM event")
        drain(page)
        old.execute("INSERT INTO event (reader, page, stars) VALUES (1, 2, 3), (2, 2, 1)")
        old.commit()
    drain(page)
    assert_true(page)


def test_workers_keep_vectors_true_under_concurrent_writes(page: psycopg.Connection, connect: Connect) -> None:
    derive(page)
    with working(page, count=3), connect() as first, connect() as second:
        chances = random.Random(1), random.Random(2)
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.worker") == 3, what="three workers work")
        for _ in range(150):
            _change(first, chances[0])
            _change(second, chances[1])

        wait_until(lambda: is_true(page), 30, "all vectors are the means")
    assert scalar(page, "SELECT last_error FROM embedline.derived_status") is None


def is_true(connection: psycopg.Connection, version: int = 1) -> bool:
    """Return True if nothing waits and all vectors are the means."""
    if scalar(connection, "SELECT sum(pending) FROM embedline.status") or scalar(connection, WAITING):
        return False
    wanted, found = expected(connection, version), stored(connection)
    return found.keys() == wanted.keys() and all(np.allclose(found[key], wanted[key], atol=1e-5) for key in wanted)


def test_a_cutover_and_a_rollback_under_writes_keep_vectors_true(page: psycopg.Connection, connect: Connect) -> None:
    page.execute(
        "INSERT INTO event (reader, page, stars) SELECT g % 50, 1 + g % 60, 1 + g % 5 FROM generate_series(1, 400) AS g"
    )
    derive(page)
    drain(page)
    chance = random.Random(3)

    def cut() -> bool:
        for _ in range(3):
            _change(page, chance)
        try:
            cut_over(page, number)
        except errors.ObjectNotInPrerequisiteState:
            return False
        return True

    with working(page, count=2):
        number = add_version(page, register_static(page, SMALL_DIMENSIONS))
        wait_until(cut, 40, "the version serves")
        # No reader lacks a vector at any time, whatever waits.
        assert len(stored(page)) >= 40
        for _ in range(20):
            _change(page, chance)
        wait_until(lambda: is_true(page, number), 30, "all vectors are the means of the new version")
        page.execute("SELECT embedline.rollback('page')")
        assert len(stored(page)) >= 40
        wait_until(lambda: is_true(page, 1), 30, "all vectors are the means of the old version")


def test_a_reader_sees_subjects_of_events_that_it_may_read(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    page.execute("INSERT INTO event (reader, page, stars) SELECT g % 4, g, 1 FROM generate_series(1, 40) AS g")
    derive(page)
    drain(page)
    reader = make_role("embedline_reader")
    with connect(reader) as stranger, pytest.raises(errors.InsufficientPrivilege):
        stored(stranger)
    page.execute(
        "CREATE FUNCTION leak(vector) RETURNS boolean LANGUAGE plpgsql COST 0.0001"
        " AS 'BEGIN RAISE NOTICE ''told''; RETURN true; END'"
    )
    page.execute(f"GRANT SELECT ON page, event TO {reader}")
    page.execute("ALTER TABLE event ENABLE ROW LEVEL SECURITY; ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    page.execute(f"CREATE POLICY mine ON event TO {reader} USING (reader = 2)")
    page.execute(f"CREATE POLICY fifth ON page TO {reader} USING (id % 5 = 0)")
    page.execute("INSERT INTO event (reader, page, stars) VALUES (3, 9, 1)")
    drain(page)
    with connect(reader) as caller:
        assert stored(caller).keys() == {2}
        assert {int(row[0]) % 5 for row in nearest(caller, 2, 8)} == {0}
        assert not nearest(caller, 3, 8)
        told: list[str] = []
        caller.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
        caller.execute("SET enable_nestloop = off")
        caller.execute("SELECT count(*) FROM readers_derived WHERE leak(embedding)")
        assert len(told) == 1
    # What workers compute knows all events.
    assert_true(page)


def nearest(connection: psycopg.Connection, subject: object, k: int, **options: Any) -> list[tuple[Any, ...]]:
    named = "".join(f", {option} => %s" for option in options)
    query = f"SELECT * FROM embedline.search_derived('readers', %s, %s{named})"
    return connection.execute(query, (str(subject), k, *options.values())).fetchall()


def test_a_search_ranks_as_the_vector_does_and_leaves_out_what_was_seen(page: psycopg.Connection) -> None:
    page.execute(
        "INSERT INTO event (reader, page, stars) SELECT 1, g, 1 FROM generate_series(1, 40) AS g WHERE g % 7 IN (0, 1)"
    )
    derive(page)
    drain(page)
    vector = stored(page)[1]
    ranked = [
        str(row[0])
        for row in page.execute(
            f"SELECT c.key_id FROM {PAGE('chunk')} AS c JOIN {PAGE.version(1)} AS v USING (chunk_id)"
            " ORDER BY v.embedding_v1 <=> %s::vector, c.key_id::text",
            (str(vector.tolist()),),
        )
    ]
    found = nearest(page, 1, 5)
    assert [row[0] for row in found] == ranked[:5]
    assert found[0][2] == pytest.approx(1.0, abs=0.5)
    assert "Body number" in found[0][1]
    seen = {str(row[0]) for row in page.execute("SELECT page FROM event")}
    assert [row[0] for row in nearest(page, 1, 20, leave_out_seen=True)] == [key for key in ranked if key not in seen][
        :20
    ]
    assert not nearest(page, 99, 5)
    joined = page.execute(
        "SELECT e.reader, count(*) FROM event AS e JOIN readers_derived AS d ON d.subject = e.reader GROUP BY e.reader"
    ).fetchall()
    assert joined == [(1, scalar(page, "SELECT event_count FROM readers_derived"))]


def test_vectors_go_over_with_their_pipeline_and_back(page: psycopg.Connection) -> None:
    page.execute("INSERT INTO event (reader, page, stars) SELECT g % 6, g, g FROM generate_series(1, 60) AS g")
    derive(page)
    drain(page)
    number = add_version(page, register_static(page, SMALL_DIMENSIONS))
    assert_true(page)
    settle_versions(page)
    page.execute("INSERT INTO event (reader, page, stars) VALUES (17, 4, 1)")
    cut_over(page, number)
    drain(page)
    assert len(stored(page)[17]) == SMALL_DIMENSIONS
    assert_true(page, number)
    assert nearest(page, 17, 1)[0][0] == "4"
    page.execute("DELETE FROM event WHERE reader = 17; UPDATE page SET body = 'other words entirely' WHERE id = 3")
    drain(page)
    assert_true(page, number)
    page.execute("SELECT embedline.rollback('page')")
    drain(page)
    assert_true(page, 1)
    page.execute("SELECT embedline.drop_embedding_version('page', 2, rollback_window => '0')")
    page.execute("INSERT INTO event (reader, page, stars) VALUES (18, 4, 1)")
    drain(page)
    assert_true(page, 1)


def test_a_version_with_other_chunks_has_derived_vectors(page: psycopg.Connection) -> None:
    page.execute("INSERT INTO event (reader, page, stars) SELECT g % 6, g, g FROM generate_series(1, 60) AS g")
    derive(page)
    drain(page)
    number = add_version(page, "static-256", chunk_tokens=4)
    settle_versions(page)
    cut_over(page, number)
    drain(page)
    assert scalar(page, f"SELECT count(*) FROM {PAGE('chunk_2')}") > 60
    items: dict[int, list[Any]] = {}
    for key, values in page.execute(
        f"SELECT c.key_id, v.embedding_v2::real[] FROM {PAGE('chunk_2')} AS c JOIN {PAGE.version(2)} AS v USING (chunk_id)"
    ):
        items.setdefault(key, []).append(values)
    total = sum(key * np.mean(items[key], axis=0) for key in items if key % 6 == 1)
    assert np.allclose(stored(page)[1], total / np.linalg.norm(total), atol=1e-5)


@pytest.mark.parametrize("item_key", ["ARRAY[shelf::text, page_id]", "jsonb_build_array(shelf::text, page_id)", "pair"])
def test_items_with_a_key_of_two_columns(database: psycopg.Connection, item_key: str) -> None:
    database.execute("CREATE TABLE page (shelf integer, id text, body text, PRIMARY KEY (shelf, id))")
    database.execute(
        "INSERT INTO page SELECT g % 3, 'n,\"' || g, 'Row ' || g || ' of rivers' FROM generate_series(1, 12) AS g"
    )
    create_pipeline(database, content="body", index_method="none")
    database.execute("CREATE TABLE event (reader text, shelf integer, page_id text, pair text)")
    database.execute(
        "INSERT INTO event SELECT 'r', shelf, id, jsonb_build_array(shelf::text, id)::text FROM page WHERE shelf = 1"
    )
    database.execute("INSERT INTO event VALUES ('s', 1, 'none', 'no json'), ('s', 2, NULL, NULL)")
    derive(database, item_key=item_key, weight=None, at=None, half_life=None)
    drain(database)
    database.execute("DELETE FROM page WHERE id LIKE '%4'; UPDATE page SET body = 'mountains' WHERE id LIKE '%7'")
    drain(database)
    wanted = np.array(
        [
            values
            for (values,) in database.execute(
                f"SELECT v.embedding_v1::real[] FROM {PAGE('chunk')} JOIN {PAGE.version(1)} AS v USING (chunk_id)"
                " WHERE key_shelf = 1"
            )
        ]
    ).mean(axis=0)
    assert scalar(database, "SELECT item_count FROM readers_derived WHERE subject = 'r'") == 3
    found = database.execute("SELECT subject, embedding::real[] FROM readers_derived").fetchall()
    assert [row[0] for row in found] == ["r"]
    assert np.allclose(found[0][1], wanted / np.linalg.norm(wanted), atol=1e-5)
    left_out = nearest(database, "r", 12, leave_out_seen=True)
    assert {row[0][2] for row in left_out} == {"0", "2"}


def test_a_renamed_column_and_an_expression_that_fails_keep_vectors_true(page: psycopg.Connection) -> None:
    page.execute("ALTER TABLE event ADD COLUMN gone text; ALTER TABLE event ADD COLUMN about text")
    page.execute("ALTER TABLE event DROP COLUMN gone")
    page.execute("INSERT INTO event (about, page, stars) VALUES ('1', 1, 1), ('2', 2, 1)")
    derive(page, subject="(about::integer)")
    drain(page)
    assert stored(page).keys() == {1, 2}
    page.execute("ALTER TABLE event RENAME COLUMN about TO whom")
    page.execute("INSERT INTO event (whom, page, stars) VALUES ('3', 3, 1)")
    drain(page)
    assert stored(page).keys() == {1, 2, 3}
    # The functions of the triggers know the new name: one subject waits, not all.
    page.execute("INSERT INTO event (whom, page, stars) VALUES ('3', 4, 1)")
    assert scalar(page, WAITING) == 1
    page.execute("INSERT INTO event (whom, page, stars) VALUES ('no number', 4, 1)")
    drain(page)
    assert "no number" in scalar(page, "SELECT last_error FROM embedline.derived_status")
    assert "no number" in scalar(page, "SELECT message FROM embedline.alert WHERE alert = 'derived_stale'")
    page.execute("DELETE FROM event WHERE whom = 'no number'")
    drain(page)
    assert scalar(page, "SELECT last_error FROM embedline.derived_status") is None
    assert scalar(page, WAITING) == 0


def test_an_upgrade_regenerates_what_belongs_to_derived_vectors(page: psycopg.Connection) -> None:
    page.execute("INSERT INTO event (reader, page, stars) VALUES (1, 1, 1), (2, 2, 1)")
    derive(page)
    drain(page)
    # Functions as another version might have made them: each of them does nothing, and one trigger is missing.
    for event in ("insert", "items"):
        page.execute(
            f"CREATE OR REPLACE FUNCTION {derived('readers', f'note_{event}')}() RETURNS trigger LANGUAGE plpgsql"
            " AS 'BEGIN RETURN NULL; END'"
        )
    page.execute(
        f"CREATE OR REPLACE FUNCTION {derived('readers', 'read')}(subjects integer[])"
        " RETURNS TABLE (ordinality bigint, item text, weight double precision, event_count bigint) LANGUAGE sql STABLE"
        " AS 'SELECT 1::bigint, ''1'', 1::float8, 1::bigint WHERE false'"
    )
    trigger = scalar(page, "SELECT tgname FROM pg_trigger WHERE tgname ~ 'update' AND tgrelid = 'event'::regclass")
    page.execute(f'DROP TRIGGER "{trigger}" ON event')
    page.execute("UPDATE embedline.pipeline SET code_version = 0; SELECT embedline._regenerate_pipelines()")
    page.execute("INSERT INTO event (reader, page, stars) VALUES (3, 3, 1)")
    page.execute("UPDATE event SET page = 4 WHERE reader = 1")
    page.execute("UPDATE page SET body = 'another text' WHERE id = 2")
    drain(page)
    assert stored(page).keys() == {1, 2, 3}
    assert_true(page)


def test_an_upgrade_leaves_derived_vectors_alone_that_lost_a_column(page: psycopg.Connection) -> None:
    derive(page)
    page.execute("ALTER TABLE event DROP COLUMN stars CASCADE")
    page.execute("UPDATE embedline.pipeline SET code_version = 0; SELECT embedline._regenerate_pipelines()")
    assert scalar(page, "SELECT code_version > 0 FROM embedline.pipeline")


def test_a_partitioned_table_of_events(page: psycopg.Connection) -> None:
    page.execute(
        "DROP TABLE event; CREATE TABLE event (reader integer, page integer, stars integer) PARTITION BY LIST (reader)"
    )
    page.execute(
        "CREATE TABLE event_1 PARTITION OF event FOR VALUES IN (1); CREATE TABLE event_2 PARTITION OF event DEFAULT"
    )
    derive(page, at=None, half_life=None)
    page.execute("INSERT INTO event VALUES (1, 1, 1), (2, 2, 1); INSERT INTO event_2 VALUES (3, 3, 1)")
    drain(page)
    assert stored(page).keys() == {1, 2, 3}
    page.execute("UPDATE event SET reader = 1 WHERE reader = 2; DELETE FROM event_2")
    drain(page)
    assert page.execute("SELECT subject, item_count FROM readers_derived").fetchall() == [(1, 2)]
    page.execute("TRUNCATE event")
    drain(page)
    assert scalar(page, "SELECT subjects FROM embedline.derived_status") == 0


def test_verify_finds_and_mends_what_triggers_did_not_see(page: psycopg.Connection) -> None:
    page.execute("INSERT INTO event (reader, page, stars) SELECT g % 4, g, 1 FROM generate_series(1, 40) AS g")
    derive(page)
    drain(page)
    assert not page.execute(
        "SELECT * FROM embedline.verify('page', sample => 0) WHERE finding = 'stale_derived'"
    ).fetchall()
    page.execute("SET session_replication_role = replica")
    page.execute("DELETE FROM event WHERE reader = 1; UPDATE event SET stars = page WHERE reader = 2")
    page.execute("INSERT INTO event (reader, page, stars) VALUES (9, 9, 1)")
    page.execute("RESET session_replication_role")
    found = "SELECT count, repaired FROM embedline.verify('page', repair => %s, sample => 0) WHERE finding = 'stale_derived'"
    assert page.execute(found, (False,)).fetchall() == [(3, 0)]
    assert page.execute(found, (True,)).fetchall() == [(3, 3)]
    drain(page)
    assert_true(page)


def test_dropped_events_stop_neither_verify_nor_a_cutover(page: psycopg.Connection) -> None:
    derive(page)
    drain(page)
    page.execute("DROP TABLE event CASCADE")
    number = add_version(page, register_static(page, SMALL_DIMENSIONS))
    settle_versions(page)
    cut_over(page, number)
    assert not page.execute("SELECT * FROM embedline.verify('page', sample => 0)").fetchall()
    page.execute("SELECT embedline.drop_derived('readers')")
    assert scalar(page, "SELECT count(*) FROM pg_class WHERE relname ~ 'readers_derived'") == 0


def test_verify_tells_why_it_could_not_compare(page: psycopg.Connection, make_role: MakeRole) -> None:
    page.execute("INSERT INTO event (reader, page, stars) VALUES (1, 1, 1)")
    derive(page)
    drain(page)
    owner = make_role()
    page.execute(f"ALTER TABLE event OWNER TO {owner}; ALTER FUNCTION {derived('readers', 'all')}() OWNER TO {owner}")
    page.execute("ALTER TABLE event ENABLE ROW LEVEL SECURITY; ALTER TABLE event FORCE ROW LEVEL SECURITY")
    found = page.execute("SELECT count, example::text FROM embedline.verify('page', sample => 0)").fetchall()
    assert [row[0] for row in found] == [None]
    assert "row-level security" in found[0][1]


def test_what_waits_is_shown(page: psycopg.Connection) -> None:
    page.execute("INSERT INTO event (reader, page, stars) VALUES (1, 1, 1)")
    derive(page)
    row = page.execute("SELECT pipeline, phase, unit FROM embedline.progress WHERE task = 'derived readers'").fetchone()
    assert row == ("page", "computing", "subjects")
    drain(page)
    page.execute("INSERT INTO event (reader, page, stars) VALUES (1, 2, 1), (2, 2, 1)")
    assert scalar(page, "SELECT total FROM embedline.progress WHERE task = 'derived readers'") == 2
    assert page.execute("SELECT name, events::text, subjects, waiting FROM embedline.derived_status").fetchone() == (
        "readers", "event", 1, 2,
    )  # fmt: skip
    assert 'embedline_derived_pending_subjects{derived="readers"} 2\n' in scalar(page, "SELECT embedline.metrics()")
    alerts = "SELECT subject, message FROM embedline.alert WHERE alert = 'derived_stale'"
    assert page.execute(alerts).fetchall() == []
    page.execute(f"UPDATE {derived('readers', 'dirty')} SET enqueued_at = enqueued_at - interval '65 seconds'")
    assert page.execute(alerts).fetchall() == [("readers", "2 subjects wait, the oldest for 00:01:05")]
    drain(page)
    assert page.execute(alerts).fetchall() == []


def test_nothing_stays_of_dropped_derived_vectors(page: psycopg.Connection) -> None:
    objects = """
        SELECT array_agg(o.name ORDER BY o.name) FROM (
            SELECT relname::text AS name FROM pg_class WHERE oid >= 16384 AND relname !~ '^pg_toast'
            UNION ALL SELECT proname::text FROM pg_proc WHERE oid >= 16384
            UNION ALL SELECT tgname::text FROM pg_trigger WHERE NOT tgisinternal) AS o
    """
    before = scalar(page, objects)
    derive(page)
    drain(page)
    page.execute("SELECT embedline.drop_derived('readers')")
    assert scalar(page, objects) == before
    page.execute("INSERT INTO event (reader, page, stars) VALUES (1, 1, 1); UPDATE page SET body = 'x' WHERE id = 1")
    drain(page)
    derive(page)
    drain(page)
    page.execute("SELECT embedline.drop_pipeline('page')")
    page.execute("INSERT INTO event (reader, page, stars) VALUES (1, 1, 1)")
    assert scalar(page, "SELECT count(*) FROM embedline.derived") == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "Readers"}, "cannot name derived vectors"),
        ({"subject": "reader); DROP TABLE event; --"}, "not a single SQL expression"),
        ({"subject": "mine(reader)"}, "mine"),
        ({"item_key": "reader::text"}, "of type text, the key"),
        ({"weight": "read_at"}, "not a number"),
        ({"at": "page"}, "not a time"),
        ({"at": None}, "half_life needs the time"),
        ({"subject": "point(1, reader)"}, "cannot be ordered"),
        ({"subject": "random()"}, "volatile"),
    ],
)
def test_what_cannot_be_derived_is_refused(page: psycopg.Connection, given: dict[str, Any], message: str) -> None:
    page.execute("CREATE FUNCTION mine(integer) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT $1'")
    with pytest.raises(errors.Error, match=message):
        derive(page, **given)


def test_only_the_owner_of_the_events_derives_from_them(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    admin = make_role("embedline_admin")
    page.execute(f"GRANT USAGE, CREATE ON SCHEMA public TO {admin}; ALTER TABLE page OWNER TO {admin}")
    with connect(admin) as caller, pytest.raises(errors.InsufficientPrivilege):
        derive(caller)
    page.execute(f"ALTER TABLE event OWNER TO {admin}")
    with connect(admin) as caller:
        derive(caller)
        caller.execute("INSERT INTO event (reader, page, stars) VALUES (1, 1, 1)")
        drain(page)
        assert stored(caller).keys() == {1}
        assert nearest(caller, 1, 1)[0][0] == "1"
    other = make_role("embedline_admin")
    page.execute(f"GRANT USAGE, CREATE ON SCHEMA public TO {other}; ALTER TABLE event OWNER TO {other}")
    page.execute(f"GRANT SELECT ON page TO {other}; INSERT INTO event (reader, page, stars) VALUES (2, 2, 1)")
    drain(page)
    with connect(other) as caller:
        assert stored(caller).keys() == {1, 2}
        assert nearest(caller, 2, 1)[0][0] == "2"
        caller.execute("SELECT embedline.drop_derived('readers')")
