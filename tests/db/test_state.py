"""embedline.state: whether searches find a row as it is now, and who may know."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors, sql

from generated_names import PAGE
from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from support import create_pages, create_pipeline, drain, scalar, searching, settle
from working import create_stub_model

__all__ = ["running_stub", "stub"]

Connect = Callable[..., psycopg.Connection]
MakeRole = Callable[..., str]

PROSE = "\n\n".join(f"Paragraph {number} tells of rivers, mountains and the sea." for number in range(60))
# More words than a chunk has tokens, each longer than the model reads.
DUMP = " ".join(f"{number:03}" + b"a line of a dump".hex() * 4 for number in range(100))


def state_of(connection: psycopg.Connection, key: object, pipeline: str = "page", version: int | None = None) -> str:
    return str(scalar(connection, "SELECT state FROM embedline.state(%s, %s, %s)", (pipeline, str(key), version)))


def reason_of(connection: psycopg.Connection, key: object, pipeline: str = "page", version: int | None = None) -> str:
    return str(scalar(connection, "SELECT reason FROM embedline.state(%s, %s, %s)", (pipeline, str(key), version)))


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    return database


def test_a_row_is_fresh_since_it_was_embedded_and_pending_since_it_was_changed(pages: psycopg.Connection) -> None:
    embedded_at = scalar(pages, f"SELECT embedded_at FROM {PAGE('document')} WHERE key_id = 3")
    assert pages.execute("SELECT * FROM embedline.state('page', '3')").fetchall() == [("fresh", embedded_at, None)]
    changed_at = scalar(pages, "UPDATE page SET body = 'another text' WHERE id = 3 RETURNING now()")
    assert pages.execute("SELECT * FROM embedline.state('page', '3')").fetchall() == [
        ("pending", changed_at, "no resident worker runs")
    ]
    assert state_of(pages, 4) == "fresh"
    drain(pages)
    assert state_of(pages, 3) == "fresh"


def test_a_row_that_no_trigger_saw_is_pending(pages: psycopg.Connection) -> None:
    with pages.transaction():
        pages.execute("SET LOCAL session_replication_role = replica")
        pages.execute("UPDATE page SET body = 'unseen' WHERE id = 3")
    assert pages.execute("SELECT state, since FROM embedline.state('page', '3')").fetchall() == [("pending", None)]


def test_unknown_and_deleted_rows_are_absent(pages: psycopg.Connection) -> None:
    pages.execute("DELETE FROM page WHERE id = 2")
    assert [state_of(pages, key) for key in (2, 77)] == ["absent", "absent"]
    drain(pages)
    assert state_of(pages, 2) == "absent"
    # The chunks of the deleted row are not those of a new one of its key.
    pages.execute("INSERT INTO page (id, title, body) VALUES (2, 'Title 2', 'new')")
    assert state_of(pages, 2) == "pending"


@pytest.mark.parametrize("key", ["x", "1.5", "99999999999999999999", ""])
def test_a_text_that_is_no_key_is_refused_with_the_form(pages: psycopg.Connection, key: str) -> None:
    with pytest.raises(errors.InvalidParameterValue) as refused:
        state_of(pages, key)
    assert refused.value.diag.message_hint == "Give the key as embedline.search returns it: the text of id."


def test_keys_of_several_columns_are_those_of_search(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE part (code varchar(3), place integer, body text, PRIMARY KEY (code, place))")
    database.execute("INSERT INTO part VALUES ('a,\"', 1, 'rivers'), ('b', 2, 'bread')")
    create_pipeline(database, "part", "part", "body")
    settle(database)
    keys = {key for key, _, _ in searching(database, "part", "rivers")}
    assert keys == {'["a,\\"", "1"]', '["b", "2"]'}
    assert {state_of(database, key, "part") for key in keys} == {"fresh"}
    assert state_of(database, '["b", 2]', "part") == "fresh"
    # A longer text than the column holds is no row's key; a cast would cut it to one.
    database.execute("INSERT INTO part VALUES ('bcd', 2, 'law')")
    assert [state_of(database, key, "part") for key in ('["bcd", "2"]', '["bcde", "2"]')] == ["pending", "absent"]
    database.execute("UPDATE part SET body = 'rockets' WHERE code = 'b'")
    assert [state_of(database, key, "part") for key in ('["b", "2"]', '["a,\\"", "1"]')] == ["pending", "fresh"]
    for key in ("b", '["b"]', '["b", null]', "{}"):
        with pytest.raises(errors.InvalidParameterValue):
            state_of(database, key, "part")


def test_rows_without_content_or_refused_by_the_filter_are_excluded(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database, content="nullif(body, 'none')", filter="views < 10")
    database.execute("UPDATE page SET body = 'none' WHERE id = 1")
    database.execute("UPDATE page SET views = 20 WHERE id = 2")
    settle(database)
    assert [(state_of(database, n), reason_of(database, n)) for n in (1, 2)] == [
        ("excluded", "the content is NULL"),
        ("excluded", "the pipeline's filter leaves the row out"),
    ]
    database.execute("UPDATE page SET views = 20 WHERE id = 3")
    assert state_of(database, 3) == "pending"
    drain(database)
    assert state_of(database, 3) == "excluded"


def test_a_dead_row_has_failed_with_its_message_until_it_is_queued_again(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text)")
    database.execute("INSERT INTO page VALUES (1, %s), (2, 'rivers')", (b"text".hex() * 400,))
    create_pipeline(database, "page", "page", "body", "minilm", index_method="none")
    settle(database)
    died_at = scalar(database, "SELECT created_at FROM embedline.dead_letter")
    found = database.execute("SELECT * FROM embedline.state('page', '1')").fetchone()
    assert found is not None and found[:2] == ("failed", died_at) and found[2].startswith("the model does not know")
    database.execute("SELECT embedline.requeue('page')")
    assert state_of(database, 1) == "pending"
    assert reason_of(database, 1).startswith("is tried again; it failed before: the model does not know")
    drain(database)
    assert state_of(database, 1) == "failed"
    database.execute("SELECT embedline.purge_dead_letters('0 seconds')")
    assert reason_of(database, 1) == "its dead letter was removed; embedline.requeue queues the row again"
    database.execute("UPDATE page SET body = 'bread' WHERE id = 1")
    assert state_of(database, 1) == "pending"


def test_a_row_with_chunks_that_were_given_up_is_partial(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text)")
    database.execute("INSERT INTO page VALUES (1, %s)", (f"{PROSE}\n\n{DUMP}\n\n{PROSE}",))
    create_pipeline(database, "page", "page", "body", "minilm", index_method="none", chunk_tokens=40)
    settle(database)
    assert state_of(database, 1) == "partial"
    missing = scalar(database, "SELECT missing FROM embedline.versions")
    assert f"{missing} of " in reason_of(database, 1) and "does not know" in reason_of(database, 1)


def test_a_content_that_cannot_be_read_has_failed(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text)")
    database.execute("INSERT INTO page VALUES (1, '7'), (2, 'rivers')")
    create_pipeline(database, "page", "page", "(body::integer)::text")
    settle(database)
    assert [state_of(database, n) for n in (1, 2)] == ["fresh", "failed"]
    assert "invalid input syntax" in reason_of(database, 2)


def test_a_key_is_read_in_the_format_of_the_session(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE event (at timestamptz PRIMARY KEY, body text)")
    database.execute("INSERT INTO event VALUES ('2026-01-02 03:04:05+00', '7'), ('2026-01-02 03:04:06+00', 'rivers')")
    create_pipeline(database, "event", "event", "(body::integer)::text")
    settle(database)
    database.execute("SET timezone = 'Asia/Tokyo'")
    keys = [str(key) for (key,) in database.execute("SELECT at::text FROM event ORDER BY at")]
    assert keys == ["2026-01-02 12:04:05+09", "2026-01-02 12:04:06+09"]
    assert [state_of(database, key, "event") for key in keys] == ["fresh", "failed"]
    database.execute("RESET timezone")


def test_each_version_has_its_own_state(pages: psycopg.Connection) -> None:
    number = scalar(
        pages,
        "SELECT embedline.add_embedding_version('page', 'static-256', index_method => 'none', column_type => 'halfvec')",
    )
    assert [state_of(pages, 1, version=n) for n in (None, 1, number)] == ["fresh", "fresh", "pending"]
    assert reason_of(pages, 1, version=number).startswith(f"version {number} lacks")
    settle(pages)
    assert state_of(pages, 1, version=number) == "fresh"
    # Rows are read again for another chunking; what the serving version has of them stays right.
    cut = scalar(
        pages,
        "SELECT embedline.add_embedding_version('page', 'static-256', index_method => 'none', chunking => 'fixed',"
        " chunk_tokens => 16)",
    )
    assert [state_of(pages, 1, version=n) for n in (None, cut)] == ["fresh", "pending"]
    settle(pages)
    assert [state_of(pages, 1, version=n) for n in (None, number, cut)] == ["fresh"] * 3
    with pytest.raises(errors.UndefinedObject):
        state_of(pages, 1, version=9)


def test_an_altered_chunking_makes_rows_pending(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.alter_pipeline('page', chunking => 'fixed', chunk_tokens => 16)")
    assert state_of(pages, 1) == "pending"
    settle(pages)
    assert state_of(pages, 1) == "fresh"


def test_the_reason_names_the_obstacle(database: psycopg.Connection, stub: StubProvider) -> None:
    create_pages(database, 2)
    create_stub_model(database, stub)
    create_pipeline(database, model="stub", index_method="none")
    settle(database)
    stub.behave(rules=[{"status": 503}])
    database.execute("UPDATE page SET body = 'other' WHERE id = 1")
    database.execute("SELECT embedline.embed_pending(10)")
    assert 'model "stub" is unavailable until ' in reason_of(database, 1)
    database.execute("SELECT embedline.pause_pipeline('page')")
    assert reason_of(database, 1) == "the pipeline is paused: SELECT embedline.resume_pipeline('page') resumes it"


def test_only_who_may_read_the_row_learns_of_it(
    pages: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    pages.execute("ALTER TABLE page ADD COLUMN owner text")
    pages.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    pages.execute("CREATE POLICY own ON page USING (id = 1)")
    reader, stranger = make_role("embedline_reader"), make_role()
    for role in (reader, stranger):
        pages.execute(sql.SQL("GRANT SELECT ON page TO {}").format(sql.Identifier(role)))
    as_reader = connect(reader)
    assert [state_of(as_reader, n) for n in (1, 2, 77)] == ["fresh", "absent", "absent"]
    # Nor by the inner function, which sees everything.
    for statement in (
        "SELECT * FROM embedline_data._row_state('page', 1, '{2}')",
        f"SELECT * FROM {PAGE('document')}",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            as_reader.execute(statement)
    assert as_reader.execute("SELECT * FROM embedline_search.page_v1_state('{2}')").fetchall() == []
    with pytest.raises(errors.InsufficientPrivilege):
        state_of(connect(stranger), 1)
    without_source = make_role("embedline_reader")
    with pytest.raises(errors.InsufficientPrivilege):
        state_of(connect(without_source), 1)


def test_the_state_is_known_in_a_read_only_transaction(pages: psycopg.Connection) -> None:
    with pages.transaction():
        pages.execute("SET TRANSACTION READ ONLY")
        assert state_of(pages, 1) == "fresh"
