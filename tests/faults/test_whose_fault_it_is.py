"""A text that makes its provider fail, and a provider that fails whatever it is asked: the one costs a row, the other none."""

from __future__ import annotations

import json
import math
from typing import Any

import psycopg
import pytest

from embedline.models.health_check import PROBE_TEXT
from generated_names import PAGE
from stub_provider import StubProvider
from support import create_pipeline, queued, scalar, settle, wait_until
from working import (
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    insert_rows,
    work_until_idle,
    working,
)


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on an empty table."""
    create_stub_model(stub_database, stub, timeout_seconds=0.5)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    return stub_database


def finish(connection: psycopg.Connection, seconds: float = 60) -> None:
    """Work until nothing is queued. The backoff is real; the test does not wait for it."""
    with working(connection, seconds=seconds + 10):

        def nothing_waits() -> bool:
            connection.execute(f"UPDATE {PAGE('outbox')} SET not_before = now() WHERE claimed_by IS NULL")
            return queued(connection) == 0

        wait_until(nothing_waits, seconds, "nothing waits")


WORDS = '{"error": {"message": "json: unsupported value: NaN"}}'
# What one text makes its provider do, the error code of its dead letter and some of its words.
FAULTS_OF_A_TEXT: dict[str, tuple[dict[str, Any], str, str]] = {
    "400": ({"status": 400, "body": WORDS}, "EL012", "unsupported value"),
    "403": ({"status": 403, "body": WORDS}, "EL013", "unsupported value"),
    "404": ({"status": 404, "body": WORDS}, "EL013", "unsupported value"),
    "408": ({"status": 408, "body": WORDS}, "EL011", "unsupported value"),
    "422": ({"status": 422, "body": WORDS}, "EL012", "unsupported value"),
    "500": ({"status": 500, "body": WORDS}, "EL011", "unsupported value"),
    "501": ({"status": 501, "body": WORDS}, "EL011", "unsupported value"),
    "502": ({"status": 502, "body": WORDS}, "EL011", "unsupported value"),
    "503": ({"status": 503, "body": WORDS}, "EL011", "unsupported value"),
    "504": ({"status": 504, "body": WORDS}, "EL011", "unsupported value"),
    "time-out": ({"answer": "silence"}, "EL011", "did not answer"),
    "cut body": ({"answer": "cut"}, "EL011", "connection"),
    "closed connection": ({"answer": "closed"}, "EL011", "connection"),
    "html": ({"answer": "html"}, "EL011", "not JSON"),
    "too few vectors": ({"answer": "few"}, "EL014", "vectors for"),
    "vectors of NaN": ({"answer": "nan"}, "EL014", "not a finite number"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_A_TEXT)
def test_one_text_that_makes_the_provider_fail_is_given_up_alone(
    page: psycopg.Connection, stub: StubProvider, fault: str
) -> None:
    rule, code, words = FAULTS_OF_A_TEXT[fault]
    stub.behave(rules=[rule | {"match": "row 57 "}], remember=True)
    insert_rows(page, 1, 100)
    finish(page)
    letters = dead_letters(page)
    assert list(letters) == [57]
    assert letters[57][:2] == ("embed", code)
    assert words in letters[57][2]
    assert assert_all_settled(page, stub.dimensions) == 99
    # Twice together, by halves and the neighbour at each, three more tries alone, and the harmless text.
    assert stub.counts()["requests"] <= 2 + 2 * math.ceil(math.log2(100)) + 3 + 7
    seen = stub.texts_seen()
    seen.pop(PROBE_TEXT, None)
    assert set(seen.values()) == {1}, "nothing is paid for twice"


def test_the_requests_for_a_failing_text_grow_with_the_logarithm_of_the_batch(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    stub.behave(rules=[{"status": 500, "match": " POISON"}])
    asked = []
    for first, rows in ((1, 100), (10_001, 1600)):
        insert_rows(page, first, first + rows - 1)
        page.execute("UPDATE page SET body = body || ' POISON' WHERE id = %s", (first + rows // 3,))
        stub.forget()
        finish(page)
        asked.append(stub.counts()["requests"])
    assert set(dead_letters(page)) == {1 + 33, 10_001 + 533}
    # Sixteen times the rows: four more halvings, of two requests each. Of batches there may be some more, too.
    assert asked[1] <= asked[0] + 2 * 4 + 10


@pytest.mark.parametrize("count", [2, 5])
def test_several_failing_texts_of_a_batch_are_given_up_and_no_others(
    page: psycopg.Connection, stub: StubProvider, count: int
) -> None:
    poison = [7 + n * (256 // count) for n in range(count)]
    insert_rows(page, 1, 256)
    page.execute("UPDATE page SET body = body || ' POISON' WHERE id = ANY (%s)", (poison,))
    stub.behave(rules=[{"status": 500, "match": " POISON"}], remember=True)
    finish(page)
    assert sorted(dead_letters(page)) == poison
    assert assert_all_settled(page, stub.dimensions) == 256 - count
    # Each is looked for by halves; the later tries are of the poison alone, again by halves, each with a harmless text.
    assert stub.counts()["requests"] <= count * (2 * 8 + 3 * 6) + 10


def test_dead_letters_of_a_batch_that_fell_with_one_text_are_embedded_after_requeue(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    stub.behave(rules=[{"status": 500, "match": "row"}])
    insert_rows(page, 1, 40)
    finish(page)
    assert len(dead_letters(page)) == 40
    stub.behave(rules=[{"status": 500, "match": "row 7 "}], remember=True)
    stub.forget()
    assert scalar(page, "SELECT embedline.requeue('page')") == 40
    finish(page)
    assert list(dead_letters(page)) == [7]
    assert assert_all_settled(page, stub.dimensions) == 39
    assert stub.counts()["requests"] <= 2 + 2 * math.ceil(math.log2(40)) + 3 + 7


def test_a_failing_chunk_of_a_large_document_costs_that_document_alone(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    page.execute(
        "INSERT INTO page SELECT 1, string_agg('Sentence number ' || n || ' of the report. ', '')"
        " FROM generate_series(1, 2000) AS n"
    )
    insert_rows(page, 2, 50)
    stub.behave(rules=[{"status": 500, "match": "number 777 "}])
    finish(page)
    assert list(dead_letters(page)) == [1]
    assert scalar(page, f"SELECT count(DISTINCT key_id) FROM {PAGE('chunk')}") == 49


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"answer": "closed"}, {"answer": "html"}])
def test_a_blip_neither_splits_a_batch_nor_gives_a_row_up(
    page: psycopg.Connection, stub: StubProvider, fault: dict[str, Any]
) -> None:
    stub.behave(rules=[fault | {"times": 1}], remember=True)
    insert_rows(page, 1, 100)
    work_until_idle(page)
    assert assert_all_settled(page, stub.dimensions) == 100
    # The failed one, the harmless text, and all rows together once more.
    assert [request.texts for request in stub.asked()] == [100, 1, 100]


# Faults of an account or of a provider as a whole, told as those of a request.
ARREARAGE = (
    '{"error": {"type": "Arrearage", "message": "Access denied, please make sure your account is in good standing."}}'
)
FAULTS_OF_A_PROVIDER: dict[str, dict[str, Any]] = {
    **{
        str(status): {"status": status, "body": ARREARAGE}
        for status in (400, 401, 402, 403, 404, 413, 422, 451, 500, 503)
    },
    "NaN for everything": {"answer": "nan"},
    "zeros for everything": {"answer": "zero"},
    "another width": {"answer": "narrow"},
    "too few vectors": {"answer": "few"},
    "html": {"answer": "html"},
    "closed connections": {"answer": "closed"},
}


@pytest.mark.parametrize("fault", FAULTS_OF_A_PROVIDER)
def test_a_failure_that_a_harmless_text_meets_too_is_charged_to_no_row_and_heals_by_itself(
    page: psycopg.Connection, stub: StubProvider, fault: str
) -> None:
    rule = FAULTS_OF_A_PROVIDER[fault]
    stub.behave(rules=[rule])
    insert_rows(page, 1, 300)
    with working(page):
        wait_until(
            lambda: scalar(page, "SELECT count(*) FROM embedline.circuit WHERE open_until > now()") == 1,
            20,
            "the circuit is open",
        )
        assert dead_letters(page) == {}
        assert queued(page) == 300
        wait_until(
            lambda: scalar(page, f"SELECT coalesce(max(attempts), 0) FROM {PAGE('outbox')}") == 0,
            5,
            "no try is charged",
        )
        assert stub.counts()["requests"] <= 8
        if "body" in rule:
            assert "good standing" in scalar(page, "SELECT last_error FROM embedline.status")
        stub.behave(remember=True)
        # The pause is real; the test does not wait for it.
        page.execute("UPDATE embedline.circuit SET open_until = now()")
        wait_until(lambda: queued(page) == 0, 20, "nothing waits")
    assert assert_all_settled(page, stub.dimensions) == 300
    assert dead_letters(page) == {}
    assert scalar(page, "SELECT count(*) FROM embedline.circuit") == 0


def test_an_account_that_is_closed_amid_the_work_costs_no_row(page: psycopg.Connection, stub: StubProvider) -> None:
    """Whatever was answered before says nothing about the time since."""
    insert_rows(page, 1, 50)
    work_until_idle(page)
    stub.behave(rules=[{"status": 400, "body": ARREARAGE}])
    stub.forget()
    with working(page):
        insert_rows(page, 51, 90)
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.circuit") == 1, 20, "the circuit is open")
        insert_rows(page, 91, 95)
    assert dead_letters(page) == {}
    assert stub.counts()["requests"] <= 4


def test_embed_pending_tells_an_account_from_a_text(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"status": 400, "body": ARREARAGE}])
    insert_rows(page, 1, 64)
    assert scalar(page, "SELECT embed_pending(1000)") == 0
    assert dead_letters(page) == {}
    assert stub.counts()["requests"] == 2
    stub.behave(rules=[{"status": 400, "match": "row 33 "}])
    page.execute("UPDATE embedline.circuit SET open_until = now()")
    assert scalar(page, "SELECT embed_pending(1000)") == 63
    assert list(dead_letters(page)) == [33]


def test_a_versions_failing_chunk_stands_alone_and_an_account_costs_it_none(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    insert_rows(page, 1, 100)
    work_until_idle(page)
    page.execute(
        "SELECT embedline.create_model('second', 'openai', 'stub', base_url => %s, document_prefix => 'p: ')",
        (stub.url,),
    )
    stub.behave(rules=[{"status": 403, "body": ARREARAGE}])
    page.execute("SELECT embedline.add_embedding_version('page', 'second', index_method => 'none')")
    with working(page):
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.circuit") == 1, 20, "the circuit is open")
    assert scalar(page, "SELECT count(*) FROM embedline.version_dead_letter") == 0
    assert scalar(page, "SELECT max(attempts) FROM embedline.version_queue") in (0, None)
    stub.behave(rules=[{"status": 500, "body": json.dumps({"error": "NaN"}), "match": "row 57 "}])
    page.execute("DELETE FROM embedline.circuit")
    with working(page):

        def filled() -> bool:
            page.execute("UPDATE embedline.version_queue SET not_before = now() WHERE claimed_by IS NULL")
            query = "SELECT vectors = 99 AND dead_letters = 1 FROM embedline.versions WHERE version = 2"
            return bool(scalar(page, query))

        wait_until(filled, 30, "all but one are filled")


def test_a_provider_that_refuses_everything_lets_other_models_work(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(page, stub, name="other")
    page.execute("CREATE TABLE other (id bigint PRIMARY KEY, body text)")
    create_pipeline(page, "other", "other", "body", "other", index_method="none")
    stub.behave(rules=[{"status": 400, "match": "page row"}, {"status": 400, "match": PROBE_TEXT}])
    insert_rows(page, 1, 20)
    insert_rows(page, 1, 20, "other")
    with working(page):
        wait_until(lambda: queued(page, "other") == 0, 20, "the other is embedded")
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.circuit") == 1, 20, "the circuit is open")
    assert dead_letters(page) == {}
