"""Creating, changing and dropping pipelines, and their backfill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import errors

from generated_names import Generated
from support import (
    assert_exact,
    create_pages,
    create_pipeline,
    data_count,
    drain,
    embed_static,
    queued,
    scalar,
    searching,
    settle,
)

Connect = Callable[..., psycopg.Connection]


def _status(connection: psycopg.Connection, column: str, name: str = "page") -> Any:
    return scalar(connection, f"SELECT {column} FROM embedline.status WHERE pipeline = %s", (name,))


@pytest.fixture
def source(database: psycopg.Connection) -> psycopg.Connection:
    """Table page with 20 rows and no pipeline."""
    create_pages(database, 20)
    return database


# --- creation


def test_creation_returns_the_routing_view_and_embeds_nothing(source: psycopg.Connection) -> None:
    assert scalar(source, "SELECT to_regclass(%s) IS NOT NULL", (create_pipeline(source),))
    assert queued(source) == 0
    assert data_count(source, "document") == 0
    assert _status(source, "backfill_done") == 0
    assert drain(source) == 20
    settle(source)
    assert _status(source, "(pending, backfill_done = backfill_total, backfill_complete)::text") == "(0,t,t)"
    assert assert_exact(source) == 20


def test_the_unqualified_call_works_in_a_fresh_session(source: psycopg.Connection, connect: Connect) -> None:
    create_pipeline(source)
    assert scalar(connect(), "SELECT embed_pending(1000)") == 20


def test_creation_that_is_rolled_back_leaves_nothing(source: psycopg.Connection) -> None:
    with source.transaction(force_rollback=True):
        create_pipeline(source)
    assert scalar(source, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'page'::regclass") == 0
    create_pipeline(source)
    settle(source)
    assert_exact(source)


def test_an_empty_table_is_complete_at_once(database: psycopg.Connection) -> None:
    create_pages(database, 0)
    create_pipeline(database)
    assert drain(database) == 0
    assert _status(database, "backfill_complete")


@pytest.mark.parametrize(
    ("change", "sqlstate", "words"),
    [
        ({"name": "Page"}, "22023", "cannot name a pipeline"),
        ({"name": "1page"}, "22023", "cannot name a pipeline"),
        ({"name": "p" * 41}, "22023", "cannot name a pipeline"),
        ({"name": ""}, "22023", "cannot name a pipeline"),
        ({"name": 'a"b; DROP TABLE page; --'}, "22023", "cannot name a pipeline"),
        ({"name": "taken"}, "42710", "already"),
        ({"source": "nowhere"}, "42P01", "nowhere"),
        ({"source": "a_view"}, "22023", "not a permanent table"),
        ({"source": "a_temporary_table"}, "22023", "not a permanent table"),
        ({"source": "embedline.model"}, "22023", "table of the system"),
        ({"source": "pg_class"}, "22023", "table of the system"),
        ({"content": "no_such_column"}, "22023", "no_such_column"),
        ({"content": "title ||"}, "22023", "content"),
        ({"content": "'a constant'"}, "22023", "names no column"),
        ({"content": "(SELECT max(title) FROM page)"}, "22023", "subquery"),
        ({"content": "max(body)"}, "22023", "aggregate"),
        ({"content": "row_number() OVER (ORDER BY id)"}, "22023", "window"),
        ({"content": "generate_series(1, id)"}, "22023", "set-returning"),
        ({"content": "title, body"}, "22023", "content"),
        ({"content": "tableoid::text || body"}, "22023", "tableoid"),
        ({"filter": "tableoid > 0"}, "22023", "tableoid"),
        ({"content": "body; SELECT 1"}, "22023", "semicolon"),
        ({"content": "random()::text || body"}, "22023", "volatile"),
        ({"filter": "views"}, "22023", "filter"),
        ({"filter": "views > (SELECT 1)"}, "22023", "subquery"),
        ({"model": "no-such-model"}, "42704", "no-such-model"),
        ({"chunking": "by magic"}, "22023", "chunking"),
        ({"column_type": "bit"}, "22023", "column_type"),
        ({"distance": "manhattan"}, "22023", "distance"),
        ({"index_method": "btree"}, "22023", "index_method"),
        ({"capture": "never"}, "22023", "capture"),
        ({"chunk_tokens": 0}, "22023", "chunk_tokens"),
        ({"chunk_tokens": 100_000, "model": "minilm"}, "22023", "chunk_tokens"),
        ({"chunk_tokens": 10, "chunk_overlap": 10}, "22023", "chunk_overlap"),
        ({"chunk_overlap": -1}, "22023", "chunk_overlap"),
        ({"chunking": "none", "chunk_overlap": -1}, "22023", "chunk_overlap"),
        ({"index_options": '{"m": 1}'}, "22023", '"m"'),
        ({"index_options": '{"lists": 10}'}, "22023", '"lists"'),
        ({"index_options": '{"m": true}'}, "22023", '"m"'),
        ({"index_method": "ivfflat", "index_options": '{"m": 16}'}, "22023", '"m"'),
        ({"index_method": "ivfflat", "index_options": '{"lists": true}'}, "22023", '"lists"'),
        ({"index_method": "ivfflat", "index_options": '{"lists": 32769}'}, "22023", '"lists"'),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_sqlstate_and_a_hint(
    source: psycopg.Connection, change: dict[str, Any], sqlstate: str, words: str
) -> None:
    source.execute("CREATE VIEW a_view AS TABLE page")
    source.execute("CREATE TEMPORARY TABLE a_temporary_table (id integer PRIMARY KEY, title text, body text)")
    if change.get("name") == "taken":
        create_pipeline(source, name="taken")
    with pytest.raises(psycopg.Error, match=words) as caught:
        create_pipeline(source, **change)
    assert caught.value.sqlstate == sqlstate
    if sqlstate in ("22023", "42704", "42710") and "system" not in words and words != "chunk_overlap":
        assert caught.value.diag.message_hint
    assert scalar(source, "SELECT count(*) FROM embedline.pipeline WHERE name <> 'taken'") == 0


@pytest.mark.parametrize("function", ["drop_pipeline", "pause_pipeline", "resume_pipeline", "refresh_pipeline"])
def test_a_pipeline_that_does_not_exist_is_named(source: psycopg.Connection, function: str) -> None:
    with pytest.raises(errors.UndefinedObject, match='no pipeline "nope"') as caught:
        source.execute(f"SELECT embedline.{function}('nope')")
    assert "embedline.status" in (caught.value.diag.message_hint or "")


def test_a_view_of_the_users_is_never_replaced(source: psycopg.Connection) -> None:
    source.execute("CREATE VIEW page_embedding AS SELECT 1 AS mine")
    with pytest.raises(errors.DuplicateObject, match="page_embedding"):
        create_pipeline(source)
    assert scalar(source, "SELECT mine FROM page_embedding") == 1


def test_creation_does_not_wait_for_ever_behind_an_open_write(source: psycopg.Connection, connect: Connect) -> None:
    writer = connect(autocommit=False)
    writer.execute("UPDATE page SET views = 1 WHERE id = 1")
    source.execute("SET lock_timeout = '200ms'")
    with pytest.raises(errors.LockNotAvailable):
        create_pipeline(source)
    writer.rollback()
    create_pipeline(source)


def test_settings_of_the_session_do_not_change_what_an_expression_means(source: psycopg.Connection) -> None:
    source.execute("CREATE SCHEMA words; CREATE FUNCTION words.loud(text) RETURNS text LANGUAGE sql IMMUTABLE"
                   " AS $$ SELECT upper($1) $$")  # fmt: skip
    source.execute(
        "SET search_path = words, public; SET quote_all_identifiers = on; SET standard_conforming_strings = off"
    )
    create_pipeline(source, content="loud(body) || '!'")
    source.execute("RESET ALL")
    settle(source)
    assert_exact(source)
    assert scalar(source, "SELECT chunk FROM page_embedding WHERE id = 1").startswith("BODY NUMBER 1")


# --- recipes


@pytest.mark.parametrize("column_type", ["vector", "halfvec"])
@pytest.mark.parametrize("distance", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("index_method", ["hnsw", "none"])
def test_search_ranks_as_an_exact_computation_does(
    source: psycopg.Connection, column_type: str, distance: str, index_method: str
) -> None:
    create_pipeline(source, column_type=column_type, distance=distance, index_method=index_method)
    settle(source)
    assert_exact(source)
    statement = scalar(source, "SELECT embedline.index_statement('page')")
    assert (statement is None) == (index_method == "none")
    if statement:
        source.execute(statement)
        assert scalar(source, "SELECT embedline.index_statement('page')") is None
    assert _status(source, "index_state") == ("valid" if statement else "none")
    found = searching(source, "page", "the height of mountains", k=5)
    rows = source.execute("SELECT id::text, title || E'\\n\\n' || body FROM page").fetchall()
    matrix, query = embed_static([row[1] for row in rows]), embed_static(["the height of mountains"])[0]
    if distance == "l2":
        scores = -np.linalg.norm(matrix - query, axis=1)
    else:
        scores = (matrix @ query) / np.linalg.norm(matrix, axis=1) / np.linalg.norm(query)
    best = np.sort(scores)[::-1][:5]
    assert np.allclose([row[2] for row in found], best, atol=2e-2 if column_type == "halfvec" else 1e-3)
    assert [row[2] for row in found] == sorted((row[2] for row in found), reverse=True)


def test_chunking_none_keeps_each_row_whole(source: psycopg.Connection) -> None:
    source.execute("UPDATE page SET body = repeat(body || ' ', 200)")
    create_pipeline(source, chunking="none")
    settle(source)
    assert assert_exact(source) == 20


@pytest.mark.parametrize(("tokens", "overlap"), [(16, 0), (16, 4), (1, 0)])
def test_chunk_size_and_overlap_are_those_asked_for(source: psycopg.Connection, tokens: int, overlap: int) -> None:
    source.execute("UPDATE page SET body = repeat(body || '. ', 5)")
    create_pipeline(source, chunk_tokens=tokens, chunk_overlap=overlap)
    settle(source)
    assert assert_exact(source) > 60
    source.execute("UPDATE page SET body = 'A new beginning. ' || body WHERE id = 1")
    drain(source)
    assert_exact(source)


def test_repeated_paragraphs_have_a_chunk_each(source: psycopg.Connection) -> None:
    source.execute("UPDATE page SET body = repeat(E'The same paragraph again.\\n\\n', 20)")
    create_pipeline(source, chunk_tokens=8)
    settle(source)
    assert assert_exact(source) >= 400


def test_per_document_gives_each_row_once(source: psycopg.Connection) -> None:
    source.execute("UPDATE page SET body = repeat(E'Rivers flow to the sea.\\n\\n', 20) WHERE id <= 5")
    create_pipeline(source, chunk_tokens=8)
    settle(source)
    found = searching(source, "page", "rivers flow", k=10, per_document=True)
    assert len({row[0] for row in found}) == len(found) == 10
    assert {row[0] for row in found[:5]} == {"1", "2", "3", "4", "5"}


# --- filter


def test_rows_enter_and_leave_with_the_filter(source: psycopg.Connection) -> None:
    create_pipeline(source, filter="views < 10 AND title <> 'Title 3'")
    settle(source)
    assert assert_exact(source) == 19
    source.execute("UPDATE page SET views = 5")
    assert queued(source) == 0
    source.execute("UPDATE page SET views = 50 WHERE id <= 10")
    settle(source)
    assert assert_exact(source) == 10
    source.execute("UPDATE page SET views = 0 WHERE id <= 5")
    settle(source)
    assert assert_exact(source) == 14
    source.execute("DELETE FROM page WHERE id > 15")
    settle(source)
    assert_exact(source)


def test_a_filter_that_is_null_rejects(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text, public boolean)")
    database.execute("INSERT INTO page VALUES (1, 'yes', true), (2, 'no', false), (3, 'unknown', NULL)")
    create_pipeline(database, content="body", filter="public")
    settle(database)
    assert assert_exact(database) == 1
    database.execute("UPDATE page SET public = NOT coalesce(public, false)")
    settle(database)
    assert assert_exact(database) == 2


def test_the_content_of_a_rejected_row_is_never_evaluated(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, divisor integer)")
    database.execute("INSERT INTO page VALUES (1, 0), (2, 5)")
    create_pipeline(database, content="'quotient ' || 100 / divisor", filter="divisor <> 0")
    settle(database)
    assert assert_exact(database, content="CASE WHEN divisor <> 0 THEN 'quotient ' || 100 / divisor END") == 1


# --- pause, resume, refresh, drop


def test_a_paused_pipeline_captures_and_waits(source: psycopg.Connection) -> None:
    create_pipeline(source)
    settle(source)
    source.execute("SELECT embedline.pause_pipeline('page')")
    source.execute("UPDATE page SET body = 'changed while paused' WHERE id <= 4")
    assert drain(source) == 0
    assert (_status(source, "state"), _status(source, "pending")) == ("paused", 4)
    source.execute("DELETE FROM page WHERE id = 20")
    assert len(searching(source, "page", "rivers", k=50)) == 19
    source.execute("SELECT embedline.resume_pipeline('page')")
    assert drain(source) == 4
    assert_exact(source)


def test_what_depends_on_a_view_is_named_where_the_pipeline_is_dropped(source: psycopg.Connection) -> None:
    create_pipeline(source, chunk_overlap=None)
    source.execute("CREATE VIEW short AS SELECT id FROM page_embedding")
    with pytest.raises(psycopg.errors.DependentObjectsStillExist) as caught:
        source.execute("SELECT embedline.drop_pipeline('page')")
    assert "short" in str(caught.value.diag.message_detail)
    source.execute(str(caught.value.diag.message_hint).partition("; ")[2].partition(" drops")[0].encode())
    source.execute("SELECT embedline.drop_pipeline('page')")


def test_a_pause_stops_the_backfill_too(source: psycopg.Connection) -> None:
    create_pipeline(source)
    source.execute("SELECT embedline.pause_pipeline('page')")
    assert drain(source) == 0
    source.execute("SELECT embedline.resume_pipeline('page')")
    settle(source)
    assert_exact(source)


def test_a_refresh_keeps_the_grants_owner_and_comment_of_the_view(
    source: psycopg.Connection, make_role: Callable[..., str]
) -> None:
    create_pipeline(source)
    settle(source)
    role = make_role()
    source.execute(f'GRANT SELECT ON page_embedding TO "{role}"')
    source.execute("COMMENT ON VIEW page_embedding IS 'ours'")
    source.execute("CREATE VIEW on_top AS SELECT id, chunk FROM page_embedding")
    source.execute("ALTER TABLE page ADD COLUMN language text")
    source.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(source, "SELECT has_table_privilege(%s, 'page_embedding', 'SELECT')", (role,))
    assert scalar(source, "SELECT obj_description('page_embedding'::regclass)") == "ours"
    assert scalar(source, "SELECT reloptions::text FROM pg_class WHERE oid = 'page_embedding'::regclass") == (
        "{security_invoker=true}"
    )
    assert scalar(source, "SELECT count(*) FROM page_embedding WHERE language IS NULL") == 20


def test_a_refresh_after_a_rename_keeps_grants_too(source: psycopg.Connection, make_role: Callable[..., str]) -> None:
    create_pipeline(source)
    settle(source)
    role = make_role()
    source.execute(f'GRANT SELECT ON page_embedding TO "{role}"')
    source.execute("ALTER TABLE page RENAME COLUMN views TO hits")
    source.execute("ALTER TABLE page ADD COLUMN language text")
    source.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(source, "SELECT has_table_privilege(%s, 'page_embedding', 'SELECT')", (role,))
    assert scalar(source, "SELECT count(hits) + count(*) FILTER (WHERE language IS NULL) FROM page_embedding") == 40


def test_a_refresh_makes_a_dropped_view_anew(source: psycopg.Connection) -> None:
    create_pipeline(source, index_method="none")
    settle(source)
    source.execute("DROP VIEW page_embedding, page_embedding_v1")
    # The ranking needs no view, what reads all vectors does.
    assert len(searching(source, "page", "rivers", k=3)) == 3
    with pytest.raises(errors.UndefinedObject, match="view of version 1") as caught:
        source.execute("SELECT * FROM embedline.evaluate('page', 1)")
    assert "refresh_pipeline" in (caught.value.diag.message_hint or "")
    source.execute("SELECT embedline.refresh_pipeline('page')")
    assert len(searching(source, "page", "rivers", k=3)) == 3
    assert scalar(source, "SELECT count(*) FROM page_embedding") == 20


def test_dropping_leaves_the_source_as_it_was(source: psycopg.Connection) -> None:
    before = source.execute("TABLE page ORDER BY id").fetchall()
    create_pipeline(source, filter="views = 0")
    create_pipeline(source, name="page_title", content="title")
    settle(source)
    source.execute("UPDATE page SET body = ' ', title = ' ' WHERE id = 1")
    drain(source)
    source.execute("SELECT embedline.drop_pipeline('page')")
    assert_exact(source, "page_title")  # whose name begins with the other's
    source.execute("SELECT embedline.drop_pipeline('page_title')")
    left = "SELECT count(*) FROM pg_class WHERE relnamespace = 'embedline_data'::regnamespace"
    assert scalar(source, left) == 0
    # Two functions there belong to no pipeline.
    left = "SELECT proname FROM pg_proc WHERE pronamespace = 'embedline_data'::regnamespace ORDER BY 1"
    assert source.execute(left).fetchall() == [("_hold_postings",), ("_row_state",)]
    assert scalar(source, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'page'::regclass") == 0
    assert scalar(source, "SELECT count(*) FROM embedline.dead_letter") == 0
    source.execute("UPDATE page SET title = 'Title 1', body = %s WHERE id = 1", (before[0][2],))
    assert source.execute("TABLE page ORDER BY id").fetchall() == before
    create_pipeline(source)
    settle(source)
    assert_exact(source)


def test_a_pipeline_whose_table_is_gone_can_be_dropped(source: psycopg.Connection) -> None:
    create_pipeline(source)
    settle(source)
    source.execute("DROP TABLE page CASCADE")
    source.execute("SELECT embedline.drop_pipeline('page')")
    assert scalar(source, "SELECT count(*) FROM pg_class WHERE relnamespace = 'embedline_data'::regnamespace") == 0


def test_a_pipeline_whose_table_is_gone_does_not_stop_the_others(source: psycopg.Connection) -> None:
    create_pages(source, 5, table="gone")
    create_pipeline(source, name="gone", source="gone")
    create_pipeline(source)
    source.execute("DROP TABLE gone CASCADE")
    drain(source)
    assert scalar(source, "SELECT count(*) FROM page_embedding") == 20


def test_a_backfill_that_cannot_be_closed_does_not_stop_the_others(source: psycopg.Connection) -> None:
    create_pages(source, 3, table="broken")
    create_pipeline(source, name="broken", source="broken")
    create_pipeline(source)
    source.execute(f"DROP FUNCTION {Generated('broken')('missing')}")
    assert drain(source) == 23
    assert _status(source, "backfill_complete")
    assert not _status(source, "backfill_complete", "broken")
    assert "broken_missing" in _status(source, "last_error", "broken")


@pytest.mark.parametrize(
    "address",
    [
        "http://user:sesame@127.0.0.1:1/v1",
        "http://127.0.0.1:1/v1?api-key=sesame",
        "http://127.0.0.1:1/v1?a=1&access_TOKEN=sesame",
    ],
)
def test_a_models_address_holds_no_secret(source: psycopg.Connection, address: str) -> None:
    statement = "SELECT embedline.create_model('far', 'openai', 'm', 8, base_url => %s)"
    with pytest.raises(errors.InvalidParameterValue, match="password") as caught:
        source.execute(statement, (address,))
    assert "api_key_env" in (caught.value.diag.message_hint or "")
    assert "sesame" not in str(caught.value)
    # Nothing listens there; the address as such is taken.
    with pytest.raises(psycopg.Error) as refused:
        source.execute(statement, ("http://127.0.0.1:1/v1?api-version=2024-10-21",))
    assert (refused.value.sqlstate or "").startswith("EL")


def test_a_model_in_use_cannot_be_dropped(source: psycopg.Connection) -> None:
    create_pipeline(source)
    with pytest.raises(errors.InvalidParameterValue, match="in use") as caught:
        source.execute("SELECT embedline.drop_model('static-256')")
    assert "page" in (caught.value.diag.message_detail or "")
    source.execute("SELECT embedline.drop_pipeline('page')")
    source.execute("SELECT embedline.drop_model('static-256')")


# --- backfill


@pytest.fixture
def large(database: psycopg.Connection) -> psycopg.Connection:
    """Some 300 blocks: three ranges. Half of the rows are gone again, so that there is room to move into."""
    create_pages(database, 2000)
    database.execute("UPDATE page SET body = body || repeat(' x', 500)")
    database.execute("DELETE FROM page WHERE id % 2 = 0")
    database.execute("VACUUM page")
    return database


def test_the_backfill_goes_through_all_ranges_and_counts_them(large: psycopg.Connection) -> None:
    create_pipeline(large)
    total = _status(large, "backfill_total")
    assert total >= 2
    assert queued(large) == 0
    done = [_status(large, "backfill_done")]
    while scalar(large, "SELECT embedline.embed_pending(300)"):
        done.append(_status(large, "backfill_done"))
    assert done == sorted(done)
    assert _status(large, "backfill_done") == total
    assert assert_exact(large) >= 1000


@pytest.mark.parametrize(
    "rewrite", ["VACUUM FULL page", "CLUSTER page USING page_pkey", "ALTER TABLE page SET UNLOGGED"]
)
def test_a_rewrite_of_the_table_during_the_backfill_loses_no_row(large: psycopg.Connection, rewrite: str) -> None:
    create_pipeline(large)
    assert scalar(large, "SELECT embedline.embed_pending(300)") == 300
    large.execute(rewrite)
    settle(large)
    assert assert_exact(large) >= 1000


def test_rows_that_unrelated_updates_move_during_the_backfill_are_not_lost(large: psycopg.Connection) -> None:
    create_pipeline(large)
    assert scalar(large, "SELECT embedline.embed_pending(300)") == 300
    # From the end of the table into the room at its beginning, which the backfill has read already.
    large.execute("UPDATE page SET views = views + 1 WHERE id > 1500")
    assert queued(large) == 0
    moved = "SELECT count(*) FROM page WHERE id > 1500 AND ctid < '(60,0)'"
    assert scalar(large, moved) > 0, "no row has moved, so this tests nothing"
    settle(large)
    assert assert_exact(large) >= 1000


def test_changes_during_the_backfill_win_over_it(large: psycopg.Connection) -> None:
    create_pipeline(large)
    scalar(large, "SELECT embedline.embed_pending(300)")
    large.execute("UPDATE page SET body = 'changed ' || id WHERE id % 3 = 0")
    large.execute("DELETE FROM page WHERE id % 5 = 0")
    large.execute("INSERT INTO page SELECT n, 'New', 'row ' || n FROM generate_series(5000, 5050) AS n")
    large.execute("UPDATE page SET id = id + 10000 WHERE id % 7 = 0")
    settle(large)
    assert_exact(large)


def test_live_changes_come_before_the_backfill(large: psycopg.Connection) -> None:
    create_pipeline(large)
    large.execute("INSERT INTO page VALUES (9999, 'Urgent', 'live change')")
    assert scalar(large, "SELECT embedline.embed_pending(1)") == 1
    assert scalar(large, "SELECT id FROM page_embedding") == 9999


def test_max_rows_bounds_a_call(source: psycopg.Connection) -> None:
    create_pipeline(source)
    assert [scalar(source, "SELECT embedline.embed_pending(7)") for _ in range(4)] == [7, 7, 6, 0]
    with pytest.raises(errors.InvalidParameterValue, match="max_rows"):
        source.execute("SELECT embedline.embed_pending(0)")


def test_a_named_pipeline_is_drained_alone(source: psycopg.Connection) -> None:
    create_pipeline(source)
    create_pipeline(source, name="title", content="title")
    assert drain(source, "title") == 20
    assert data_count(source, "document") == 0
    with pytest.raises(errors.UndefinedObject):
        drain(source, "nope")


def test_a_rolled_back_embed_pending_has_done_nothing(source: psycopg.Connection, connect: Connect) -> None:
    create_pipeline(source)
    settle(source)
    source.execute("UPDATE page SET body = 'changed'")
    worker = connect(autocommit=False)
    assert scalar(worker, "SELECT embed_pending(1000)") == 20
    worker.rollback()
    assert queued(source) == 20
    assert drain(source) == 20
    assert_exact(source)


def test_two_drains_at_once_share_the_work(source: psycopg.Connection, connect: Connect) -> None:
    create_pipeline(source)
    settle(source)
    source.execute("UPDATE page SET body = 'changed'")
    first, second = connect(autocommit=False), connect(autocommit=False)
    counts = [scalar(worker, "SELECT embed_pending(10)") for worker in (first, second)]
    assert counts == [10, 10]
    first.commit()
    second.commit()
    assert drain(source) == 0
    assert_exact(source)


def test_identical_chunks_lend_their_vector(source: psycopg.Connection) -> None:
    """With the model gone, a copy of a known text is embedded all the same."""
    create_pipeline(source)
    settle(source)
    source.execute("UPDATE embedline.model SET model = '/nonexistent' WHERE name = 'static-256'")
    source.execute("INSERT INTO page (id, title, body) SELECT id + 100, title, body FROM page")
    assert drain(source) == 20
    assert assert_exact(source) == 40
