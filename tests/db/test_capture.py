"""Capture: whatever an application writes, a drain afterwards leaves exactly the chunks and vectors of the source.

The cases are those of shared/pitfalls.md, "Capture".
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import psycopg
import pytest
from alembic import command
from psycopg import IsolationLevel, sql

from support import (
    alembic_config,
    assert_exact,
    chunked_keys,
    create_pages,
    create_pipeline,
    data_count,
    drain,
    queued,
    scalar,
    searching,
    settle,
)

Connect = Callable[..., psycopg.Connection]


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    """Table page with 20 embedded rows and nothing queued."""
    create_pages(database, 20)
    create_pipeline(database)
    settle(database)
    assert queued(database) == 0
    return database


# --- what is not captured


def test_an_update_of_an_unrelated_column_enqueues_nothing(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET views = views + 1")
    assert queued(pages) == 0
    assert drain(pages) == 0
    assert_exact(pages)


def test_setting_a_column_to_itself_enqueues_nothing(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET body = body, title = title, id = id")
    assert queued(pages) == 0


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO page SELECT * FROM page WHERE false",
        "UPDATE page SET body = 'new' WHERE false",
        "DELETE FROM page WHERE false",
        "MERGE INTO page AS p USING (SELECT 1 WHERE false) AS s ON true WHEN MATCHED THEN DELETE",
        "INSERT INTO page (id) VALUES (1) ON CONFLICT DO NOTHING",
        "INSERT INTO page (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET views = excluded.views + 1",
    ],
)
def test_a_statement_that_changes_no_content_enqueues_nothing(pages: psycopg.Connection, statement: str) -> None:
    pages.execute(statement)
    assert queued(pages) == 0
    assert_exact(pages)


def test_what_a_savepoint_rolls_back_is_not_captured(pages: psycopg.Connection) -> None:
    with pages.transaction():
        pages.execute("UPDATE page SET body = 'kept' WHERE id = 1")
        with pages.transaction(force_rollback=True):
            pages.execute("UPDATE page SET body = 'discarded' WHERE id = 2")
            pages.execute("INSERT INTO page (id, title, body) VALUES (100, 'discarded', 'too')")
            pages.execute("DELETE FROM page WHERE id = 3")
        pages.execute("DELETE FROM page WHERE id = 4")
    assert queued(pages) == 2
    assert drain(pages) == 1
    assert_exact(pages)


def test_a_rolled_back_delete_and_truncate_leave_search_whole(pages: psycopg.Connection) -> None:
    for statement in ("DELETE FROM page", "TRUNCATE page"):
        with pages.transaction(force_rollback=True):
            pages.execute(statement)
        assert assert_exact(pages) == 20


# --- what is captured


def test_each_changed_row_is_embedded_again_and_no_other(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET body = body || ' changed' WHERE id <= 3")
    assert queued(pages) == 3
    assert drain(pages) == 3
    assert_exact(pages)


def test_several_changes_of_a_row_are_one_embedding(pages: psycopg.Connection) -> None:
    for n in range(5):
        pages.execute("UPDATE page SET body = %s WHERE id = 1", (f"version {n}",))
    assert drain(pages) == 1
    assert_exact(pages)


def test_a_change_and_its_reversal_end_as_they_began(pages: psycopg.Connection) -> None:
    pages.execute("CREATE TABLE backup AS TABLE page")
    pages.execute("UPDATE page SET body = 'other'")
    pages.execute("UPDATE page SET body = backup.body FROM backup WHERE backup.id = page.id")
    assert drain(pages) == 0
    assert_exact(pages)


def test_a_deleted_row_cannot_be_found_and_a_worker_removes_its_chunks(
    pages: psycopg.Connection, connect: Connect
) -> None:
    application = connect(autocommit=False)
    application.execute("DELETE FROM page WHERE id <= 5")
    assert scalar(application, "SELECT count(*) FROM page_embedding") == 15
    assert scalar(pages, "SELECT count(*) FROM page_embedding") == 20
    application.commit()
    assert {int(key) for key, _, _ in searching(pages, "page", "Body number", 20)} == set(range(6, 21))
    assert queued(pages) == 5
    assert drain(pages) == 0
    assert data_count(pages, "chunk") == data_count(pages, "v1") == 15
    assert_exact(pages)


def test_a_key_change_moves_the_chunks(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET id = id + 1000 WHERE id <= 5")
    drain(pages)
    assert_exact(pages)


def test_swapped_keys_end_with_their_own_content(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY DEFERRABLE INITIALLY IMMEDIATE, body text)")
    database.execute("ALTER TABLE page ADD COLUMN code integer NOT NULL GENERATED ALWAYS AS IDENTITY UNIQUE")
    database.execute("INSERT INTO page VALUES (1, 'rivers flow'), (2, 'bread bakes')")
    create_pipeline(database, content="body")
    settle(database)
    assert scalar(database, "SELECT key_columns FROM embedline.pipeline") == ["key_id"]
    database.execute("UPDATE page SET id = 3 - id")
    drain(database)
    assert_exact(database)


def test_null_content_has_no_chunks_and_comes_back(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET body = NULL WHERE id = 1")
    drain(pages)
    assert 1 not in chunked_keys(pages)
    assert_exact(pages)
    pages.execute("UPDATE page SET body = 'back' WHERE id = 1")
    drain(pages)
    assert 1 in chunked_keys(pages)
    assert_exact(pages)


def test_content_without_anything_printable_is_a_dead_letter_until_it_is_repaired(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET title = '', body = E' \\n\\t' WHERE id = 1")
    drain(pages)
    letter = pages.execute("SELECT key, stage, error_code FROM embedline.dead_letter").fetchall()
    assert letter == [({"id": "1"}, "validate", "EL002")]
    assert_exact(pages)
    pages.execute("UPDATE page SET body = 'repaired' WHERE id = 1")
    drain(pages)
    assert_exact(pages)


def test_deleting_a_row_takes_its_dead_letter_away(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET title = '', body = ' ' WHERE id = 1")
    drain(pages)
    pages.execute("DELETE FROM page WHERE id = 1")
    settle(pages)
    assert scalar(pages, "SELECT count(*) FROM embedline.dead_letter") == 0
    assert_exact(pages)


def test_copy_is_captured(pages: psycopg.Connection) -> None:
    with pages.cursor().copy("COPY page (id, title, body) FROM STDIN") as copy:
        for n in range(100, 150):
            copy.write_row((n, f"Copied {n}", f"A copied body {n}"))
    assert queued(pages) == 50
    assert drain(pages) == 50
    assert_exact(pages)


def test_merge_is_captured(pages: psycopg.Connection) -> None:
    pages.execute(
        """
        MERGE INTO page AS p USING (VALUES (1, 'updated'), (2, NULL), (200, 'inserted')) AS s (id, body) ON s.id = p.id
        WHEN MATCHED AND s.body IS NULL THEN DELETE
        WHEN MATCHED THEN UPDATE SET body = s.body
        WHEN NOT MATCHED THEN INSERT (id, title, body) VALUES (s.id, 'new', s.body)
        """
    )
    assert drain(pages) == 2
    assert_exact(pages)


def test_on_conflict_do_update_is_captured(pages: psycopg.Connection) -> None:
    pages.execute(
        "INSERT INTO page (id, title, body) VALUES (1, 'a', 'updated'), (300, 'b', 'inserted')"
        " ON CONFLICT (id) DO UPDATE SET body = excluded.body"
    )
    assert drain(pages) == 2
    assert_exact(pages)


def test_data_modifying_ctes_are_captured(pages: psycopg.Connection) -> None:
    pages.execute(
        "WITH gone AS (DELETE FROM page WHERE id = 1 RETURNING *), changed AS (UPDATE page SET body = 'x y z' WHERE id = 2)"
        " INSERT INTO page (id, title, body) SELECT id + 500, title, body FROM gone"
    )
    drain(pages)
    assert_exact(pages)


def test_foreign_key_cascades_are_captured(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE book (id integer PRIMARY KEY, name text UNIQUE)")
    database.execute(
        "CREATE TABLE page (id integer PRIMARY KEY, book_id integer REFERENCES book ON DELETE CASCADE ON UPDATE CASCADE,"
        " chapter text REFERENCES book (name) ON DELETE SET NULL ON UPDATE CASCADE, body text)"
    )
    database.execute("INSERT INTO book SELECT n, 'book ' || n FROM generate_series(1, 4) AS n")
    database.execute(
        "INSERT INTO page SELECT n, 1 + n % 2, 'book ' || 3 + n % 2, 'body ' || n FROM generate_series(1, 10) AS n"
    )
    create_pipeline(database, content="coalesce(chapter, 'none') || ' ' || body || book_id")
    settle(database)
    database.execute("DELETE FROM book WHERE id = 1")
    assert drain(database) == 0
    assert chunked_keys(database) == {1, 3, 5, 7, 9}
    database.execute("UPDATE book SET id = 20 WHERE id = 2")
    database.execute("UPDATE book SET name = 'renamed' WHERE id = 4")
    database.execute("DELETE FROM book WHERE id IN (3, 4)")
    assert drain(database) == 5
    assert_exact(database)


def test_truncate_hides_everything_at_once_and_a_worker_removes_it(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET body = 'queued'")
    pages.execute("TRUNCATE page")
    assert scalar(pages, "SELECT count(*) FROM page_embedding") == 0
    assert searching(pages, "page", "Body number") == []
    assert drain(pages) == 0
    assert_exact(pages)
    assert data_count(pages, "document") == 0
    pages.execute("INSERT INTO page (id, title, body) VALUES (1, 'after', 'the truncate')")
    assert drain(pages) == 1
    assert assert_exact(pages) == 1


def test_truncate_takes_the_dead_letters_away(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET title = ' ', body = ' ' WHERE id < 3")
    drain(pages)
    assert scalar(pages, "SELECT dead_letters FROM embedline.status") == 2
    pages.execute("TRUNCATE page")
    drain(pages)
    assert scalar(pages, "SELECT dead_letters FROM embedline.status") == 0
    assert scalar(pages, "SELECT count(*) FROM embedline.dead_letter") == 0


def test_truncate_cascades_from_a_referenced_table(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE book (id integer PRIMARY KEY)")
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, book_id integer REFERENCES book, body text)")
    database.execute("INSERT INTO book VALUES (1)")
    database.execute("INSERT INTO page VALUES (1, 1, 'body')")
    create_pipeline(database, content="body")
    settle(database)
    database.execute("TRUNCATE book CASCADE")
    assert drain(database) == 0
    assert data_count(database, "chunk") == 0
    assert_exact(database)


def test_truncate_restarts_an_unfinished_backfill(database: psycopg.Connection) -> None:
    create_pages(database, 30)
    create_pipeline(database)
    scalar(database, "SELECT embedline.embed_pending(5)")
    database.execute("TRUNCATE page")
    database.execute("INSERT INTO page (id, title, body) VALUES (7, 'after', 'the truncate')")
    settle(database)
    assert assert_exact(database) == 1


@pytest.mark.parametrize("same_transaction", [True, False])
def test_deleting_and_inserting_the_same_key_ends_with_the_new_content(
    pages: psycopg.Connection, same_transaction: bool
) -> None:
    pages.execute("UPDATE page SET body = 'old, not yet embedded' WHERE id = 1")
    if same_transaction:
        with pages.transaction():
            pages.execute("DELETE FROM page WHERE id = 1")
            pages.execute("INSERT INTO page (id, title, body) VALUES (1, 'New', 'new content')")
    else:
        pages.execute("DELETE FROM page WHERE id = 1")
        pages.execute("INSERT INTO page (id, title, body) VALUES (1, 'New', 'new content')")
    assert drain(pages) == 1
    assert_exact(pages)


def test_inserting_and_deleting_in_one_transaction_leaves_nothing(pages: psycopg.Connection) -> None:
    with pages.transaction():
        pages.execute("INSERT INTO page (id, title, body) VALUES (77, 'short', 'life')")
        pages.execute("DELETE FROM page WHERE id = 77")
    drain(pages)
    assert_exact(pages)


# --- BEFORE triggers

_BEFORE_TRIGGER = """
    CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN NEW.body := 'seen ' || NEW.views || ' times'; RETURN NEW; END $$;
    CREATE TRIGGER stamp BEFORE UPDATE ON page FOR EACH ROW EXECUTE FUNCTION stamp();
"""


def test_a_before_trigger_that_changes_an_input_is_seen(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    database.execute(_BEFORE_TRIGGER)
    create_pipeline(database)
    settle(database)
    database.execute("UPDATE page SET views = 7 WHERE id = 1")
    assert queued(database) == 1
    drain(database)
    assert_exact(database)


def test_a_before_trigger_made_later_is_seen_after_a_refresh(pages: psycopg.Connection) -> None:
    pages.execute(_BEFORE_TRIGGER)
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    pages.execute("UPDATE page SET views = 7 WHERE id = 1")
    assert drain(pages) == 1
    assert_exact(pages)


def test_a_refresh_watches_every_update_of_a_source_with_any_column_name(database: psycopg.Connection) -> None:
    database.execute('CREATE TABLE note (id bigint PRIMARY KEY, "a ON b" text NOT NULL, views integer NOT NULL)')
    database.execute("INSERT INTO note VALUES (1, 'first', 0)")
    create_pipeline(database, "note", "note", '"a ON b"')
    settle(database)
    database.execute(
        "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS"
        """ $$ BEGIN NEW."a ON b" := 'seen ' || NEW.views || ' times'; RETURN NEW; END $$;"""
        " CREATE TRIGGER stamp BEFORE UPDATE ON note FOR EACH ROW EXECUTE FUNCTION stamp()"
    )
    database.execute("SELECT embedline.refresh_pipeline('note')")
    database.execute("UPDATE note SET views = 7")
    assert drain(database) == 1
    assert scalar(database, "SELECT chunk FROM note_embedding") == "seen 7 times"


def test_a_refresh_keeps_a_trigger_that_fires_for_replicated_rows(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database, capture="row")
    settle(database)
    database.execute(_BEFORE_TRIGGER)
    database.execute("ALTER TABLE page ENABLE ALWAYS TRIGGER stamp")
    database.execute("SELECT embedline.refresh_pipeline('page')")
    with database.transaction():
        database.execute("SET LOCAL session_replication_role = replica")
        database.execute("UPDATE page SET views = 7 WHERE id = 1")
    assert queued(database) == 1


def test_a_before_trigger_that_skips_rows_enqueues_nothing(pages: psycopg.Connection) -> None:
    pages.execute(
        "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
        "CREATE TRIGGER skip BEFORE INSERT OR UPDATE OR DELETE ON page FOR EACH ROW EXECUTE FUNCTION skip()"
    )
    pages.execute("INSERT INTO page (id) VALUES (900)")
    pages.execute("UPDATE page SET body = 'x'")
    pages.execute("DELETE FROM page")
    assert queued(pages) == 0
    assert assert_exact(pages) == 20


# --- changes of the table itself


def test_a_renamed_input_column_is_followed(pages: psycopg.Connection) -> None:
    pages.execute("ALTER TABLE page RENAME COLUMN body TO prose")
    pages.execute("UPDATE page SET prose = 'after the rename' WHERE id = 1")
    pages.execute("INSERT INTO page (id, title, prose) VALUES (50, 'New', 'row')")
    assert drain(pages) == 2
    assert_exact(pages, content="title || E'\\n\\n' || prose")


def test_a_renamed_key_column_is_followed(pages: psycopg.Connection) -> None:
    pages.execute("ALTER TABLE page RENAME COLUMN id TO number")
    pages.execute("UPDATE page SET body = 'after the rename' WHERE number = 1")
    pages.execute("INSERT INTO page (number, title, body) VALUES (50, 'New', 'row')")
    pages.execute("UPDATE page SET number = 60 WHERE number = 2")
    pages.execute("DELETE FROM page WHERE number = 3")
    drain(pages)
    assert_exact(pages)
    assert searching(pages, "page", "new row", k=1)


@pytest.mark.parametrize(
    ("create", "rename"),
    [
        (
            "CREATE TABLE whole (id integer, body text, PRIMARY KEY (id)) PARTITION BY RANGE (id);"
            " CREATE TABLE part PARTITION OF whole FOR VALUES FROM (0) TO (100)",
            "ALTER TABLE whole RENAME COLUMN {} TO {}",
        ),
        (
            "CREATE TABLE whole (id integer NOT NULL, body text);"
            " CREATE TABLE middle () INHERITS (whole); CREATE TABLE part (PRIMARY KEY (id)) INHERITS (middle)",
            "ALTER TABLE whole RENAME COLUMN {} TO {}",
        ),
        (
            "CREATE TYPE page_row AS (id integer, body text); CREATE TABLE part OF page_row (PRIMARY KEY (id))",
            "ALTER TYPE page_row RENAME ATTRIBUTE {} TO {} CASCADE",
        ),
    ],
    ids=["partition", "child", "typed table"],
)
def test_a_column_renamed_through_a_parent_or_a_type_is_followed(
    database: psycopg.Connection, create: str, rename: str
) -> None:
    database.execute(create)
    database.execute("INSERT INTO part VALUES (1, 'one'), (2, 'two')")
    create_pipeline(database, "part", "part", "body")
    settle(database)
    database.execute(rename.format("body", "prose"))
    database.execute("UPDATE part SET prose = 'changed' WHERE id = 1")
    database.execute(rename.format("id", "number"))
    database.execute("INSERT INTO part VALUES (3, 'three')")
    database.execute("UPDATE part SET number = 4 WHERE number = 1")
    database.execute("DELETE FROM part WHERE number = 2")
    settle(database)
    assert chunked_keys(database, "part") == {3, 4}
    assert assert_exact(database, "part", content="prose") == 2


@pytest.mark.parametrize(
    ("rename", "schema"),
    [
        ("ALTER TYPE kinds.mood RENAME TO feeling", "kinds"),
        ("ALTER SCHEMA kinds RENAME TO sorts", "sorts"),
        ("ALTER TYPE kinds.mood SET SCHEMA public", "kinds"),
    ],
)
@pytest.mark.parametrize("by_refresh", [False, True])
def test_a_renamed_type_of_the_key_is_followed(
    database: psycopg.Connection, rename: str, schema: str, by_refresh: bool
) -> None:
    database.execute(
        "CREATE SCHEMA kinds; CREATE TYPE kinds.mood AS ENUM ('sad', 'ok', 'fine', 'glad');"
        " CREATE TABLE kinds.day (id kinds.mood PRIMARY KEY, body text);"
        " INSERT INTO kinds.day VALUES ('sad', 'one'), ('ok', 'two')"
    )
    create_pipeline(database, "day", "kinds.day", "body")
    settle(database)
    if by_refresh:
        database.execute("ALTER EVENT TRIGGER embedline_follow_source DISABLE")
    database.execute(rename)
    if by_refresh:
        database.execute("SELECT embedline.refresh_pipeline('day')")
    database.execute(f"INSERT INTO {schema}.day VALUES ('fine', 'three')")
    database.execute(f"UPDATE {schema}.day SET body = 'changed' WHERE id = 'sad'")
    database.execute(f"DELETE FROM {schema}.day WHERE id = 'ok'")
    settle(database)
    assert chunked_keys(database, "day") == {"sad", "fine"}
    assert scalar(database, "SELECT count(*) FROM embedline.verify('day')") == 0


def test_a_command_that_changes_no_source_leaves_the_functions_alone(pages: psycopg.Connection) -> None:
    written = (
        "SELECT array_agg(xmin::text ORDER BY oid) FROM pg_proc WHERE pronamespace = 'embedline_data'::regnamespace"
    )
    before = scalar(pages, written)
    pages.execute("CREATE TABLE other (id integer); ALTER TABLE other ADD COLUMN name text")
    pages.execute("CREATE TYPE colour AS ENUM ('red'); ALTER TYPE colour RENAME TO paint")
    pages.execute("CREATE SCHEMA here; ALTER SCHEMA here RENAME TO there")
    assert scalar(pages, written) == before


def test_dropping_an_input_column_is_refused_and_named(pages: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.DependentObjectsStillExist) as caught:
        pages.execute("ALTER TABLE page DROP COLUMN body")
    assert "body" in str(caught.value)
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        pages.execute("ALTER TABLE page DROP COLUMN id")


def test_a_renamed_table_is_followed(pages: psycopg.Connection) -> None:
    pages.execute('ALTER TABLE page RENAME TO "the pages"')
    pages.execute("""UPDATE "the pages" SET body = 'after the rename' WHERE id = 1""")
    pages.execute("""INSERT INTO "the pages" (id, title, body) VALUES (50, 'New', 'row')""")
    assert drain(pages) == 2
    assert_exact(pages)
    assert searching(pages, "page", "after the rename", k=1)[0][0] == "1"
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    pages.execute("SELECT embedline.drop_pipeline('page')")


def test_a_table_moved_to_another_schema_is_followed(pages: psycopg.Connection) -> None:
    pages.execute("CREATE SCHEMA archive")
    pages.execute("ALTER TABLE page SET SCHEMA archive")
    pages.execute("UPDATE archive.page SET body = 'after the move' WHERE id = 1")
    pages.execute("INSERT INTO archive.page (id, title, body) VALUES (50, 'New', 'row')")
    assert drain(pages) == 2
    assert_exact(pages)
    assert searching(pages, "page", "after the move", k=1)[0][0] == "1"
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    pages.execute("SELECT embedline.drop_pipeline('page')")


def test_an_added_column_appears_in_the_routing_view_after_a_refresh(pages: psycopg.Connection) -> None:
    pages.execute("ALTER TABLE page ADD COLUMN language text DEFAULT 'en'")
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(pages, "SELECT count(*) FROM page_embedding WHERE language = 'en'") == 20
    pages.execute("UPDATE page SET language = 'de' WHERE id = 1")
    assert queued(pages) == 0
    assert scalar(pages, "SELECT count(*) FROM page_embedding WHERE language = 'de'") == 1


def test_a_dropped_unrelated_column_is_no_obstacle(database: psycopg.Connection) -> None:
    create_pages(database, 10)
    database.execute("ALTER TABLE page DROP COLUMN views")
    create_pipeline(database)
    settle(database)
    database.execute("UPDATE page SET body = 'changed' WHERE id = 1")
    database.execute("INSERT INTO page VALUES (50, 'New', 'row')")
    database.execute("DELETE FROM page WHERE id = 2")
    assert drain(database) == 2
    assert_exact(database)


def test_a_column_dropped_and_one_added_after_creation_are_no_obstacle(pages: psycopg.Connection) -> None:
    """The routing view shows every column, so the drop needs CASCADE; capture and a refresh go on."""
    pages.execute("ALTER TABLE page DROP COLUMN views CASCADE")
    pages.execute("ALTER TABLE page ADD COLUMN extra integer DEFAULT 3")
    pages.execute("UPDATE page SET body = 'changed' WHERE id = 1")
    pages.execute("INSERT INTO page VALUES (50, 'New', 'row')")
    pages.execute("DELETE FROM page WHERE id = 2")
    assert drain(pages) == 2
    assert_exact(pages)
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(pages, "SELECT count(*) FROM page_embedding WHERE extra = 3") == 20


def test_a_changed_column_type_is_followed(pages: psycopg.Connection) -> None:
    """PostgreSQL refuses to alter a column that a trigger condition uses: an error of the ALTER, never of a write."""
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        pages.execute("ALTER TABLE page ALTER COLUMN body TYPE varchar(4000)")
    pages.execute("UPDATE page SET body = 'still works' WHERE id = 1")
    assert drain(pages) == 1
    assert_exact(pages)


# --- partitions

_PARTITIONED = """
    CREATE TABLE page (id integer, region text, title text, body text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
    CREATE TABLE page_north PARTITION OF page FOR VALUES IN ('north');
    CREATE TABLE page_south PARTITION OF page FOR VALUES IN ('south') PARTITION BY RANGE (id);
    CREATE TABLE page_south_low PARTITION OF page_south FOR VALUES FROM (0) TO (100);
    CREATE TABLE page_south_high PARTITION OF page_south FOR VALUES FROM (100) TO (1000);
    INSERT INTO page SELECT n, (ARRAY['north', 'south'])[1 + n % 2], 'Title ' || n, 'Body ' || n FROM generate_series(1, 20) AS n;
"""


@pytest.fixture
def partitioned(database: psycopg.Connection) -> psycopg.Connection:
    database.execute(_PARTITIONED)
    create_pipeline(database)
    settle(database)
    assert assert_exact(database) == 20
    return database


def test_writes_through_the_parent_of_partitions_are_captured(partitioned: psycopg.Connection) -> None:
    partitioned.execute("INSERT INTO page VALUES (50, 'north', 'New', 'row'), (150, 'south', 'High', 'row')")
    partitioned.execute("UPDATE page SET body = 'changed' WHERE id <= 3")
    partitioned.execute("DELETE FROM page WHERE id IN (5, 6)")
    settle(partitioned)
    assert_exact(partitioned)


def test_writes_into_a_partition_are_captured(partitioned: psycopg.Connection) -> None:
    partitioned.execute("INSERT INTO page_north VALUES (50, 'north', 'New', 'row')")
    partitioned.execute("INSERT INTO page_south VALUES (51, 'south', 'New', 'row')")
    partitioned.execute("UPDATE page_south_low SET body = 'changed' WHERE id <= 3")
    partitioned.execute("DELETE FROM page_north WHERE id IN (6, 8)")
    with partitioned.cursor().copy("COPY page_south_high FROM STDIN") as copy:
        copy.write_row((500, "south", "Copied", "row"))
    settle(partitioned)
    assert_exact(partitioned)


def test_rows_that_move_across_partitions_are_captured(partitioned: psycopg.Connection) -> None:
    partitioned.execute("UPDATE page SET region = 'south' WHERE id = 2")
    partitioned.execute("UPDATE page SET id = id + 200, body = 'moved and changed' WHERE id = 3")
    settle(partitioned)
    assert_exact(partitioned)


def test_unrelated_updates_of_partitions_enqueue_nothing(partitioned: psycopg.Connection) -> None:
    partitioned.execute("ALTER TABLE page ADD COLUMN views integer DEFAULT 0")
    partitioned.execute("UPDATE page SET views = views + 1, body = body")
    assert queued(partitioned) == 0


def test_writes_into_a_partition_attached_later_are_captured(partitioned: psycopg.Connection) -> None:
    partitioned.execute("CREATE TABLE page_east (LIKE page INCLUDING ALL)")
    partitioned.execute("ALTER TABLE page ATTACH PARTITION page_east FOR VALUES IN ('east')")
    partitioned.execute("INSERT INTO page VALUES (70, 'east', 'Through', 'the parent')")
    partitioned.execute("INSERT INTO page_east VALUES (71, 'east', 'Into', 'the leaf')")
    partitioned.execute("UPDATE page_east SET body = 'changed' WHERE id = 70")
    settle(partitioned)
    assert_exact(partitioned)


def test_rows_that_a_partition_brought_along_are_embedded_after_a_refresh(partitioned: psycopg.Connection) -> None:
    partitioned.execute("CREATE TABLE page_west (LIKE page INCLUDING ALL)")
    partitioned.execute(
        "INSERT INTO page_west SELECT n, 'west', 'West', 'Body ' || n FROM generate_series(300, 310) AS n"
    )
    partitioned.execute("ALTER TABLE page ATTACH PARTITION page_west FOR VALUES IN ('west')")
    partitioned.execute("SELECT embedline.refresh_pipeline('page')")
    settle(partitioned)
    assert assert_exact(partitioned) == 31


def test_truncating_partitions_empties_search(partitioned: psycopg.Connection) -> None:
    partitioned.execute("TRUNCATE page")
    assert scalar(partitioned, "SELECT count(*) FROM page_embedding") == 0
    settle(partitioned)
    assert_exact(partitioned)


def test_truncating_one_partition_takes_its_rows_out_of_search(partitioned: psycopg.Connection) -> None:
    """The routing view joins the live row, so search is right at once; what is stored besides is for a sweep."""
    partitioned.execute("TRUNCATE page_north")
    assert scalar(partitioned, "SELECT count(*) FROM page_embedding") == 10
    assert len(searching(partitioned, "page", "body", k=20)) == 10


# --- isolation levels

_LEVELS = [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE]


@pytest.mark.parametrize("level", _LEVELS)
@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM page WHERE id = 1",
        "UPDATE page SET body = 'from the application' WHERE id = 1",
        "UPDATE page SET id = 999 WHERE id = 1",
        "INSERT INTO page (id, title, body) VALUES (1, 'a', 'b') ON CONFLICT (id) DO UPDATE SET body = 'upserted'",
    ],
)
def test_an_application_with_an_old_snapshot_never_fails_because_of_a_worker(
    pages: psycopg.Connection, connect: Connect, level: IsolationLevel, statement: str
) -> None:
    pages.execute("UPDATE page SET body = 'waits for the worker'")
    application = connect(autocommit=False)
    application.isolation_level = level
    application.execute("SELECT count(*) FROM page").fetchone()  # takes the snapshot
    assert drain(pages) == 20  # the worker rewrites document, chunk and outbox rows after it
    application.execute(statement)
    application.commit()
    settle(pages)
    assert_exact(pages)


@pytest.mark.parametrize("level", _LEVELS)
def test_a_worker_that_meets_an_open_delete_goes_on_and_leaves_no_orphan(
    pages: psycopg.Connection, connect: Connect, level: IsolationLevel
) -> None:
    pages.execute("UPDATE page SET body = 'waits for the worker'")
    application = connect(autocommit=False)
    application.isolation_level = level
    application.execute("DELETE FROM page WHERE id <= 3")
    assert drain(pages) == 17  # the rows under deletion are left for later
    application.commit()
    settle(pages)
    assert_exact(pages)


@pytest.mark.parametrize("level", _LEVELS)
def test_a_delete_while_a_worker_holds_the_rows_neither_fails_nor_leaves_an_orphan(
    pages: psycopg.Connection, connect: Connect, level: IsolationLevel
) -> None:
    pages.execute("UPDATE page SET body = 'waits for the worker'")
    worker, application = connect(autocommit=False), connect(autocommit=False)
    application.isolation_level = level
    application.execute("SELECT count(*) FROM page").fetchone()
    assert scalar(worker, "SELECT embedline.embed_pending(1000)") == 20  # not committed: its row locks are held
    application.execute("SET lock_timeout = '2s'")
    with pytest.raises(psycopg.errors.LockNotAvailable):  # KEY SHARE of the one-transaction form is its documented cost
        application.execute("DELETE FROM page WHERE id = 1")
    application.rollback()
    worker.commit()
    application.execute("DELETE FROM page WHERE id = 1")
    application.commit()
    settle(pages)
    assert_exact(pages)


def test_two_serializable_writers_of_different_rows_both_commit(pages: psycopg.Connection, connect: Connect) -> None:
    writers = [connect(autocommit=False), connect(autocommit=False)]
    for number, writer in enumerate(writers):
        writer.isolation_level = IsolationLevel.SERIALIZABLE
        writer.execute("INSERT INTO page (id, title, body) VALUES (%s, 'New', 'row')", (1000 + number,))
    for writer in writers:
        writer.commit()
    settle(pages)
    assert_exact(pages)


# --- keys and columns


def test_a_table_without_a_key_is_refused_with_the_remedy(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer, title text, body text, UNIQUE (id))")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="no primary key") as caught:
        create_pipeline(database)
    assert "ADD PRIMARY KEY" in (caught.value.diag.message_hint or "")


def test_a_unique_index_over_not_null_columns_serves_as_key(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer NOT NULL, title text, body text)")
    database.execute("CREATE UNIQUE INDEX ON page (id) INCLUDE (title)")
    database.execute("INSERT INTO page VALUES (1, 'One', 'row')")
    create_pipeline(database)
    database.execute("INSERT INTO page VALUES (2, 'Two', 'rows')")
    settle(database)
    assert assert_exact(database) == 2


AWKWARD_KEYS = [
    "a,b", "it's", 'say "hi"', "line\nbreak", "tab\tstop", "back\\slash", "\\N", "NULL", "", " ", "{curly}", "(a,b)", "%s", ":x",
    "\\.", "ünï ço∂é", "漢字", "👩‍👩‍👧", "$1", "--", "/*", "\r", "\x01",
]  # fmt: skip


def test_text_keys_may_hold_anything(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (slug text PRIMARY KEY, body text)")
    create_pipeline(database, content="body")
    with database.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO page VALUES (%s, %s)", [(key, f"body of number {n}") for n, key in enumerate(AWKWARD_KEYS)]
        )
    settle(database)
    assert assert_exact(database) == len(AWKWARD_KEYS)
    assert {row[0] for row in searching(database, "page", "body of number", k=100)} == set(AWKWARD_KEYS)
    database.execute("UPDATE page SET body = body || ' changed'")
    settle(database)
    assert_exact(database)
    database.execute("UPDATE page SET body = ' '")
    settle(database)
    assert_exact(database)
    database.execute("DELETE FROM page")
    settle(database)
    assert_exact(database)


def test_awkward_keys_survive_the_backfill(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (slug text PRIMARY KEY, body text)")
    with database.cursor() as cursor:
        cursor.executemany("INSERT INTO page VALUES (%s, 'a body')", [(key,) for key in AWKWARD_KEYS])
    create_pipeline(database, content="body")
    settle(database)
    assert assert_exact(database) == len(AWKWARD_KEYS)


@pytest.mark.parametrize(
    ("key_type", "values"),
    [
        ("uuid", [str(uuid.UUID(int=n)) for n in range(3)]),
        ("bigint", ["-9223372036854775808", "0", "9223372036854775807"]),
        ("numeric", ["1.10", "2", "-0.000000000000000000001"]),
        ("double precision", ["0.1", "0.30000000000000004", "-1e-300"]),
        ("timestamptz", ["2024-03-31 00:30:00+00", "2024-10-27 00:30:00+00", "2024-10-27 01:30:00.123456+00"]),
        ("date", ["2024-02-03", "0044-03-15 BC", "infinity"]),
        ("interval", ["1 mon -1 days +02:03:04", "-1 year", "3 days"]),
        ("bytea", ["\\x00ff", "\\x", "\\x5c27"]),
        ("inet", ["10.0.0.0/8", "::1", "192.168.0.1"]),
        ("boolean", ["true", "false"]),
        ("int4range", ["[1,5)", "empty", "(,3)"]),
        ("char(5)", ["a", "ab", "abcde"]),
        ('"char"', ["a", "b", "c"]),
        ("jsonb", ['{"a": 1}', '"x"', "[1, 2]"]),
    ],
)
@pytest.mark.parametrize("session_settings", ["", "hostile"])
def test_keys_of_any_type(
    database: psycopg.Connection, connect: Connect, key_type: str, values: list[str], session_settings: str
) -> None:
    """Keys travel as text between SQL and Python: settings that change a type's text must not lose a row."""
    if session_settings:
        session_settings = (
            "-c extra_float_digits=-10 -c datestyle=SQL,DMY -c timezone=Europe/London -c intervalstyle=sql_standard"
            " -c bytea_output=escape"
        )
    database.execute(f"CREATE TABLE page (key {key_type} PRIMARY KEY, body text)")
    create_pipeline(database, content="body")
    worker = connect(options=session_settings)
    for n, value in enumerate(values):
        database.execute(f"INSERT INTO page VALUES (%s::text::{key_type}, %s)", (value, f"body {n}"))
    settle(worker)
    assert assert_exact(database) == len(values)
    worker.execute("UPDATE page SET body = body || ' changed'")
    settle(worker)
    assert_exact(database)
    worker.execute("DELETE FROM page")
    settle(worker)
    assert_exact(database)


def test_a_key_of_an_array_type_is_refused_in_plain_words(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (key text[] PRIMARY KEY, body text)")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="key"):
        create_pipeline(database, content="body")


@pytest.mark.parametrize(
    ("key_type", "before", "after"),
    [("numeric", "1.0", "1.00"), ("double precision", "0", "-0"), ("interval", "30 days", "1 mon")],
)
def test_a_key_that_changes_only_its_spelling(
    database: psycopg.Connection, key_type: str, before: str, after: str
) -> None:
    """Two changes of the same key, written in two ways, come in one claim."""
    database.execute(f"CREATE TABLE page (key {key_type} PRIMARY KEY, body text)")
    create_pipeline(database, content="body")
    database.execute(f"INSERT INTO page VALUES (%s::text::{key_type}, 'one')", (before,))
    database.execute(f"UPDATE page SET key = %s::text::{key_type}, body = 'changed'", (after,))
    settle(database)
    assert scalar(database, "SELECT count(*) FROM page_embedding WHERE chunk = 'changed'") == 1
    assert data_count(database, "chunk") == data_count(database, "v1") == 1


def test_composite_keys(database: psycopg.Connection) -> None:
    database.execute(
        "CREATE TABLE page (tenant uuid, slug text, lang char(2), body text, PRIMARY KEY (slug, tenant, lang))"
    )
    tenants = [uuid.UUID(int=1), uuid.UUID(int=2)]
    with database.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO page VALUES (%s, %s, 'en', %s)",
            [(tenant, slug, f"body {n}") for tenant in tenants for n, slug in enumerate(AWKWARD_KEYS)],
        )
    create_pipeline(database, content="body")
    settle(database)
    assert assert_exact(database) == 2 * len(AWKWARD_KEYS)
    database.execute("UPDATE page SET tenant = %s, lang = 'de' WHERE tenant = %s", (uuid.UUID(int=3), tenants[0]))
    database.execute("DELETE FROM page WHERE tenant = %s AND slug <> ''", (tenants[1],))
    settle(database)
    assert assert_exact(database) == len(AWKWARD_KEYS) + 1
    assert searching(database, "page", "body", k=1)[0][0].startswith("[")


def test_a_key_of_a_domain_type(database: psycopg.Connection) -> None:
    database.execute("CREATE DOMAIN slug AS text CHECK (value <> '')")
    database.execute("CREATE DOMAIN short_slug AS slug CHECK (length(value) < 10)")
    database.execute("CREATE TABLE page (slug short_slug PRIMARY KEY, body text)")
    create_pipeline(database, content="body")
    database.execute("INSERT INTO page VALUES ('a', 'one'), ('b', 'two')")
    settle(database)
    assert assert_exact(database) == 2
    database.execute("UPDATE page SET body = 'changed'")
    database.execute("DELETE FROM page WHERE slug = 'b'")
    settle(database)
    assert assert_exact(database) == 1


def test_a_key_of_an_enumerated_type_in_another_schema(database: psycopg.Connection) -> None:
    database.execute("CREATE SCHEMA shop")
    database.execute("CREATE TYPE shop.size AS ENUM ('small', 'large')")
    database.execute("CREATE TABLE shop.page (size shop.size PRIMARY KEY, body text)")
    create_pipeline(database, source="shop.page", content="body")
    database.execute("INSERT INTO shop.page VALUES ('small', 'one'), ('large', 'two')")
    settle(database)
    assert assert_exact(database) == 2
    database.execute("DELETE FROM shop.page WHERE size = 'small'")
    settle(database)
    assert assert_exact(database) == 1


def test_a_key_with_a_case_insensitive_collation(database: psycopg.Connection) -> None:
    database.execute(
        "CREATE COLLATION case_insensitive (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    )
    database.execute("CREATE TABLE page (slug text COLLATE case_insensitive PRIMARY KEY, body text)")
    create_pipeline(database, content="body")
    database.execute("INSERT INTO page VALUES ('Alpha', 'one'), ('Beta', 'two')")
    settle(database)
    assert assert_exact(database) == 2
    database.execute("UPDATE page SET body = 'changed' WHERE slug = 'ALPHA'")
    database.execute("DELETE FROM page WHERE slug = 'BETA'")
    settle(database)
    assert assert_exact(database) == 1
    database.execute("UPDATE page SET slug = 'ALPHA', body = 'changed with its key'")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM page_embedding WHERE chunk = 'changed with its key'") == 1
    assert data_count(database, "chunk") == data_count(database, "v1") == 1


@pytest.mark.parametrize(
    ("column", "content", "first", "second"),
    [
        ("data jsonb", "data ->> 'text'", '{"text": "rivers"}', '{"text": "bread", "n": 1}'),
        ("data json", "data ->> 'text'", '{"text": "rivers"}', '{"text": "bread"}'),
        ("data text[]", "array_to_string(data, ' ')", "{rivers,flow}", "{bread,bakes}"),
        ("data text[]", "data[2]", "{rivers,flow}", "{bread,bakes}"),
        ("data xml", "data::text", "<a>rivers</a>", "<a>bread</a>"),
        ("data integer", "'number ' || data", "7", "8"),
        ("data bytea", "convert_from(data, 'UTF8')", "rivers", "bread"),
        ("data varchar(20)", "data", "rivers", "bread"),
        ("data char(20)", "data", "rivers", "bread"),
        ("data tsvector", "data::text", "rivers flow", "bread bakes"),
    ],
)
def test_inputs_of_any_type(database: psycopg.Connection, column: str, content: str, first: str, second: str) -> None:
    data_type = column.split(" ", 1)[1]
    database.execute(f"CREATE TABLE page (id integer PRIMARY KEY, {column}, other integer DEFAULT 0)")
    database.execute(f"INSERT INTO page VALUES (1, %s::text::{data_type}), (2, NULL)", (first,))
    create_pipeline(database, content=content)
    settle(database)
    assert assert_exact(database) == 1
    database.execute("UPDATE page SET other = 1")
    assert queued(database) == 0
    database.execute(f"UPDATE page SET data = %s::text::{data_type}", (second,))
    assert drain(database) == 2
    assert assert_exact(database) == 2


def test_an_update_of_a_jsonb_part_outside_the_content_enqueues_nothing(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, data jsonb)")
    database.execute("""INSERT INTO page VALUES (1, '{"text": "rivers", "seen": 1}')""")
    create_pipeline(database, content="data ->> 'text'")
    settle(database)
    database.execute("UPDATE page SET data = jsonb_set(data, '{seen}', '2')")
    assert queued(database) == 0


def test_a_generated_column_as_input(database: psycopg.Connection) -> None:
    database.execute(
        "CREATE TABLE page (id integer PRIMARY KEY, title text, body text, both_texts text"
        " GENERATED ALWAYS AS (title || ' ' || body) STORED)"
    )
    database.execute("INSERT INTO page VALUES (1, 'One', 'row')")
    create_pipeline(database, content="both_texts")
    settle(database)
    database.execute("UPDATE page SET body = 'changed underneath'")
    assert queued(database) == 1
    drain(database)
    assert assert_exact(database) == 1


def test_every_input_of_an_expression_is_watched(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database, content="concat_ws(' ', title, body, views)")
    settle(database)
    database.execute("UPDATE page SET views = 5 WHERE id = 1")
    assert drain(database) == 1
    assert_exact(database)


def test_reserved_words_and_quotes_as_names(database: psycopg.Connection) -> None:
    database.execute(
        'CREATE TABLE "Order" ("group" integer PRIMARY KEY, "select" text, "from ""here""" text, "ünï; --" text DEFAULT \'\')'
    )
    database.execute("""INSERT INTO "Order" VALUES (1, 'One', 'row'), (2, 'Two', 'rows')""")
    create_pipeline(
        database, name="order", source='"Order"', content='"select" || \' \' || "from ""here""" || "ünï; --"'
    )
    settle(database)
    assert assert_exact(database, "order") == 2
    database.execute("""UPDATE "Order" SET "select" = 'changed', "group" = 10 WHERE "group" = 1""")
    database.execute("""DELETE FROM "Order" WHERE "group" = 2""")
    settle(database)
    assert assert_exact(database, "order") == 1
    assert searching(database, "order", "changed row", k=1)[0][0] == "10"


def test_columns_named_like_those_of_the_view_and_the_generated_tables(database: psycopg.Connection) -> None:
    database.execute(
        "CREATE TABLE page (chunk_id integer, chunk text, embedding text, seq integer, source_row text, old text, new text,"
        " content text, key_chunk_id text, ordinality integer, max_bytes integer, before integer, accepted integer,"
        " PRIMARY KEY (chunk_id, seq))"
    )
    database.execute("INSERT INTO page VALUES (1, 'a', 'b', 1, 'c', 'd', 'e', 'f', 'g', 1, 1, 1, 1)")
    create_pipeline(
        database,
        content="concat_ws(' ', chunk, embedding, source_row, old, new, content, key_chunk_id, ordinality, before)",
    )
    settle(database)
    assert assert_exact(database) == 1
    for column in ("chunk", "embedding", "source_row", "old", "new", "content", "key_chunk_id"):
        database.execute(sql.SQL("UPDATE page SET {} = 'changed'").format(sql.Identifier(column)))
        assert drain(database) == 1
    database.execute("UPDATE page SET seq = 2, chunk_id = 2")
    settle(database)
    assert assert_exact(database) == 1
    assert searching(database, "page", "changed", k=1)[0][0] == '["2", "2"]'


def test_sixteen_hundred_columns(database: psycopg.Connection) -> None:
    columns = ", ".join(f"c{n} integer" for n in range(1597))
    database.execute(f"CREATE TABLE page (id integer PRIMARY KEY, title text, body text, {columns})")
    database.execute("INSERT INTO page (id, title, body) VALUES (1, 'One', 'row')")
    create_pipeline(database)
    settle(database)
    database.execute("UPDATE page SET c7 = 7")
    assert queued(database) == 0
    database.execute("UPDATE page SET body = 'changed'")
    assert drain(database) == 1
    assert assert_exact(database) == 1
    assert searching(database, "page", "changed", k=1)[0][0] == "1"


def test_a_large_value_is_captured(pages: psycopg.Connection) -> None:
    pages.execute("UPDATE page SET body = repeat('all work and no play makes a dull page. ', 20000) WHERE id = 1")
    assert drain(pages) == 1
    assert assert_exact(pages) > 500


def test_an_inheritance_child_does_not_disturb_its_parent(pages: psycopg.Connection) -> None:
    """Rows of a child table are not rows of the source: they are neither captured nor embedded."""
    pages.execute("CREATE TABLE draft () INHERITS (page)")
    pages.execute(
        "INSERT INTO draft (id, title, body) VALUES (500, 'Draft', 'of a child'), (2, 'Draft', 'of a known key')"
    )
    pages.execute("UPDATE page SET body = 'changed' WHERE id = 1")
    settle(pages)
    assert 500 not in chunked_keys(pages)
    assert scalar(pages, "SELECT count(*) FROM embedline.verify('page')") == 0
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    settle(pages)
    assert chunked_keys(pages) == set(range(1, 21))
    assert scalar(pages, "SELECT count(*) FROM page_embedding WHERE id = 2") == 1


def test_a_table_that_others_inherit_from_is_refused(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    database.execute("CREATE TABLE draft (PRIMARY KEY (id)) INHERITS (page)")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="other tables inherit from it") as caught:
        create_pipeline(database)
    assert caught.value.diag.message_hint
    create_pipeline(database, "draft", "draft")


_PARENTS = {
    "partition": (
        "CREATE TABLE whole (id integer, body text, PRIMARY KEY (id)) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF whole FOR VALUES FROM (0) TO (100)",
        "CREATE TABLE part (id integer PRIMARY KEY, body text)",
        "ALTER TABLE whole ATTACH PARTITION part FOR VALUES FROM (0) TO (100)",
    ),
    "child": (
        "CREATE TABLE whole (id integer NOT NULL, body text)",
        "CREATE TABLE part (PRIMARY KEY (id)) INHERITS (whole)",
        "CREATE TABLE part (id integer PRIMARY KEY, body text)",
        "ALTER TABLE part INHERIT whole",
    ),
}


def _write_through_the_parent(database: psycopg.Connection, kind: str) -> None:
    """Rows 1 to 4 of part become 2 to 4, row 2 changed, and through a partition's parent 5."""
    database.execute("UPDATE whole SET body = 'changed' WHERE id = 2")
    database.execute("DELETE FROM whole WHERE id = 1")
    database.execute(f"INSERT INTO {'whole' if kind == 'partition' else 'part'} VALUES (5, 'five')")
    settle(database)
    assert chunked_keys(database, "part") == {2, 3, 4, 5}
    assert assert_exact(database, "part", content="body") == 4
    assert scalar(database, "SELECT count(*) FROM embedline.verify('part')") == 0


@pytest.mark.parametrize("kind", _PARENTS)
def test_writes_through_the_parent_of_a_source_are_captured(database: psycopg.Connection, kind: str) -> None:
    parent, part, _, _ = _PARENTS[kind]
    database.execute(f"{parent}; {part}; INSERT INTO part SELECT n, 'row ' || n FROM generate_series(1, 4) AS n")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="a part of another table"):
        create_pipeline(database, "part", "part", "body", capture="statement")
    create_pipeline(database, "part", "part", "body")
    settle(database)
    _write_through_the_parent(database, kind)


@pytest.mark.parametrize("kind", _PARENTS)
@pytest.mark.parametrize("by_refresh", [False, True])
def test_a_source_that_gets_a_parent_gets_row_triggers(
    database: psycopg.Connection, kind: str, by_refresh: bool
) -> None:
    parent, _, table, attach = _PARENTS[kind]
    database.execute(f"{parent}; {table}; INSERT INTO part SELECT n, 'row ' || n FROM generate_series(1, 4) AS n")
    create_pipeline(database, "part", "part", "body")
    settle(database)
    if by_refresh:
        database.execute("ALTER EVENT TRIGGER embedline_follow_source DISABLE")
    database.execute(attach)
    if by_refresh:
        query = "SELECT example ->> 'hint' FROM embedline.verify('part') WHERE finding = 'capture_off'"
        database.execute(scalar(database, query))
    _write_through_the_parent(database, kind)


@pytest.mark.parametrize("kind", _PARENTS)
def test_an_upgrade_gives_row_triggers_to_a_source_with_a_parent(
    database: psycopg.Connection, database_dsn: str, kind: str
) -> None:
    parent, _, table, attach = _PARENTS[kind]
    database.execute(f"{parent}; {table}; INSERT INTO part SELECT n, 'row ' || n FROM generate_series(1, 4) AS n")
    create_pipeline(database, "part", "part", "body")
    settle(database)
    database.execute("ALTER EVENT TRIGGER embedline_follow_source DISABLE")
    database.execute(attach)
    database.execute("UPDATE embedline.pipeline SET code_version = 0")
    command.upgrade(alembic_config(database_dsn), "head")
    _write_through_the_parent(database, kind)


# --- who writes


def _application(database: psycopg.Connection, make_role: Callable[..., str]) -> str:
    role = make_role()
    database.execute(
        sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON page TO {}").format(sql.Identifier(role))
    )
    return role


@pytest.mark.parametrize("capture", ["statement", "row"])
def test_an_application_role_needs_no_right_of_ours_to_write(
    database: psycopg.Connection, connect: Connect, make_role: Callable[..., str], capture: str
) -> None:
    create_pages(database, 10)
    create_pipeline(database, filter="views >= 0", capture=capture)
    settle(database)
    application = connect(_application(database, make_role))
    application.execute("SET search_path = pg_temp")
    application.execute("INSERT INTO public.page VALUES (50, 'New', 'row')")
    application.execute("UPDATE public.page SET body = 'changed', id = id + 100 WHERE id = 1")
    application.execute("UPDATE public.page SET views = -1 WHERE id = 2")
    application.execute("DELETE FROM public.page WHERE id = 3")
    with application.cursor().copy("COPY public.page (id, title, body) FROM STDIN") as copy:
        copy.write_row((60, "Copied", "row"))
    settle(database)
    assert_exact(database)
    application.execute("TRUNCATE public.page")
    settle(database)
    assert_exact(database)


def test_a_function_in_the_content_that_the_application_may_not_call_does_not_fail_its_write(
    database: psycopg.Connection, connect: Connect, make_role: Callable[..., str]
) -> None:
    create_pages(database, 3)
    database.execute("CREATE SCHEMA internal")
    database.execute(
        "CREATE FUNCTION internal.render(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN RETURN upper($1); END $$;"
        "REVOKE ALL ON FUNCTION internal.render(text) FROM PUBLIC"
    )
    create_pipeline(database, content="internal.render(body)")
    application = connect(_application(database, make_role))
    application.execute("UPDATE page SET body = 'changed' WHERE id = 1")
    application.execute("INSERT INTO page VALUES (50, 'New', 'row')")
    settle(database)
    assert_exact(database)


def test_a_content_expression_that_fails_does_not_fail_the_write(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text)")
    database.execute("""INSERT INTO page VALUES (1, '{"text": "rivers"}'), (2, '{"text": "bread"}')""")
    create_pipeline(database, content="(body::jsonb) ->> 'text'")
    settle(database)
    database.execute("UPDATE page SET body = 'no json' WHERE id = 1")
    database.execute("INSERT INTO page VALUES (3, 'no json either')")
    database.execute("""UPDATE page SET body = '{"text": "rockets"}' WHERE id = 2""")
    drain(database)
    assert scalar(database, "SELECT count(*) FROM page_embedding WHERE id = 2 AND chunk = 'rockets'") == 1


# --- logical replication


def test_row_capture_works_in_replica_mode(database: psycopg.Connection, connect: Connect) -> None:
    """The apply worker of logical replication runs with session_replication_role = replica and fires row triggers only."""
    create_pages(database, 10)
    create_pipeline(database, capture="row")
    settle(database)
    apply_worker = connect(options="-c session_replication_role=replica")
    apply_worker.execute("INSERT INTO page VALUES (50, 'New', 'row')")
    apply_worker.execute("UPDATE page SET body = 'changed' WHERE id = 1")
    apply_worker.execute("UPDATE page SET views = 3 WHERE id = 2")
    apply_worker.execute("DELETE FROM page WHERE id = 3")
    assert queued(database) == 3
    settle(database)
    assert_exact(database)
    apply_worker.execute("TRUNCATE page")
    settle(database)
    assert_exact(database)


def test_row_capture_is_as_exact_as_statement_capture(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database, capture="row")
    settle(database)
    database.execute("UPDATE page SET views = 1, body = body")
    assert queued(database) == 0
    database.execute("UPDATE page SET id = id + 100 WHERE id <= 3")
    database.execute("DELETE FROM page WHERE id = 7")
    database.execute("INSERT INTO page VALUES (7, 'again', 'the same key')")
    settle(database)
    assert_exact(database)


def test_the_same_table_may_have_several_pipelines(pages: psycopg.Connection) -> None:
    create_pipeline(pages, name="title", content="title")
    settle(pages)
    pages.execute("UPDATE page SET body = 'changed' WHERE id = 1")
    assert (queued(pages, "page"), queued(pages, "title")) == (1, 0)
    pages.execute("DELETE FROM page WHERE id = 2")
    settle(pages)
    assert_exact(pages, "page")
    assert_exact(pages, "title")


def test_an_assertion_in_an_expression_fails_no_write(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    database.execute(
        "CREATE FUNCTION words(text) RETURNS text LANGUAGE plpgsql AS $$BEGIN"
        " ASSERT $1 <> 'poison', 'this text is poison'; RETURN $1; END$$"
    )
    create_pipeline(database, content="words(body)", filter="words(body) <> ''", index_method="none")
    settle(database)
    # PL/pgSQL's OTHERS leaves an assertion out.
    database.execute("UPDATE page SET body = 'poison' WHERE id = 1; UPDATE page SET id = 9 WHERE id = 1")
    database.execute("INSERT INTO page (id, body) VALUES (4, 'poison'); DELETE FROM page WHERE id = 4")
    database.execute("INSERT INTO page (id, body) VALUES (4, 'poison')")
    settle(database)
    assert scalar(database, "SELECT array_agg(error_code) FROM embedline.dead_letter") == ["P0004", "P0004"]
