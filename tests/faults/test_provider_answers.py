"""Answers of a provider that are wrong, once and always: what heals, what is given up with its reason, what is never shown."""

from __future__ import annotations

import json
import time

import psycopg
import pytest

from conftest import StartCluster
from embedline.models.health_check import PROBE_TEXT
from generated_names import PAGE
from stub_provider import StubProvider
from support import create_pipeline, data_count, queued, scalar, settle, wait_until
from working import (
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    insert_rows,
    remove_all,
    work_until_idle,
    working,
)

KEY = "sk-test-0123456789abcdef"


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on an empty table."""
    create_stub_model(stub_database, stub, timeout_seconds=0.5)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    return stub_database


def paid_for(stub: StubProvider) -> set[int]:
    """Return how often the texts were embedded, but for the harmless one."""
    return {count for text, count in stub.texts_seen().items() if text != PROBE_TEXT}


ONCE = {
    "few": {"answer": "few"},
    "more": {"answer": "more"},
    "nan": {"answer": "nan"},
    "inf": {"answer": "inf"},
    "zero": {"answer": "zero"},
    "html": {"answer": "html"},
    "cut": {"answer": "cut"},
    "silence": {"answer": "silence"},
    "429": {"status": 429},
    "500": {"status": 500, "body": "<html>broken</html>"},
    "another order": {"answer": "reversed"},
    "lists of floats": {"answer": "floats"},
}


@pytest.mark.parametrize(
    ("kind", "rows"), [*((kind, 1) for kind in ONCE), ("few", 40), ("nan", 40), ("zero", 40), ("another order", 40)]
)
def test_what_is_wrong_once_heals(page: psycopg.Connection, stub: StubProvider, kind: str, rows: int) -> None:
    stub.behave(rules=[ONCE[kind] | {"times": 1}], remember=True)
    insert_rows(page, 1, rows)
    work_until_idle(page)
    assert stub.counts()["rules"] == 1
    assert assert_all_settled(page, stub.dimensions) == rows
    assert dead_letters(page) == {}


@pytest.mark.parametrize(
    ("rule", "code", "words"),
    [
        ({"answer": "nan"}, "EL014", "not a finite number"),
        ({"answer": "inf"}, "EL014", "not a finite number"),
        ({"answer": "zero"}, "EL014", "norm zero"),
        ({"status": 400, "body": '{"error": {"message": "too strange"}}'}, "EL012", "400"),
        ({"status": 413}, "EL012", "413"),
        ({"answer": "few"}, "EL014", "vectors for"),
        ({"answer": "narrow"}, "EL004", "dimension"),
    ],
)
def test_what_is_always_wrong_about_one_row_is_given_up_with_its_reason(
    page: psycopg.Connection, stub: StubProvider, rule: dict[str, object], code: str, words: str
) -> None:
    stub.behave(rules=[rule | {"match": "row 33 "}], remember=True)
    insert_rows(page, 1, 64)
    work_until_idle(page)
    letters = dead_letters(page)
    assert list(letters) == [33]
    assert letters[33][:2] == ("embed", code)
    assert words in letters[33][2]
    assert assert_all_settled(page, stub.dimensions) == 63
    # By halves: 64, 32, 16, 8, 4, 2, 1 and its neighbour at each, and a second look.
    assert stub.counts()["requests"] <= 16


def test_the_dead_letter_has_the_providers_own_words(page: psycopg.Connection, stub: StubProvider) -> None:
    refusal = '{"error": {"message": "this input is too strange for us"}}'
    stub.behave(rules=[{"status": 400, "body": refusal, "match": "row 1 "}])
    insert_rows(page, 1, 1)
    work_until_idle(page)
    assert "too strange for us" in dead_letters(page)[1][2]


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 302, "headers": {"Location": "/elsewhere/embeddings"}},
        {"status": 401, "body": '{"error": {"message": "no such key"}}'},
        {"status": 404},
        {"status": 429, "body": '{"error": {"code": "insufficient_quota", "message": "You exceeded your quota"}}'},
    ],
    ids=["a redirect", "a wrong key", "a wrong address", "an account without money"],
)
def test_what_no_retry_mends_is_asked_rarely_and_charged_to_no_row(
    page: psycopg.Connection, stub: StubProvider, answer: dict[str, object]
) -> None:
    stub.behave(rules=[answer])
    insert_rows(page, 1, 100)
    started = time.monotonic()
    with working(page):
        wait_until(lambda: time.monotonic() - started > 1.5, what="some time is over")
    assert queued(page) == 100
    assert dead_letters(page) == {}
    assert scalar(page, f"SELECT array_agg(DISTINCT attempts) FROM {PAGE('outbox')}") == [0]
    assert str(answer["status"]) in scalar(page, "SELECT last_error FROM embedline.status")
    counts = stub.counts()
    assert counts["requests"] <= 2
    assert counts.get("elsewhere", 0) == 0


def test_a_provider_that_is_away_is_charged_to_no_row(stub_database: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=20)
    port = stub.url.split(":")[2].split("/")[0]
    # Nothing listens there.
    stub_database.execute(
        "UPDATE embedline.model SET base_url = replace(base_url, %s, '1') WHERE name = 'stub'", (port,)
    )
    started = time.monotonic()
    with working(stub_database):
        wait_until(lambda: time.monotonic() - started > 4, what="some time is over")
        # The backoff is real; the test does not wait for it.
        stub_database.execute(f"UPDATE {PAGE('outbox')} SET not_before = now()")
        stub_database.execute("UPDATE embedline.circuit SET open_until = now()")
    assert dead_letters(stub_database) == {}
    assert scalar(stub_database, f"SELECT max(attempts) FROM {PAGE('outbox')}") == 0


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_with_nobody_behind_it_is_charged_to_no_row(
    page: psycopg.Connection, stub: StubProvider, status: int
) -> None:
    stub.behave(rules=[{"status": status, "times": 7}], remember=True)
    insert_rows(page, 1, 20)
    with working(page):

        def embedded() -> bool:
            # The breaker's pauses double up to a minute; the test does not wait for them.
            page.execute("UPDATE embedline.circuit SET open_until = now()")
            page.execute(f"UPDATE {PAGE('outbox')} SET not_before = now() WHERE claimed_by IS NULL")
            # The try in work, and one whose failure was the last: by then the harmless text is answered.
            assert scalar(page, f"SELECT coalesce(max(attempts), 0) FROM {PAGE('outbox')}") <= 2
            return bool(scalar(page, "SELECT pending = 0 FROM embedline.status"))

        # Seven in a row: five tries would have been used up.
        wait_until(embedded, 30, "nothing waits")
    assert stub.counts()["rules"] == 7
    assert dead_letters(page) == {}
    assert assert_all_settled(page, stub.dimensions) == 20
    assert paid_for(stub) == {1}


def test_a_document_of_600_000_tokens_is_sent_in_requests_that_the_model_takes(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    page.execute(
        "INSERT INTO page SELECT 1, string_agg('Sentence number ' || n || ' of the long report. ', '')"
        " FROM generate_series(1, 65000) AS n"
    )
    assert scalar(page, "SELECT length(body) FROM page") > 600_000 * 4
    work_until_idle(page)
    asked = stub.asked()
    assert len(asked) >= 2
    # Four characters a token, as the model counts English.
    assert max(request.characters for request in asked) / 4 <= 300_000
    assert max(request.texts for request in asked) <= 2048
    assert data_count(page, "v1") == data_count(page, "chunk") == sum(request.texts for request in asked)


@pytest.mark.parametrize("limit", [{"over": 20_000, "status": 413}, {"texts_over": 20, "status": 400}])
def test_a_document_whose_request_is_refused_is_split_until_the_provider_takes_it(
    page: psycopg.Connection, stub: StubProvider, limit: dict[str, object]
) -> None:
    page.execute(
        "INSERT INTO page SELECT 1, string_agg('Sentence number ' || n || ' of the report. ', '')"
        " FROM generate_series(1, 3000) AS n"
    )
    stub.behave(rules=[limit], remember=True)
    work_until_idle(page)
    assert dead_letters(page) == {}
    assert data_count(page, "v1") == data_count(page, "chunk") > 20
    assert paid_for(stub) == {1}


def test_a_document_in_many_requests_neither_burns_the_processor_nor_hides_a_cancel(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub, max_batch_items=10)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    stub_database.execute(
        "INSERT INTO page SELECT 1, string_agg('Sentence number ' || n || ' of the report. ', '')"
        " FROM generate_series(1, 800) AS n"
    )
    # The first of its requests is answered at once, the last takes its time.
    stub.behave(rules=[{"match": "Sentence number 800 ", "latency": 2.0}], remember=True)
    transactions = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    before = scalar(stub_database, transactions)
    work_until_idle(stub_database)
    stub_database.execute("SELECT pg_stat_clear_snapshot()")
    assert scalar(stub_database, transactions) - before < 300
    stub.behave(rules=[{"match": "number 800 ", "latency": 20.0}])
    stub_database.execute("UPDATE page SET body = replace(body, 'Sentence', 'Phrase')")
    stub_database.execute("SET statement_timeout = '500ms'")
    started = time.monotonic()
    try:
        with pytest.raises(psycopg.errors.QueryCanceled):
            stub_database.execute("SELECT embed_pending(10)")
    finally:
        stub_database.execute("RESET statement_timeout")
    assert time.monotonic() - started < 10


def test_a_document_of_50_megabytes_is_chunked_and_stored(page: psycopg.Connection, stub: StubProvider) -> None:
    page.execute(
        "INSERT INTO page SELECT 1, string_agg('Sentence number ' || n || ' of the long report. ', '')"
        " FROM generate_series(1, 1200000) AS n"
    )
    insert_rows(page, 2, 50)
    assert scalar(page, "SELECT length(body) FROM page WHERE id = 1") > 50_000_000
    work_until_idle(page)
    assert data_count(page, "v1") == data_count(page, "chunk") > 10_000
    assert scalar(page, f"SELECT count(DISTINCT key_id) FROM {PAGE('chunk')}") == 50


def test_texts_without_anything_in_them_end_as_dead_letters_and_cost_nothing(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    page.execute(
        "INSERT INTO page VALUES (1, ''), (2, E' \\t\\n'), (3, E'\\u200b\\u0007'), (4, NULL), (5, repeat(' ', 9999))"
    )
    insert_rows(page, 6, 10)
    work_until_idle(page)
    letters = dead_letters(page)
    assert {key: letter[:2] for key, letter in letters.items()} == dict.fromkeys([1, 2, 3, 5], ("validate", "EL002"))
    assert scalar(page, f"SELECT state FROM {PAGE('document')} WHERE key_id = 4") == "empty"
    assert stub.counts()["texts"] == 5


def test_bytes_that_are_no_text_end_as_dead_letters_alone(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    stub_database.execute("CREATE TABLE page (id bigint PRIMARY KEY, raw bytea)")
    stub_database.execute(
        "INSERT INTO page SELECT g, CASE WHEN mod(g, 10) = 0 THEN '\\xff00fe'::bytea ELSE convert_to('text ' || g, 'UTF8') END"
        " FROM generate_series(1, 100) AS g"
    )
    create_pipeline(stub_database, "page", "page", "convert_from(raw, 'UTF8')", "stub", index_method="none")
    work_until_idle(stub_database)
    settle(stub_database)
    letters = dead_letters(stub_database)
    assert {key: letter[:2] for key, letter in letters.items()} == dict.fromkeys(range(10, 101, 10), ("read", "22021"))
    assert data_count(stub_database, "v1") == 90
    assert stub.counts()["texts"] == 90


def test_an_error_text_with_the_key_is_shown_nowhere(start_cluster: StartCluster, stub: StubProvider) -> None:
    cluster = start_cluster(environment={"EMBEDLINE_TEST_KEY": KEY})
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        create_stub_model(connection, stub, api_key_env="EMBEDLINE_TEST_KEY")
        create_stub_pipeline(connection, rows=3)
        words = f"Incorrect API key {KEY}, header 'Authorization: Bearer {KEY}'"
        for status in (400, 401, 429, 500):
            refusal = {"status": status, "body": json.dumps({"error": {"message": words}}), "match": f"row {status} "}
            stub.behave(rules=[refusal])
            insert_rows(connection, status, status)
            connection.execute("DELETE FROM embedline.circuit")
            connection.execute("SELECT embed_pending(1000)")
            connection.execute(f"UPDATE {PAGE('outbox')} SET not_before = now()")
            shown = []
            for relation in ("status", "dead_letter", "circuit", "pipeline_health", "worker", "model"):
                shown += connection.execute(f"SELECT t::text FROM embedline.{relation} AS t").fetchall()
            shown += connection.execute(f"SELECT t::text FROM {PAGE('outbox')} AS t").fetchall()
            assert KEY not in str(shown)
            assert str(status) in str(shown)
        assert dead_letters(connection)
        assert KEY not in cluster.log_file.read_text()
        remove_all(connection)
