"""A source whose key becomes another one: the pipeline follows it and pays for nothing again, or says what to run."""

from __future__ import annotations

import psycopg
import pytest

from generated_names import PAGE
from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from support import create_pages, create_pipeline, scalar, settle, wait_until
from working import create_stub_model, wait_for_in_flight, working

__all__ = ["running_stub", "stub"]

# Each is a way of people to turn an integer key into a bigint one by swapping columns.
_SWAPS = {
    "dropped": """
        ALTER TABLE page ADD COLUMN new_id bigint;
        UPDATE page SET new_id = id;
        ALTER TABLE page DROP COLUMN id CASCADE;
        ALTER TABLE page RENAME COLUMN new_id TO id;
        ALTER TABLE page ADD PRIMARY KEY (id)""",
    "kept": """
        ALTER TABLE page ADD COLUMN new_id bigint;
        UPDATE page SET new_id = id;
        ALTER TABLE page DROP CONSTRAINT page_pkey;
        ALTER TABLE page ALTER COLUMN id DROP NOT NULL;
        ALTER TABLE page RENAME COLUMN id TO old_id;
        ALTER TABLE page RENAME COLUMN new_id TO id;
        ALTER TABLE page ADD PRIMARY KEY (id)""",
    "with an index made before": """
        ALTER TABLE page ADD COLUMN new_id bigint NOT NULL DEFAULT 0;
        UPDATE page SET new_id = id;
        CREATE UNIQUE INDEX page_new_id_idx ON page (new_id);
        ALTER TABLE page DROP CONSTRAINT page_pkey, ADD CONSTRAINT page_pkey PRIMARY KEY USING INDEX page_new_id_idx;
        ALTER TABLE page ALTER COLUMN id DROP NOT NULL;
        ALTER TABLE page RENAME COLUMN id TO old_id;
        ALTER TABLE page RENAME COLUMN new_id TO id""",
}


@pytest.fixture
def paid(database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """Return a database with a pipeline of 40 rows whose provider counts what it is asked for."""
    create_stub_model(database, stub)
    create_pages(database, 40)
    create_pipeline(database, model="stub")
    settle(database)
    stub.forget()
    return database


def _rows_shown(connection: psycopg.Connection) -> list[tuple[object, ...]]:
    return connection.execute("SELECT id, chunk FROM page_embedding ORDER BY id").fetchall()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("swap", _SWAPS)
def test_a_swapped_key_column_is_followed_and_nothing_is_paid_again(
    paid: psycopg.Connection, stub: StubProvider, swap: str, at_once: bool
) -> None:
    before = [(int(str(row[0])), row[1]) for row in _rows_shown(paid)]
    if at_once:
        with paid.transaction():
            paid.execute(_SWAPS[swap].encode())
    else:
        for statement in _SWAPS[swap].split(";"):
            paid.execute(statement.encode())
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    # Which asks the model for a few vectors again.
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0
    stub.forget()
    paid.execute("INSERT INTO page (id, title, body) VALUES (5000000000, 'Far', 'away')")
    paid.execute("UPDATE page SET body = 'changed' WHERE id = 1; DELETE FROM page WHERE id = 2")
    settle(paid)
    assert stub.counts()["texts"] == 2
    paid.execute("SELECT embedline.refresh_pipeline('page')")
    settle(paid)
    shown = [(int(str(row[0])), row[1]) for row in _rows_shown(paid)]
    assert [row for row in shown if 2 < row[0] < 100] == [row for row in before if row[0] > 2]
    assert [row[0] for row in shown if row[0] < 3 or row[0] > 100] == [1, 5000000000]


_OTHER_KEYS = {
    "a uuid beside the integer": """
        ALTER TABLE page ADD COLUMN code uuid NOT NULL DEFAULT gen_random_uuid();
        ALTER TABLE page DROP CONSTRAINT page_pkey, ADD PRIMARY KEY (code)""",
    "a uuid in place of the integer": """
        ALTER TABLE page ADD COLUMN code uuid NOT NULL DEFAULT gen_random_uuid();
        ALTER TABLE page DROP COLUMN id CASCADE;
        ALTER TABLE page RENAME COLUMN code TO id;
        ALTER TABLE page ADD PRIMARY KEY (id)""",
    "another unique column": """
        ALTER TABLE page ADD COLUMN slug text COLLATE "C";
        UPDATE page SET slug = 'page, ' || id || '"';
        ALTER TABLE page ALTER COLUMN slug SET NOT NULL, ADD UNIQUE (slug);
        ALTER TABLE page DROP CONSTRAINT page_pkey;
        ALTER TABLE page ADD PRIMARY KEY (slug)""",
    "two columns": """
        ALTER TABLE page ADD COLUMN tenant integer NOT NULL DEFAULT 7;
        ALTER TABLE page DROP CONSTRAINT page_pkey, ADD PRIMARY KEY (tenant, id)""",
    "shifted numbers": """
        ALTER TABLE page ADD COLUMN new_id bigint;
        UPDATE page SET new_id = 41 - id;
        ALTER TABLE page DROP COLUMN id CASCADE;
        ALTER TABLE page RENAME COLUMN new_id TO id;
        ALTER TABLE page ADD PRIMARY KEY (id)""",
}


@pytest.mark.parametrize("change", _OTHER_KEYS)
def test_another_key_is_followed_and_nothing_is_paid_again(
    paid: psycopg.Connection, stub: StubProvider, change: str
) -> None:
    before = paid.execute("SELECT chunk_id, title, chunk, embedding::text FROM page_embedding ORDER BY 1").fetchall()
    paid.execute(_OTHER_KEYS[change].encode())
    settle(paid)
    after = paid.execute("SELECT chunk_id, title, chunk, embedding::text FROM page_embedding ORDER BY 1").fetchall()
    assert after == before
    assert stub.counts().get("texts", 0) == 0
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0
    assert paid.execute("SELECT state, last_error, remedy FROM embedline.status").fetchone() == ("active", None, None)
    assert len(paid.execute("SELECT key FROM embedline.search('page', 'Title 7', 5)").fetchall()) == 5


def test_rows_with_the_same_content_keep_a_chunk_each(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute("INSERT INTO page (id, title, body) SELECT n, 'same', 'text' FROM generate_series(101, 110) AS n")
    settle(paid)
    stub.forget()
    paid.execute(_OTHER_KEYS["a uuid in place of the integer"].encode())
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    assert scalar(paid, "SELECT count(DISTINCT id) FROM page_embedding") == 50
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_a_key_that_is_null_never_enters_the_queue(paid: psycopg.Connection, stub: StubProvider) -> None:
    create_pages(paid, 3, table="other")
    create_pipeline(paid, name="other", source="other")
    paid.execute("ALTER TABLE page DROP CONSTRAINT page_pkey; ALTER TABLE page ALTER COLUMN id DROP NOT NULL")
    paid.execute("INSERT INTO page (title, body) VALUES ('no', 'key'), ('none', 'either')")
    paid.execute("UPDATE page SET body = 'changed' WHERE id IS NULL OR id = 5")
    paid.execute("UPDATE page SET id = NULL WHERE id = 6; UPDATE page SET id = 6 WHERE title = 'Title 6'")
    assert scalar(paid, f"SELECT count(*) FROM {PAGE('inbox')} WHERE array_position(key_id, NULL) > 0") == 0
    settle(paid)
    assert stub.counts()["texts"] == 1
    assert scalar(paid, "SELECT count(*) FROM other_embedding") == 3
    state, error, remedy = paid.execute(
        "SELECT state, last_error, remedy FROM embedline.status WHERE pipeline = 'page'"
    ).fetchone() or ("", "", "")
    assert (state, remedy) == ("key lost", "ALTER TABLE public.page ADD PRIMARY KEY (id);")
    assert "public.page has no key any more" in error
    paid.execute("UPDATE page SET id = 90 WHERE title = 'no'; UPDATE page SET id = 91 WHERE title = 'none'")
    paid.execute(remedy.encode())
    settle(paid)
    assert stub.counts()["texts"] == 2
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 42
    assert scalar(paid, "SELECT state FROM embedline.status WHERE pipeline = 'page'") == "active"


def test_writes_go_through_while_the_source_has_lost_its_key(paid: psycopg.Connection, stub: StubProvider) -> None:
    paid.execute("ALTER TABLE page DROP COLUMN id CASCADE")
    paid.execute("INSERT INTO page (title, body) VALUES ('written', 'without a key')")
    paid.execute("UPDATE page SET body = 'changed' WHERE title = 'Title 1'; DELETE FROM page WHERE title = 'Title 2'")
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    state, remedy = paid.execute("SELECT state, remedy FROM embedline.status").fetchone() or ("", "")
    assert (state, remedy) == ("key lost", "ALTER TABLE public.page ADD PRIMARY KEY (...);")
    paid.execute("ALTER TABLE page ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY")
    settle(paid)
    assert stub.counts()["texts"] == 2
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 40
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_much_to_exchange_waits_for_the_statement_that_status_shows(
    paid: psycopg.Connection, stub: StubProvider
) -> None:
    paid.execute(
        f"INSERT INTO {PAGE('document')} (key_id, state, embedded_at)"
        " SELECT n, 'empty', now() FROM generate_series(1000, 21001) AS n"
    )
    paid.execute(_SWAPS["kept"].encode())
    paid.execute("INSERT INTO page (id, title, body) VALUES (60, 'only the', 'new key')")
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    state, error, remedy = paid.execute("SELECT state, last_error, remedy FROM embedline.status").fetchone() or (
        "",
        "",
        "",
    )
    assert (state, remedy) == ("key changed", "SELECT embedline.refresh_pipeline('page');")
    assert error.endswith(remedy)
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 40
    paid.execute(remedy.encode())
    settle(paid)
    assert stub.counts()["texts"] == 1
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 41
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_every_version_and_chunk_set_follows_the_key(paid: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(paid, stub, "second")
    paid.execute("SELECT embedline.add_embedding_version('page', 'second', chunking => 'none')")
    paid.execute(
        "SELECT embedline.create_pipeline('titles', 'page', 'title', 'stub', filter => 'id < 30', tenant => 'views::text')"
    )
    settle(paid)
    stub.forget()
    counts = "SELECT pipeline, version, vectors, missing FROM embedline.versions ORDER BY 1, 2"
    before = paid.execute(counts).fetchall()
    paid.execute(
        _SWAPS["dropped"]
        .replace("page DROP COLUMN id CASCADE", "page RENAME COLUMN id TO was")
        .replace("ADD PRIMARY KEY", "DROP CONSTRAINT page_pkey, ADD PRIMARY KEY")
        .encode()
    )
    settle(paid)
    assert stub.counts().get("texts", 0) == 0
    assert paid.execute(counts).fetchall() == before
    for pipeline in ("page", "titles"):
        assert scalar(paid, "SELECT count(*) FROM embedline.verify(%s)", (pipeline,)) == 0
    assert scalar(paid, "SELECT count(*) FROM page_embedding_v2") == 40


@pytest.mark.parametrize("change", ["a uuid in place of the integer", "a uuid beside the integer", "two columns"])
def test_a_worker_in_flight_outlives_the_exchange_of_the_key(
    paid: psycopg.Connection, stub: StubProvider, change: str
) -> None:
    with working(paid, 1, seconds=60):
        stub.behave(latency=0.5, remember=True)
        paid.execute("UPDATE page SET body = 'changed ' || id WHERE id <= 10")
        wait_for_in_flight(stub)
        paid.execute(_OTHER_KEYS[change].encode())
        stub.behave(remember=True)
        query = "SELECT pending = 0 AND backfill_complete FROM embedline.status"
        wait_until(lambda: scalar(paid, query), 30, "the worker has caught up")
    assert scalar(paid, "SELECT count(*) FROM page_embedding WHERE chunk LIKE '%changed%'") == 10
    assert scalar(paid, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_the_key_of_a_partitioned_source_is_followed(database: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(database, stub)
    database.execute(
        "CREATE TABLE page (id integer, region text, body text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);"
        "CREATE TABLE north PARTITION OF page FOR VALUES IN ('north'); CREATE TABLE south PARTITION OF page DEFAULT;"
        "INSERT INTO page SELECT n, (ARRAY['north', 'south'])[1 + n % 2], 'Body ' || n FROM generate_series(1, 20) AS n"
    )
    create_pipeline(database, content="body", model="stub")
    settle(database)
    stub.forget()
    database.execute(
        "ALTER TABLE page ADD COLUMN new_id bigint; UPDATE page SET new_id = id;"
        "ALTER TABLE page DROP CONSTRAINT page_pkey; ALTER TABLE page ADD PRIMARY KEY (new_id, region)"
    )
    settle(database)
    assert stub.counts().get("texts", 0) == 0
    database.execute("INSERT INTO north (id, region, new_id, body) VALUES (21, 'north', 5000000000, 'far')")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM page_embedding") == 21
    assert scalar(database, "SELECT count(*) FROM embedline.verify('page')") == 0


def test_what_cannot_be_put_back_keeps_no_write_from_going_through(
    paid: psycopg.Connection, stub: StubProvider
) -> None:
    paid.execute("CREATE FUNCTION found() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM page_embedding_v1; END")
    paid.execute(_SWAPS["kept"].encode())
    paid.execute("INSERT INTO page (id, title, body) VALUES (60, 'only the', 'new key')")
    settle(paid)
    state, remedy = paid.execute("SELECT state, remedy FROM embedline.status").fetchone() or ("", "")
    assert (state, remedy) == ("key changed", "SELECT embedline.refresh_pipeline('page');")
    with pytest.raises(psycopg.errors.DependentObjectsStillExist) as caught:
        paid.execute(remedy.encode())
    assert "function public.found()" in (caught.value.diag.message_detail or "")
    paid.execute("DROP FUNCTION found()")
    paid.execute(remedy.encode())
    settle(paid)
    assert stub.counts()["texts"] == 1
    assert scalar(paid, "SELECT count(*) FROM page_embedding") == 41
