"""Versions of a pipeline: expand, dual write, cutover, rollback, contract, with rows written all the time."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest
from alembic import command
from psycopg import errors, sql

from generated_names import PAGE
from small_models import register_static
from support import alembic_config, assert_exact, create_pages, create_pipeline, data_count, scalar, searching, settle
from upgrading import add_version, cut_over, settle_versions, versions


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    """Pipeline page over 40 rows, embedded by static-256, without an index; model static-64 is registered."""
    create_pages(database, 40)
    create_pipeline(database, index_method="none")
    register_static(database, 64)
    settle(database)
    return database


def test_an_upgrade_from_expand_to_contract(pages: psycopg.Connection) -> None:
    assert add_version(pages, "static-64") == 2
    assert versions(pages, "state") == {1: "complete", 2: "backfilling"}
    settle_versions(pages)
    assert versions(pages, "vectors")[2] == versions(pages, "chunks")[2] > 0
    pages.execute("UPDATE page SET body = 'about glaciers' WHERE id = 1")
    pages.execute("INSERT INTO page (id, title, body) VALUES (100, 'Volcanoes', 'lava and ash')")
    pages.execute("DELETE FROM page WHERE id = 2")
    settle_versions(pages)
    cut_over(pages, 2)
    assert versions(pages, "serving") == {1: False, 2: True}
    assert assert_exact(pages) == 40
    assert scalar(pages, "SELECT vector_dims(embedding) FROM page_embedding LIMIT 1") == 64
    assert searching(pages, "page", "lava and ash", 1)[0][0] == "100"
    pages.execute("INSERT INTO page (id, title, body) VALUES (101, 'Deserts', 'sand and dunes')")
    pages.execute("UPDATE page SET body = 'cool lava' WHERE id = 100")
    settle(pages)
    assert scalar(pages, "SELECT embedline.rollback('page')") == 1
    assert assert_exact(pages) == 41
    assert searching(pages, "page", "sand and dunes", 1)[0][0] == "101"
    cut_over(pages, 2)
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="rollback goes back"):
        pages.execute("SELECT embedline.drop_embedding_version('page', 1)")
    pages.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")
    assert versions(pages, "serving") == {2: True}
    assert assert_exact(pages) == 41
    assert scalar(pages, f"SELECT to_regclass('{PAGE.version(1)}') IS NULL")
    assert scalar(pages, "SELECT count(*) FROM embedline.model WHERE name = 'static-256'") == 0
    pages.execute("UPDATE page SET body = 'changed after the contract' WHERE id < 10")
    pages.execute("DELETE FROM page WHERE id = 20")
    settle(pages)
    assert assert_exact(pages) == 40


@pytest.mark.parametrize("chunking", ["sentences", "none"])
def test_a_version_of_another_chunking_has_chunks_of_its_own(pages: psycopg.Connection, chunking: str) -> None:
    pages.execute("UPDATE page SET body = repeat('A sentence of words. ', 40) || id")
    settle(pages)
    add_version(pages, "static-256", chunking=chunking)
    settle_versions(pages)
    assert data_count(pages, "chunk_2") == data_count(pages, "v2")
    before = data_count(pages, "chunk")
    pages.execute("UPDATE page SET body = body || ' One more.' WHERE id <= 5")
    pages.execute("DELETE FROM page WHERE id > 30")
    settle_versions(pages)
    assert_exact(pages)
    cut_over(pages, 2)
    assert assert_exact(pages) == 30
    pages.execute("UPDATE page SET body = 'Short now.' WHERE id <= 5")
    settle_versions(pages)
    assert assert_exact(pages) == 30
    assert scalar(pages, "SELECT embedline.rollback('page')") == 1
    assert assert_exact(pages) == 30
    cut_over(pages, 2)
    pages.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")
    assert scalar(pages, f"SELECT to_regclass('{PAGE('chunk')}') IS NULL"), before
    pages.execute("DELETE FROM page WHERE id = 1")
    pages.execute("UPDATE page SET body = 'Last.' WHERE id = 3")
    settle(pages)
    assert assert_exact(pages) == 29
    pages.execute("TRUNCATE page")
    settle(pages)
    assert data_count(pages, "chunk_2") == 0


def _move_unread_rows(connection: psycopg.Connection) -> None:
    """Have an update of an unrelated column move the last rows to where the backfill has been already."""
    connection.execute("UPDATE page SET views = views + 1 WHERE id > 950")
    assert scalar(connection, "SELECT count(*) FROM page WHERE id > 950 AND ctid < '(3,0)'") > 0, "no row has moved"


@pytest.fixture
def roomy(database: psycopg.Connection) -> psycopg.Connection:
    """Pipeline page over 800 rows behind the room that 200 others have left."""
    create_pages(database, 1000)
    create_pipeline(database, index_method="none")
    settle(database)
    database.execute("DELETE FROM page WHERE id <= 200")
    database.execute("VACUUM page")
    return database


def test_rows_that_move_while_they_are_chunked_anew_are_not_lost(roomy: psycopg.Connection) -> None:
    add_version(roomy, "static-256", chunking="sentences")
    scalar(roomy, "SELECT embedline.embed_pending(770)")
    _move_unread_rows(roomy)
    settle_versions(roomy)
    cut_over(roomy, 2)
    assert assert_exact(roomy) == 800


def test_rows_that_move_while_an_alteration_reads_them_are_not_lost(roomy: psycopg.Connection) -> None:
    roomy.execute("SELECT embedline.alter_pipeline('page', content => 'body', filter => 'id % 3 > 0')")
    scalar(roomy, "SELECT embedline.embed_pending(500)")
    _move_unread_rows(roomy)
    settle(roomy)
    assert assert_exact(roomy) > 500


def test_a_version_without_the_chunks_of_some_rows_does_not_serve(roomy: psycopg.Connection) -> None:
    add_version(roomy, "static-256", chunking="sentences")
    settle_versions(roomy)
    roomy.execute(f"DELETE FROM {PAGE('chunk_2')} WHERE key_id > 990")
    roomy.execute(f"UPDATE {PAGE('document')} SET recipe = 1 WHERE key_id > 990")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="lacks the chunks of 10 rows"):
        cut_over(roomy, 2)
    roomy.execute("SELECT * FROM embedline.verify('page', repair => true)")
    settle_versions(roomy)
    cut_over(roomy, 2)
    assert assert_exact(roomy) == 800


def test_an_upgrade_sweeps_what_earlier_releases_lost(roomy: psycopg.Connection, database_dsn: str) -> None:
    add_version(roomy, "static-256", chunking="sentences")
    settle_versions(roomy)
    command.downgrade(alembic_config(database_dsn), "0006")
    roomy.execute(f"DELETE FROM {PAGE('chunk_2')} WHERE key_id > 990")
    roomy.execute(f"UPDATE {PAGE('document')} SET recipe = 1 WHERE key_id > 990")
    command.upgrade(alembic_config(database_dsn), "head")
    with psycopg.connect(database_dsn, autocommit=True) as upgraded:
        assert versions(upgraded, "state")[1] == "backfilling"
        settle_versions(upgraded)
        assert assert_exact(upgraded, version=2) == 800


def test_the_same_vectors_in_another_type_are_not_paid_for(pages: psycopg.Connection) -> None:
    """The lender is the version that is there: no model is asked, so a model that cannot answer does not matter."""
    pages.execute("UPDATE embedline.model SET model = '/nowhere' WHERE name = 'static-256'")
    add_version(pages, "static-256", column_type="halfvec")
    settle_versions(pages)
    cut_over(pages, 2)
    assert scalar(pages, "SELECT pg_typeof(embedding)::text FROM page_embedding LIMIT 1") == "halfvec"


def test_a_recipe_that_is_there_is_refused(pages: psycopg.Connection) -> None:
    with pytest.raises(errors.DuplicateObject, match="version 1"):
        add_version(pages, "static-256")


def test_a_version_that_is_not_complete_does_not_serve(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="still being filled"):
        cut_over(pages, 2)


def test_without_a_gate_a_reason_is_needed(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no passing gate") as caught:
        pages.execute("SELECT embedline.cutover('page', 2)")
    assert "evaluate" in (caught.value.diag.message_hint or "")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no passing gate"):
        pages.execute("SELECT embedline.cutover('page', 2, override_reason => ' ')")
    cut_over(pages, 2)
    assert scalar(pages, "SELECT override_reason FROM embedline.cutover") == "a test of what comes after the gate"


def test_a_version_beside_the_serving_one_can_be_given_up(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    pages.execute("SELECT embedline.drop_embedding_version('page', 2)")
    assert versions(pages, "serving") == {1: True}
    assert scalar(pages, "SELECT count(*) FROM embedline.model WHERE name = 'static-64'") == 1
    pages.execute("UPDATE page SET body = 'again' WHERE id = 1")
    settle(pages)
    assert assert_exact(pages) == 40
    assert add_version(pages, "static-64") == 2


def test_a_version_that_was_rolled_back_from_goes_at_once_and_leaves_its_model(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    cut_over(pages, 2)
    pages.execute("SELECT embedline.rollback('page')")
    pages.execute("SELECT embedline.drop_embedding_version('page', 2)")
    assert add_version(pages, "static-64") == 2


def test_the_serving_version_is_not_dropped(pages: psycopg.Connection) -> None:
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="serves"):
        pages.execute("SELECT embedline.drop_embedding_version('page', 1)")


def test_a_statement_embeds_with_the_version_that_it_reads(pages: psycopg.Connection, database_dsn: str) -> None:
    """Also in a transaction whose snapshot is older than the cutover: the view's definition knows no snapshot."""
    add_version(pages, "static-64")
    settle_versions(pages)
    query = (
        "SELECT id FROM page_embedding ORDER BY embedding <=> (SELECT embedline.embed_query('page', 'rivers')) LIMIT 3"
    )
    with psycopg.connect(database_dsn) as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("SELECT count(*) FROM page")
        cut_over(pages, 2)
        after = reader.execute(query).fetchall()
    assert after == pages.execute(query).fetchall()


def test_a_cutover_waits_for_no_reader_for_long(pages: psycopg.Connection, database_dsn: str) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    with psycopg.connect(database_dsn) as reader:
        reader.execute("SELECT count(*) FROM page_embedding")
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="in use by other transactions"):
            cut_over(pages, 2)
    assert versions(pages, "serving") == {1: True, 2: False}
    cut_over(pages, 2)
    assert assert_exact(pages) == 40


def test_grants_and_dependents_stay_where_the_type_does(pages: psycopg.Connection, make_role: Any) -> None:
    role = make_role("embedline_reader")
    pages.execute(sql.SQL("GRANT SELECT (id, chunk) ON page_embedding TO {}").format(sql.Identifier(role)))
    pages.execute("CREATE VIEW short_page AS SELECT id, embedding FROM page_embedding")
    pages.execute("COMMENT ON COLUMN page_embedding.chunk IS 'the words'")
    add_version(pages, "static-64")
    settle_versions(pages)
    cut_over(pages, 2)
    assert scalar(pages, "SELECT vector_dims(embedding) FROM short_page LIMIT 1") == 64
    assert scalar(pages, "SELECT has_column_privilege(%s, 'page_embedding', 'chunk', 'SELECT')", (role,))
    add_version(pages, "static-64", column_type="halfvec")
    settle_versions(pages)
    with pytest.raises(errors.DependentObjectsStillExist) as caught:
        cut_over(pages, 3)
    assert "short_page" in (caught.value.diag.message_detail or "")
    pages.execute("DROP VIEW short_page")
    cut_over(pages, 3)
    assert scalar(pages, "SELECT has_column_privilege(%s, 'page_embedding', 'chunk', 'SELECT')", (role,))
    assert scalar(pages, "SELECT col_description('page_embedding'::regclass, attnum) FROM pg_attribute"
                  " WHERE attrelid = 'page_embedding'::regclass AND attname = 'chunk'") == "the words"  # fmt: skip
    assert scalar(pages, "SELECT obj_description('page_embedding'::regclass, 'pg_class') LIKE 'Embedline pipeline%'")


def test_a_version_is_complete_only_when_every_chunk_is_there(pages: psycopg.Connection) -> None:
    """Also where its chunks are made first, and where rows are written meanwhile."""
    add_version(pages, "static-64", chunking="none")
    states: list[str] = []
    for step in range(60):
        pages.execute("SELECT embed_pending(3)")
        pages.execute("UPDATE page SET body = body || ' more' WHERE id = %s", (step % 40 + 1,))
        state, missing, queued = pages.execute(
            "SELECT state, missing, queued FROM embedline.versions WHERE version = 2"
        ).fetchone() or ("", 0, 0)
        states.append(state)
        assert state == "backfilling" or missing <= queued
    assert states[:10] == ["backfilling"] * 10
    settle_versions(pages)


def test_a_gate_against_another_version_opens_nothing(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    pages.execute("SELECT embedline.evaluate('page', 2, margin => 0.5)")
    assert versions(pages, "gate")[2] == "pass"
    pages.execute("UPDATE embedline.evaluation SET baseline_fingerprint = 'another recipe'")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no passing gate"):
        pages.execute("SELECT embedline.cutover('page', 2)")
    pages.execute("SELECT embedline.evaluate('page', 2, margin => 0.5)")
    pages.execute("SELECT embedline.cutover('page', 2)")


def test_a_gate_against_a_version_whose_number_another_has_now_opens_nothing(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    cut_over(pages, 2)
    pages.execute("SELECT embedline.evaluate('page', 1, margin => 0.5)")
    assert versions(pages, "gate")[1] == "pass"
    pages.execute("SELECT embedline.rollback('page')")
    pages.execute("SELECT embedline.drop_embedding_version('page', 2)")
    assert add_version(pages, register_static(pages, 128)) == 2
    settle_versions(pages)
    cut_over(pages, 2)
    assert versions(pages, "gate")[1] is None
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no passing gate"):
        pages.execute("SELECT embedline.cutover('page', 1)")


def test_a_gate_of_before_an_alteration_opens_nothing(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    pages.execute("SELECT embedline.evaluate('page', 2, margin => 0.5)")
    pages.execute("SELECT embedline.alter_pipeline('page', content => 'title')")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="read again"):
        pages.execute("SELECT embedline.evaluate('page', 2, margin => 0.5)")
    settle_versions(pages)
    assert versions(pages, "gate")[2] is None
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no passing gate"):
        pages.execute("SELECT embedline.cutover('page', 2)")
    pages.execute("SELECT embedline.evaluate('page', 2, margin => 0.9)")
    pages.execute("SELECT embedline.cutover('page', 2)")


def test_an_empty_pipeline_changes_its_version_without_a_gate_and_without_a_window(
    database: psycopg.Connection,
) -> None:
    create_pages(database, 0)
    create_pipeline(database, index_method="none")
    add_version(database, register_static(database, 64))
    settle_versions(database)
    verdict = "SELECT verdict FROM embedline.evaluate('page', 2) WHERE measure = 'verdict'"
    assert scalar(database, verdict) == "inconclusive"
    database.execute("INSERT INTO page (id, title, body) VALUES (1, 'About', 'to be embedded')")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no passing gate"):
        database.execute("SELECT embedline.cutover('page', 2)")
    database.execute("TRUNCATE page")
    settle(database)
    database.execute("SELECT embedline.cutover('page', 2)")
    assert scalar(database, "SELECT override_reason FROM embedline.cutover") == "the pipeline is empty"
    database.execute("SELECT embedline.drop_embedding_version('page', 1)")
    database.execute("INSERT INTO page (id, title, body) VALUES (1, 'About', 'to be embedded')")
    settle(database)
    assert assert_exact(database) == 1


def test_the_view_of_versions_keeps_no_lock_of_their_tables(pages: psycopg.Connection) -> None:
    """One transaction cannot hold the locks of a thousand pipelines."""
    add_version(pages, "minilm")
    with pages.transaction():
        assert pages.execute("SELECT chunks FROM embedline.versions").fetchall()
        held = (
            "SELECT count(*) FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation"
            " WHERE l.pid = pg_backend_pid() AND c.relnamespace = 'embedline_data'::regnamespace"
        )
        assert scalar(pages, held) == 0


def test_verify_queues_what_a_version_lacks(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    pages.execute(f"DELETE FROM {PAGE.version(2)} WHERE chunk_id % 4 = 0")
    found = pages.execute("SELECT finding, count, repaired FROM embedline.verify('page', sample => 0)").fetchall()
    assert found == [("missing_vector", 10, 0)]
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="lacks 10 vectors"):
        cut_over(pages, 2)
    pages.execute("SELECT embedline.verify('page', repair => true, sample => 0)")
    settle_versions(pages)
    assert pages.execute("SELECT * FROM embedline.verify('page', sample => 0)").fetchall() == []
    cut_over(pages, 2)
    assert assert_exact(pages) == 40


def _quarantine(connection: psycopg.Connection, key: int) -> None:
    """Have version 2 fail a row's chunk for good."""
    connection.execute(f"DELETE FROM {PAGE.version(2)} AS v USING {PAGE('chunk')} AS c"
                       " WHERE c.chunk_id = v.chunk_id AND c.key_id = %s", (key,))  # fmt: skip
    connection.execute(
        "INSERT INTO embedline.version_dead_letter (version_id, chunk_id, key, stage, error_code, message, attempts)"
        " SELECT v.version_id, c.chunk_id, jsonb_build_object('id', c.key_id::text), 'embed', 'EL012', 'refused', 5"
        f" FROM embedline.version AS v, {PAGE('chunk')} AS c WHERE v.number = 2 AND c.key_id = %s",
        (key,),
    )


def test_quarantined_chunks_are_listed_and_accepted_or_tried_again(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    for key in (7, 8, 9):
        _quarantine(pages, key)
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="could not embed 3 chunks") as caught:
        cut_over(pages, 2)
    assert '"7"' in (caught.value.diag.message_detail or "")
    # Gone with its row, and with its words.
    pages.execute("DELETE FROM page WHERE id = 8")
    pages.execute("UPDATE page SET body = 'other words' WHERE id = 9")
    settle(pages)
    assert versions(pages, "dead_letters")[2] == 1
    assert scalar(pages, "SELECT embedline.accept_dead_letters('page', 2)") >= 1
    assert versions(pages, "accepted")[2] == 1
    cut_over(pages, 2)
    pages.execute("SELECT embedline.rollback('page')")
    assert scalar(pages, "SELECT embedline.requeue_version('page', 2)") >= 1
    settle_versions(pages)
    assert versions(pages, "missing")[2] == versions(pages, "dead_letters")[2] == 0


def test_a_version_that_takes_the_number_of_another_has_a_history_of_its_own(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    cut_over(pages, 2)
    pages.execute("SELECT embedline.rollback('page')")
    # Nothing goes back to it any more, so nothing keeps it.
    pages.execute("SELECT embedline.drop_embedding_version('page', 2)")
    register_static(pages, 16)
    assert add_version(pages, "static-16") == 2
    assert versions(pages, "rollback_until")[2] is None
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no version that pipeline"):
        pages.execute("SELECT embedline.rollback('page')")
    pages.execute("SELECT embedline.drop_embedding_version('page', 2)")
    assert scalar(pages, "SELECT count(*) FROM embedline.model WHERE name = 'static-16'") == 1


def test_what_depends_on_a_versions_view_is_named(pages: psycopg.Connection) -> None:
    add_version(pages, "static-64")
    pages.execute("CREATE VIEW trial AS SELECT id FROM page_embedding_v2")
    with pytest.raises(errors.DependentObjectsStillExist) as caught:
        pages.execute("SELECT embedline.drop_embedding_version('page', 2)")
    assert "trial" in (caught.value.diag.message_detail or "")


def test_a_refresh_keeps_grants_on_a_versions_view(pages: psycopg.Connection, make_role: Any) -> None:
    role = make_role("embedline_reader")
    pages.execute(sql.SQL("GRANT SELECT (id) ON page_embedding_v1 TO {}").format(sql.Identifier(role)))
    pages.execute("ALTER TABLE page ADD COLUMN language text")
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    assert scalar(pages, "SELECT count(language) FROM page_embedding_v1") == 0
    assert scalar(pages, "SELECT attacl IS NOT NULL FROM pg_attribute"
                  " WHERE attrelid = 'page_embedding_v1'::regclass AND attname = 'id'")  # fmt: skip


def test_a_recipe_that_is_added_again_is_filled_again(pages: psycopg.Connection) -> None:
    """Its chunks went with the first one: documents that were cut then count as not cut."""
    for _ in range(2):
        add_version(pages, "static-64", chunking="none")
        settle_versions(pages)
        assert versions(pages, "vectors")[2] == 40
        pages.execute("SELECT embedline.drop_embedding_version('page', 2)")


def test_a_row_that_no_trigger_saw_is_found_after_a_cutover_too(pages: psycopg.Connection) -> None:
    """The sweep that refresh_pipeline asked for belongs to the version that serves, whichever that is."""
    add_version(pages, "static-64")
    settle_versions(pages)
    with pages.transaction():
        pages.execute("SET LOCAL session_replication_role = replica")
        pages.execute("INSERT INTO page (id, title, body) VALUES (500, 'Unseen', 'by any trigger')")
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    cut_over(pages, 2)
    settle_versions(pages)
    assert assert_exact(pages) == 41


def test_a_cutover_waits_for_no_transaction_that_would_see_the_version_empty(
    pages: psycopg.Connection, database_dsn: str
) -> None:
    with psycopg.connect(database_dsn) as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("SELECT count(*) FROM page")
        add_version(pages, "static-64")
        settle_versions(pages)
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="began before version 2") as caught:
            cut_over(pages, 2)
        assert str(reader.info.backend_pid) in (caught.value.diag.message_detail or "")
    cut_over(pages, 2)


def test_embed_pending_with_an_old_snapshot_fails_rather_than_leave_a_version_out(
    pages: psycopg.Connection, database_dsn: str
) -> None:
    with psycopg.connect(database_dsn) as application:
        application.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        application.execute("SELECT count(*) FROM page")
        add_version(pages, "static-64")
        settle_versions(pages)
        application.execute("INSERT INTO page (id, title, body) VALUES (600, 'Late', 'row')")
        with pytest.raises(errors.SerializationFailure):
            application.execute("SELECT embed_pending(10)")


def test_two_cutovers_at_once_leave_one_way_back(pages: psycopg.Connection, connect: Any) -> None:
    add_version(pages, "static-64")
    settle_versions(pages)
    threads = [threading.Thread(target=cut_over, args=(connect(), 2)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert pages.execute("SELECT from_number, to_number FROM embedline.cutover").fetchall() == [(1, 2)]
    assert scalar(pages, "SELECT embedline.rollback('page')") == 1


def test_a_renamed_column_keeps_its_place_in_the_view_over_a_cutover(pages: psycopg.Connection) -> None:
    pages.execute("ALTER TABLE page RENAME title TO headline")
    pages.execute("ALTER TABLE page ADD COLUMN title integer DEFAULT 7")
    add_version(pages, "static-64")
    settle_versions(pages)
    cut_over(pages, 2)
    assert scalar(pages, "SELECT title FROM page_embedding WHERE id = 3") == "Title 3"
    pages.execute("SELECT embedline.rollback('page')")
    pages.execute("SELECT embedline.refresh_pipeline('page')")
    assert pages.execute("SELECT headline, title FROM page_embedding WHERE id = 3").fetchone() == ("Title 3", 7)


def test_a_view_that_is_made_anew_has_the_rights_it_had_and_no_others(
    pages: psycopg.Connection, make_role: Any
) -> None:
    kept, other = make_role("embedline_reader"), make_role("embedline_reader")
    pages.execute(sql.SQL("GRANT SELECT ON page_embedding TO {}").format(sql.Identifier(kept)))
    pages.execute(sql.SQL("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {}").format(sql.Identifier(other)))
    add_version(pages, "static-256", column_type="halfvec")
    settle_versions(pages)
    cut_over(pages, 2)
    acl = scalar(pages, "SELECT relacl::text FROM pg_class WHERE oid = 'page_embedding'::regclass")
    assert kept in acl
    assert other not in acl
    pages.execute(sql.SQL("ALTER DEFAULT PRIVILEGES REVOKE SELECT ON TABLES FROM {}").format(sql.Identifier(other)))


def test_one_call_embeds_chunks_of_a_version_that_it_cut_itself(pages: psycopg.Connection) -> None:
    # Whose turn comes first is drawn; a version that was asked before its chunks were there is asked again.
    for chunk_tokens in range(22, 28):
        number = add_version(pages, "static-64", chunk_tokens=chunk_tokens)
        assert scalar(pages, "SELECT embed_pending(1000)") > 40
        assert scalar(pages, "SELECT sum(missing) FROM embedline.versions") == 0
        assert versions(pages, "state")[number] == "complete"
        pages.execute("SELECT embedline.drop_embedding_version('page', %s)", [number])
