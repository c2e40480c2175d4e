"""Changing a pipeline that is in use, and upgrading one that an earlier version created."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from alembic import command
from psycopg import errors

from generated_names import PAGE
from support import (
    alembic_config,
    assert_exact,
    create_pages,
    create_pipeline,
    drain,
    queued,
    scalar,
    searching,
    settle,
)

Connect = Callable[..., psycopg.Connection]


@pytest.fixture
def page(database: psycopg.Connection) -> psycopg.Connection:
    """Table page with 20 rows of two paragraphs, drained."""
    create_pages(database, 20)
    database.execute("UPDATE page SET body = body || E'.\\n\\nA second paragraph that all of the pages have.'")
    create_pipeline(database)
    settle(database)
    return database


def _alter(connection: psycopg.Connection, name: str = "page", **changes: Any) -> None:
    named = "".join(f", {parameter} => %s" for parameter in changes)
    connection.execute(f"SELECT embedline.alter_pipeline(%s{named})", (name, *changes.values()))


def _version(connection: psycopg.Connection, column: str) -> Any:
    return scalar(connection, f"SELECT {column} FROM embedline.version")


def _chunk_ids(connection: psycopg.Connection) -> list[int]:
    return list(scalar(connection, f"SELECT array_agg(chunk_id ORDER BY chunk_id) FROM {PAGE('chunk')}"))


# --- what is embedded again


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_tokens": 8},
        {"chunk_tokens": 8, "chunk_overlap": 2},
        {"chunking": "sentences", "chunk_tokens": 16},
        {"chunking": "fixed", "chunk_tokens": 5},
        {"chunking": "markdown", "chunk_tokens": 8, "document_prefix": "title"},
        {"chunking": "none"},
        {"content": "body"},
        {"content": "upper(title)", "filter": "id > 5"},
        {"filter": "id % 2 = 0"},
        {"document_prefix": "title || ': '"},
        {"content": "body", "document_prefix": "title || ': '", "filter": "views = 0", "tenant": "id % 3", "weight": 2},
    ],
    ids=str,
)
def test_an_altered_pipeline_holds_what_one_created_like_that_holds(
    page: psycopg.Connection, change: dict[str, Any]
) -> None:
    _alter(page, **change)
    assert _version(page, "state") == "backfilling"
    settle(page)
    assert_exact(page)
    page.execute("UPDATE page SET title = 'New title', body = 'A new body.' WHERE id IN (6, 7)")
    page.execute("UPDATE page SET views = 5 WHERE id = 8")
    page.execute("DELETE FROM page WHERE id = 10")
    page.execute("INSERT INTO page (id, title, body) VALUES (99, 'Late', 'A late row.')")
    settle(page)
    assert_exact(page)


def test_search_goes_on_with_the_old_chunks_until_the_new_ones_are_there(page: psycopg.Connection) -> None:
    before = searching(page, "page", "mountains", k=5)
    _alter(page, content="'Something else entirely ' || id")
    assert searching(page, "page", "mountains", k=5) == before
    settle(page)
    assert_exact(page)
    assert "Something else" in searching(page, "page", "mountains", k=1)[0][1]


def test_chunks_that_come_out_as_before_keep_their_vectors(page: psycopg.Connection) -> None:
    before = _chunk_ids(page)
    _alter(page, chunk_tokens=200)
    settle(page)
    assert _chunk_ids(page) == before
    _alter(page, filter="id > 0")
    settle(page)
    assert _chunk_ids(page) == before


def test_rows_enter_and_leave_with_an_altered_filter(page: psycopg.Connection) -> None:
    _alter(page, filter="id <= 5")
    settle(page)
    assert assert_exact(page) == 5
    _alter(page, drop=["filter"])
    settle(page)
    assert assert_exact(page) == 20


def test_a_dropped_prefix_and_tenant_leave_no_trace(page: psycopg.Connection) -> None:
    before = _version(page, "fingerprint")
    _alter(page, document_prefix="title", tenant="views")
    settle(page)
    assert_exact(page)
    _alter(page, drop=["document_prefix", "tenant"])
    settle(page)
    assert_exact(page)
    assert _version(page, "fingerprint") == before
    leftovers = page.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'embedline_data'::regnamespace AND proname ~ 'prefix|tenant'"
        " UNION ALL SELECT indexname FROM pg_indexes WHERE schemaname = 'embedline_data' AND indexname ~ 'tenant'"
    ).fetchall()
    assert leftovers == []
    page.execute("SELECT embedline.drop_pipeline('page')")


def test_only_what_decides_chunks_changes_the_fingerprint(page: psycopg.Connection) -> None:
    seen = [_version(page, "fingerprint")]
    for change in ({"chunk_tokens": 8}, {"document_prefix": "title"}, {"chunking": "sentences"}):
        _alter(page, **change)
        seen.append(_version(page, "fingerprint"))
    assert len(set(seen)) == 4
    for change in ({"filter": "id > 3"}, {"content": "body"}, {"tenant": "views"}, {"weight": 3}):
        _alter(page, **change)
        assert _version(page, "fingerprint") == seen[-1]


def test_weight_and_tenant_need_no_backfill(page: psycopg.Connection) -> None:
    _alter(page, weight=2.5)
    _alter(page, tenant="views")
    assert _version(page, "state") == "complete"
    assert scalar(page, "SELECT weight FROM embedline.pipeline") == 2.5
    assert page.execute(f"SELECT * FROM {PAGE('tenant')}(ARRAY[3])").fetchall() == [(1, "0")]
    assert drain(page) == 0


def test_nothing_to_change_is_said(page: psycopg.Connection) -> None:
    notices: list[str] = []
    page.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary or ""))
    _alter(page)
    _alter(page, weight=1, chunking="recursive", drop=["filter"])
    assert len(notices) == 2
    assert all("nothing has changed" in notice for notice in notices)
    assert _version(page, "state") == "complete"


# --- capture


def test_capture_follows_the_columns_of_the_new_expressions(page: psycopg.Connection) -> None:
    _alter(page, content="body || views")
    settle(page)
    page.execute("UPDATE page SET title = 'not in it any more'")
    assert queued(page) == 0
    page.execute("UPDATE page SET views = 3 WHERE id <= 2")
    assert queued(page) == 2
    settle(page)
    assert_exact(page)


def test_kept_expressions_survive_a_renamed_column(page: psycopg.Connection) -> None:
    page.execute('ALTER TABLE page RENAME COLUMN title TO "Head, ""line"""')
    _alter(page, filter="id <= 10")
    settle(page)
    content = '"Head, ""line""" || E\'\\n\\n\' || body'
    assert assert_exact(page, content=content) == 10
    page.execute('UPDATE page SET "Head, ""line""" = \'Renamed\' WHERE id = 2')
    assert queued(page) == 1
    settle(page)
    assert_exact(page, content=content)


@pytest.mark.parametrize("capture", ["statement", "row"])
def test_triggers_keep_their_kind(database: psycopg.Connection, capture: str) -> None:
    create_pages(database, 5)
    create_pipeline(database, capture=capture)
    query = "SELECT tgname::text, tgenabled::text, tgtype FROM pg_trigger WHERE tgrelid = 'page'::regclass ORDER BY 1"
    before = database.execute(query).fetchall()
    _alter(database, content="body")
    assert database.execute(query).fetchall() == before
    database.execute("SET session_replication_role = replica")
    database.execute("UPDATE page SET body = 'replicated' WHERE id = 1")
    database.execute("RESET session_replication_role")
    assert queued(database) == (1 if capture == "row" else 0)


def test_a_partitioned_source_is_altered_too(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, title text, body text) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE page_low PARTITION OF page FOR VALUES FROM (0) TO (10)")
    database.execute("CREATE TABLE page_high PARTITION OF page FOR VALUES FROM (10) TO (20)")
    database.execute("INSERT INTO page SELECT n, 'Title ' || n, 'Body ' || n FROM generate_series(0, 19) AS n")
    create_pipeline(database)
    settle(database)
    _alter(database, content="body")
    settle(database)
    assert assert_exact(database) == 20
    database.execute("UPDATE page_low SET title = 'unrelated'")
    assert queued(database) == 0
    database.execute("UPDATE page_high SET body = 'through a leaf' WHERE id = 12")
    assert queued(database) == 1
    settle(database)
    assert_exact(database)


def test_a_change_that_waits_is_embedded_by_the_new_recipe(page: psycopg.Connection) -> None:
    page.execute("UPDATE page SET body = 'waits' WHERE id <= 3")
    _alter(page, content="'new: ' || body")
    settle(page)
    assert_exact(page)


def test_altering_during_the_backfill_begins_it_anew(database: psycopg.Connection) -> None:
    create_pages(database, 50)
    create_pipeline(database)
    assert scalar(database, "SELECT embedline.embed_pending(10)") == 10
    _alter(database, chunk_tokens=8)
    settle(database)
    assert_exact(database)


# --- locks, rights, errors


def test_an_alteration_that_is_rolled_back_changes_nothing(page: psycopg.Connection) -> None:
    with page.transaction(force_rollback=True):
        _alter(page, content="body", document_prefix="title", chunk_tokens=8)
    page.execute("UPDATE page SET title = 'captured as before' WHERE id = 1")
    assert queued(page) == 1
    settle(page)
    assert_exact(page)


def test_an_alteration_does_not_wait_for_ever_behind_an_open_write(page: psycopg.Connection, connect: Connect) -> None:
    writer = connect(autocommit=False)
    writer.execute("UPDATE page SET views = 1 WHERE id = 1")
    _alter(page, chunk_tokens=8)
    page.execute("SET lock_timeout = '200ms'")
    with pytest.raises(errors.LockNotAvailable):
        _alter(page, content="body")
    writer.rollback()
    _alter(page, content="body")
    settle(page)
    assert_exact(page)


def test_only_the_sources_owner_may_alter(
    page: psycopg.Connection, connect: Connect, make_role: Callable[..., str]
) -> None:
    with pytest.raises(errors.InsufficientPrivilege, match="owner"):
        _alter(connect(make_role("embedline_admin")), weight=2)
    with pytest.raises(errors.InsufficientPrivilege):
        _alter(connect(make_role("embedline_worker")), weight=2)
    with pytest.raises(errors.InsufficientPrivilege):
        connect(make_role("embedline_admin")).execute("SELECT embedline._regenerate_pipelines()")


def test_the_new_functions_belong_to_the_sources_owner(
    database: psycopg.Connection, connect: Connect, make_role: Callable[..., str]
) -> None:
    owner = make_role("embedline_admin")
    create_pages(database, 5)
    database.execute(f'ALTER TABLE page OWNER TO "{owner}"; GRANT CREATE ON SCHEMA public TO "{owner}"')
    admin = connect(owner)
    create_pipeline(admin)
    _alter(admin, content="body", document_prefix="title", tenant="views")
    owners = (
        "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname ~ '^page_' AND proname !~ '_capture_|_serving'"
        # These name our tables, and evaluate nothing of the owner's.
        " AND pronamespace <> 'embedline_search'::regnamespace"
    )
    assert [row[0].strip('"') for row in database.execute(owners)] == [owner]
    public = (
        "SELECT count(*) FROM pg_proc WHERE proname ~ '^page_' AND has_function_privilege('public', oid, 'EXECUTE')"
    )
    assert scalar(database, public) == 0
    settle(database)
    assert_exact(database)
    database.execute(f'REVOKE CREATE ON SCHEMA public FROM "{owner}"')


@pytest.mark.parametrize(
    ("change", "sqlstate", "words"),
    [
        ({"name": "nope"}, "42704", "nope"),
        ({"drop": ["content"]}, "22023", "content"),
        ({"drop": ["colour"]}, "22023", "colour"),
        ({"drop": ["filter"], "filter": "true"}, "22023", "dropped at the same time"),
        ({"content": "'a constant'"}, "22023", "names no column"),
        ({"filter": "views"}, "22023", "filter"),
        ({"document_prefix": "body; SELECT 1"}, "22023", "semicolon"),
        ({"chunking": "by magic"}, "22023", "chunking"),
        ({"chunk_overlap": 1000}, "22023", "chunk_overlap"),
        ({"chunk_tokens": -1}, "22023", "chunk_tokens"),
        ({"chunking_options": '{"percentile": 50}'}, "22023", "percentile"),
        ({"weight": -1}, "22023", "weight"),
    ],
)
def test_a_wrong_value_is_refused_and_changes_nothing(
    page: psycopg.Connection, change: dict[str, Any], sqlstate: str, words: str
) -> None:
    before = page.execute("SELECT * FROM embedline.pipeline, embedline.version").fetchall()
    with pytest.raises(psycopg.Error, match=words) as caught:
        _alter(page, **change)
    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.message_hint
    assert page.execute("SELECT * FROM embedline.pipeline, embedline.version").fetchall() == before


# --- upgrades

# What version 1 of the generated code returned.
_OLD_READ = f"""
    DROP FUNCTION {PAGE("read")}(integer[], bigint);
    CREATE FUNCTION {PAGE("read")}(key_id integer[], max_bytes bigint)
    RETURNS TABLE (ordinality bigint, accepted boolean, deferred boolean, content text, content_hash bytea)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
    SELECT r.ordinality, r.accepted, false, r.content, sha256(convert_to(r.content, 'UTF8'))
    FROM (
        SELECT wanted.ordinality, coalesce({PAGE("filter")}(source_row.views), false) AS accepted,
            {PAGE("content")}(source_row.title, source_row.body) AS content
        FROM unnest(key_id) WITH ORDINALITY AS wanted (key_id, ordinality)
        JOIN public.page AS source_row ON source_row.id = wanted.key_id
    ) AS r;
    END;
"""


def test_a_pipeline_of_an_earlier_version_is_brought_up_to_date(
    database: psycopg.Connection, database_dsn: str, connect: Connect
) -> None:
    create_pages(database, 20)
    create_pipeline(database, filter="views < 10")
    settle(database)
    recipe = scalar(database, "SELECT ('x' || left(fingerprint, 8))::bit(32)::integer FROM embedline.version")
    database.execute("UPDATE page SET body = 'changed before the upgrade' WHERE id <= 2")
    command.downgrade(alembic_config(database_dsn), "0001")
    database.execute(_OLD_READ)
    database.execute("ALTER TABLE page RENAME COLUMN title TO headline")
    command.upgrade(alembic_config(database_dsn), "head")
    recipes = database.execute(f"SELECT DISTINCT recipe FROM {PAGE('document')}").fetchall()
    assert recipes == [(recipe,)], "what was embedded before counts as of its version's recipe"
    upgraded = connect()
    content = "headline || E'\\n\\n' || body"
    assert drain(upgraded) == 2
    settle(upgraded)
    assert_exact(upgraded, content=content)
    _alter(upgraded, document_prefix="headline", chunk_tokens=8)
    settle(upgraded)
    assert_exact(upgraded, content=content)
    upgraded.execute("SELECT embedline.drop_pipeline('page')")


def test_an_upgrade_leaves_functions_of_now_alone(page: psycopg.Connection, database_dsn: str) -> None:
    query = "SELECT oid FROM pg_proc WHERE proname ~ '^page_' ORDER BY oid"
    before = page.execute(query).fetchall()
    command.upgrade(alembic_config(database_dsn), "head")
    assert page.execute(query).fetchall() == before


def test_an_upgrade_leaves_the_view_of_a_version_to_what_depends_on_it(
    page: psycopg.Connection, database_dsn: str
) -> None:
    page.execute("CREATE VIEW mine AS SELECT id, chunk FROM page_embedding_v1")
    page.execute("UPDATE embedline.pipeline SET code_version = 0")
    command.upgrade(alembic_config(database_dsn), "head")
    assert scalar(page, "SELECT count(*) FROM mine") == scalar(page, "SELECT count(*) FROM page_embedding")
    assert scalar(page, "SELECT code_version > 0 FROM embedline.pipeline")


def test_alterations_beside_writers_and_workers_leave_nothing_outdated(
    page: psycopg.Connection, connect: Connect
) -> None:
    """A row that a worker read before an alteration must not be written by the old recipe after it."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run(statement: str) -> None:
        connection = connect()
        try:
            while not stop.is_set():
                connection.execute(statement)
        except BaseException as error:
            failures.append(error)

    statements = (
        "UPDATE page SET body = body || ' more' WHERE id = 1 + (random() * 19)::integer",
        "DELETE FROM page WHERE id = 20",
        "INSERT INTO page (id, title, body) VALUES (20, 'Back', 'Here again.') ON CONFLICT DO NOTHING",
        "CALL embedline.run_worker(max_seconds => 2, until_idle => true)",
        "CALL embedline.run_worker(max_seconds => 2, until_idle => true)",
    )
    threads = [threading.Thread(target=run, args=(statement,)) for statement in statements]
    for thread in threads:
        thread.start()
    try:
        for n in range(10):
            _alter(page, chunk_tokens=8 + n, content="body" if n % 2 else "title || body")
            _alter(page, document_prefix="title") if n % 3 else _alter(page, chunking="sentences")
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    settle(page)
    assert_exact(page)
