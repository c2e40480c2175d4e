"""Dead letters: queued again on request, kept until they are settled, forgotten after a while."""

from __future__ import annotations

import json

import psycopg
import pytest
from psycopg import errors, sql
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from conftest import Connect, MakeRole
from generated_names import PAGE
from support import (
    assert_exact,
    chunked_keys,
    create_pages,
    create_pipeline,
    data_count,
    drain,
    queued,
    scalar,
    settle,
)


class Endpoint:
    """An endpoint that refuses texts with any of the words in `refused`."""

    def __init__(self, server: HTTPServer) -> None:
        self.refused: list[str] = []
        self.texts: list[str] = []
        self.url = server.url_for("/v1")
        server.expect_request("/v1/embeddings").respond_with_handler(self._handle)

    def _handle(self, request: Request) -> Response:
        texts = request.get_json()["input"]
        if any(word in text for word in self.refused for text in texts):
            return Response('{"error": {"message": "bad input"}}', status=400, content_type="application/json")
        self.texts += texts
        rows = [[1.0 + sum(text.encode()) % (n + 2) for n in range(8)] for text in texts]
        data = [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)]
        body = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        return Response(json.dumps(body), content_type="application/json")


@pytest.fixture
def endpoint(httpserver: HTTPServer) -> Endpoint:
    return Endpoint(httpserver)


@pytest.fixture
def letters(database: psycopg.Connection, endpoint: Endpoint) -> psycopg.Connection:
    """20 pages: 3 and 7 are refused by the provider (EL012), 9 has nothing printable in it (EL002)."""
    database.execute("SELECT embedline.create_model('http', 'openai', 'm', base_url => %s)", (endpoint.url,))
    create_pages(database, 20)
    database.execute("UPDATE page SET title = U&'\\200B', body = U&'\\200B' WHERE id = 9")
    endpoint.refused = ["number 3 ", "number 7 "]
    create_pipeline(database, content="title || body", model="http")
    settle(database)
    assert codes(database) == {"3": "EL012", "7": "EL012", "9": "EL002"}
    endpoint.texts.clear()
    return database


def codes(connection: psycopg.Connection) -> dict[str, str]:
    """Return {id: error code} of the dead letters."""
    rows = connection.execute("SELECT key ->> 'id', error_code FROM embedline.dead_letter")
    return {key: code for key, code in rows}


def test_all_dead_letters_are_tried_again_with_their_tries_counted_anew(
    letters: psycopg.Connection, endpoint: Endpoint
) -> None:
    endpoint.refused = ["number 7 "]
    assert scalar(letters, "SELECT embedline.requeue('page')") == 3
    # Nothing is lost meanwhile: a dead letter stays until its row is embedded.
    assert len(codes(letters)) == 3
    assert queued(letters) == 3
    assert drain(letters) == 1
    assert codes(letters) == {"7": "EL012", "9": "EL002"}
    assert scalar(letters, 'SELECT attempts FROM embedline.dead_letter WHERE key = \'{"id": "7"}\'') == 1
    endpoint.refused = []
    assert scalar(letters, "SELECT embedline.requeue('page')") == 2
    assert drain(letters) == 1
    assert codes(letters) == {"9": "EL002"}
    assert data_count(letters, "v1") == 19


def test_one_key_or_one_error_code(letters: psycopg.Connection, endpoint: Endpoint) -> None:
    assert scalar(letters, "SELECT embedline.requeue('page', error_code => 'EL002')") == 1
    assert scalar(letters, "SELECT embedline.requeue('page', error_code => 'EL999')") == 0
    assert queued(letters) == 1
    assert scalar(letters, "SELECT embedline.requeue('page', '{\"id\": 3}', error_code => 'EL002')") == 0
    assert (
        scalar(letters, "SELECT embedline.requeue('page', key) FROM embedline.dead_letter WHERE key ->> 'id' = '3'")
        == 1
    )
    assert queued(letters) == 2
    endpoint.refused = []
    assert drain(letters) == 1
    assert codes(letters) == {"7": "EL012", "9": "EL002"}


def test_a_row_that_is_not_dead_is_queued_when_it_is_named(letters: psycopg.Connection, endpoint: Endpoint) -> None:
    assert scalar(letters, "SELECT embedline.requeue('page', '{\"id\": 5}')") == 1
    assert queued(letters) == 1
    settle(letters)
    # Unchanged: nothing was paid for.
    assert endpoint.texts == []
    assert scalar(letters, "SELECT embedline.requeue('page', '{\"id\": 5}', include_embedded => true)") == 1
    assert drain(letters) == 1
    assert len(endpoint.texts) == 1
    assert data_count(letters, "v1") == 17


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        ("'page', '{\"id\": 99}'", "neither a dead letter nor a source row", "embedline.dead_letter"),
        ("'page', '{\"id\": \"x\"}'", "is no key", '"id"'),
        ("'page', '{\"id\": null}'", "is no key", '"id"'),
        ("'page', '{\"key\": 3}'", "is no key", '"id"'),
        ("'page', '3'", "is no key", '"id"'),
        ("'page', include_embedded => true", "needs a key", "embedline.verify"),
        ("'other'", "there is no pipeline", "embedline.status"),
    ],
)
def test_a_wrong_call_says_what_is_right(letters: psycopg.Connection, call: str, message: str, hint: str) -> None:
    with pytest.raises((errors.InvalidParameterValue, errors.UndefinedObject), match=message) as caught:
        letters.execute(f"SELECT embedline.requeue({call})".encode())
    assert hint in str(caught.value.diag.message_hint)
    assert queued(letters) == 0


def test_a_dead_letter_goes_with_its_row(letters: psycopg.Connection) -> None:
    letters.execute("DELETE FROM page WHERE id = 3")
    letters.execute("SELECT embedline.requeue('page')")
    settle(letters)
    assert codes(letters) == {"7": "EL012", "9": "EL002"}


def test_a_truncate_by_an_old_snapshot_leaves_dead_letters_that_verify_removes(letters: psycopg.Connection) -> None:
    letters.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; TRUNCATE page; COMMIT")
    assert len(codes(letters)) == 3
    query = "SELECT finding, count, repaired FROM embedline.verify('page', true, 0)"
    assert letters.execute(query).fetchall() == [("dead_letter", 3, 3)]
    assert codes(letters) == {}


def test_old_dead_letters_are_purged_and_their_rows_stay_dead(letters: psycopg.Connection) -> None:
    assert scalar(letters, "SELECT embedline.purge_dead_letters()") == 0
    letters.execute(
        "UPDATE embedline.dead_letter SET created_at = now() - interval '91 days' WHERE error_code = 'EL012'"
    )
    assert scalar(letters, "SELECT embedline.purge_dead_letters(interval '1 year')") == 0
    assert scalar(letters, "SELECT embedline.purge_dead_letters()") == 2
    letters.execute("SELECT embedline.configure('dead_letter_retention', '0 days')")
    assert scalar(letters, "SELECT embedline.purge_dead_letters()") == 1
    # No sweep brings them back to the queue ...
    assert letters.execute("SELECT * FROM embedline.verify('page', true, 0)").fetchall() == []
    assert queued(letters) == 0
    assert data_count(letters, "document") == 20
    # ... a change of the row does.
    letters.execute("UPDATE page SET body = 'harmless' WHERE id = 3")
    assert drain(letters) == 1


def test_the_retention_is_configured_as_an_interval(database: psycopg.Connection) -> None:
    stored = "SELECT value FROM embedline.setting WHERE name = 'dead_letter_retention'"
    assert scalar(database, "SELECT embedline.configure('dead_letter_retention', '30 days')") == "30 days"
    assert scalar(database, stored) == "30 days"
    for wrong in ("'soon'", "'-1 day'", "30"):
        with pytest.raises(errors.InvalidParameterValue, match="interval") as caught:
            database.execute(f"SELECT embedline.configure('dead_letter_retention', {wrong})")
        assert "'90 days'" in str(caught.value.diag.message_hint)
    assert scalar(database, stored) == "30 days"
    assert scalar(database, "SELECT embedline.configure('dead_letter_retention', NULL)") == "90 days"
    assert scalar(database, stored) == "90 days"


def test_a_number_may_be_configured_as_text(database: psycopg.Connection) -> None:
    assert scalar(database, "SELECT embedline.configure('max_rows', '50')") == "50"
    assert scalar(database, "SELECT embedline.configure('max_rows', 50)") == 50
    with pytest.raises(errors.InvalidParameterValue, match="max_rows must be a number"):
        database.execute("SELECT embedline.configure('max_rows', 'many')")
    with pytest.raises(errors.InvalidParameterValue, match="no setting"):
        database.execute("SELECT embedline.configure('created_extension_vector', 'true')")
    assert scalar(database, "SELECT embedline.configure('max_rows', NULL)") == "4000"


def test_a_negative_age_is_refused(letters: psycopg.Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="older_than") as caught:
        letters.execute("SELECT embedline.purge_dead_letters(interval '-1 day')")
    assert "90 days" in str(caught.value.diag.message_hint)


def test_keys_of_several_columns_come_back_from_their_json(database: psycopg.Connection) -> None:
    database.execute('CREATE TABLE odd ("a ""b""" text, at timestamptz, body text, PRIMARY KEY ("a ""b""", at))')
    database.execute("INSERT INTO odd SELECT 'x,''y', '2024-01-01 12:00+00', U&'\\200B'")
    create_pipeline(database, "odd", "odd", "body")
    settle(database)
    database.execute("SET datestyle = 'SQL, DMY'")
    assert scalar(database, "SELECT embedline.requeue('odd', key) FROM embedline.dead_letter") == 1
    database.execute("ALTER TABLE odd DISABLE TRIGGER USER")
    database.execute("UPDATE odd SET body = 'readable'")
    database.execute("ALTER TABLE odd ENABLE TRIGGER USER")
    assert drain(database) == 1
    assert assert_exact(database, "odd") == 1


def test_keys_and_contents_with_times_are_the_same_in_every_time_zone(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE event (at timestamptz PRIMARY KEY, body text)")
    database.execute("INSERT INTO event VALUES ('2026-01-02 03:04+00')")
    create_pipeline(database, "event", "event", "coalesce(body || ' ' || at, U&'\\200B')")
    database.execute("SET timezone = 'America/New_York'")
    settle(database)
    database.execute("SET timezone = 'Asia/Tokyo'")
    assert scalar(database, "SELECT embedline.requeue('event', key) FROM embedline.dead_letter") == 1
    settle(database)
    # Tried again, and still one letter.
    assert scalar(database, "SELECT array_agg(key ->> 'at') FROM embedline.dead_letter") == ["2026-01-02 03:04:00+00"]
    database.execute("UPDATE event SET body = 'Opened'")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 0
    # What is embedded does not depend on who drains.
    assert scalar(database, "SELECT chunk FROM event_embedding") == "Opened 2026-01-02 03:04:00+00"
    database.execute("SET timezone = 'America/New_York'")
    assert database.execute("SELECT * FROM embedline.verify('event')").fetchall() == []


def test_only_who_controls_the_pipeline_requeues(
    letters: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role("embedline_admin")
    admin = connect(role)
    with pytest.raises(errors.InsufficientPrivilege, match="owner"):
        admin.execute("SELECT embedline.requeue('page')")
    letters.execute(sql.SQL("ALTER TABLE page OWNER TO {}").format(sql.Identifier(role)))
    assert scalar(admin, "SELECT embedline.requeue('page')") == 3
    letters.execute("ALTER TABLE page OWNER TO CURRENT_USER")


# As random as to stay uncompressed, and as long as an index entry of its own table may be.
LONG_KEY = "left(string_agg(encode(sha256(n::text::bytea), 'hex'), ''), 2688)"


def test_a_key_as_long_as_its_own_index_holds_gets_its_dead_letter(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE lk (id text PRIMARY KEY, body text)")
    create_pipeline(database, "lk", "lk", "body")
    database.execute(f"INSERT INTO lk SELECT {LONG_KEY} || '\\', U&'\\200B' FROM generate_series(1, 42) AS n")
    database.execute("INSERT INTO lk VALUES ('fine', 'words')")
    settle(database)
    assert scalar(database, "SELECT array_agg(length(key ->> 'id')) FROM embedline.dead_letter") == [2689]
    assert data_count(database, "v1", "lk") == 1
    # Found again by its key: replaced where it fails again, gone where it is embedded.
    assert scalar(database, "SELECT embedline.requeue('lk', key) FROM embedline.dead_letter") == 1
    settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 1
    database.execute("UPDATE lk SET body = 'more words'")
    settle(database)
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 0


def test_a_tenant_longer_than_an_index_holds_stops_nobody(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    create_pipeline(database, tenant="title")
    settle(database)
    database.execute(f"UPDATE page SET title = (SELECT {LONG_KEY} || 'x' FROM generate_series(1, 99) AS n) || id")
    assert drain(database) == 3


@pytest.mark.parametrize("state", ["54001", "XX001", "0A000", "MY001"])
def test_a_row_whose_expression_raises_any_error_of_its_own_stops_nobody(
    database: psycopg.Connection, state: str
) -> None:
    create_pages(database, 20)
    database.execute(
        "CREATE FUNCTION words(text) RETURNS text LANGUAGE plpgsql AS $$BEGIN"
        f" IF $1 = 'poison' THEN RAISE EXCEPTION 'this text is poison' USING ERRCODE = '{state}'; END IF; RETURN $1; END$$"
    )
    create_pipeline(database, content="words(body)", index_method="none")
    # In the backfill, and as a change.
    database.execute("UPDATE page SET body = 'poison' WHERE id = 7")
    drain(database)
    database.execute("UPDATE page SET body = 'poison' WHERE id = 8; UPDATE page SET body = 'changed' WHERE id = 9")
    drain(database)
    assert chunked_keys(database) >= set(range(1, 21)) - {7, 8}
    assert scalar(database, f"SELECT content FROM {PAGE('chunk')} WHERE key_id = 9") == "changed"
    # Errors that may pass are tried again, and only then given up.
    for _ in range(4):
        database.execute(f"UPDATE {PAGE('outbox')} SET not_before = now()")
        drain(database)
    assert codes(database) == {"7": state, "8": state}
    assert "this text is poison" in scalar(database, "SELECT message FROM embedline.dead_letter LIMIT 1")
    assert queued(database) == 0
    database.execute("UPDATE page SET body = 'mended' WHERE id IN (7, 8)")
    settle(database)
    assert codes(database) == {}
