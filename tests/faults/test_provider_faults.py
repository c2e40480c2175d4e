"""Rows that cannot be embedded, and providers that fail: nothing is lost, neighbours finish, reasons are kept."""

from __future__ import annotations

import json
from collections.abc import Callable

import psycopg
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from embedline.models.health_check import PROBE_TEXT
from generated_names import PAGE
from support import create_pages, create_pipeline, data_count, drain, queued, scalar, settle, wait_until

Answer = Callable[[list[str]], Response]


def vectors(texts: list[str]) -> list[list[float]]:
    """Return a vector of 8 dimensions for each text, different for different texts."""
    return [[float(1 + hash(text) % (n + 2)) for n in range(8)] for text in texts]


def answer(rows: list[list[float]]) -> Response:
    """Return an OpenAI-compatible answer."""
    data = [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)]
    body = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
    return Response(json.dumps(body), content_type="application/json")


class Endpoint:
    """An embeddings endpoint whose behaviour a test sets."""

    def __init__(self, server: HTTPServer) -> None:
        self.behave: Answer = lambda texts: answer(vectors(texts))
        self.texts: list[str] = []
        self.requests = 0
        self.url = server.url_for("/v1")
        server.expect_request("/v1/embeddings").respond_with_handler(self._handle)

    def _handle(self, request: Request) -> Response:
        texts = request.get_json()["input"]
        self.requests += 1
        self.texts += texts
        return self.behave(texts)


@pytest.fixture
def endpoint(httpserver: HTTPServer) -> Endpoint:
    return Endpoint(httpserver)


@pytest.fixture
def http_pipeline(database: psycopg.Connection, endpoint: Endpoint) -> psycopg.Connection:
    """A table of 20 rows with a pipeline on a model behind HTTP."""
    database.execute("SELECT embedline.create_model('http', 'openai', 'm', base_url => %s)", (endpoint.url,))
    create_pages(database, 20)
    create_pipeline(database, model="http")
    endpoint.texts.clear()
    return database


def test_a_poison_row_stands_alone_in_the_dead_letters(http_pipeline: psycopg.Connection, endpoint: Endpoint) -> None:
    def reject(texts: list[str]) -> Response:
        if any("number 7 " in text for text in texts):
            return Response('{"error": {"message": "bad input"}}', status=400, content_type="application/json")
        return answer(vectors(texts))

    endpoint.behave = reject
    assert drain(http_pipeline) == 19
    letters = http_pipeline.execute("SELECT key, stage, error_code FROM embedline.dead_letter").fetchall()
    assert letters == [({"id": "7"}, "embed", "EL012")]
    assert scalar(http_pipeline, f"SELECT state FROM {PAGE('document')} WHERE key_id = 7") == "dead"
    # Mended by an edit: the dead letter goes.
    http_pipeline.execute("UPDATE page SET body = 'harmless' WHERE id = 7")
    assert drain(http_pipeline) == 1
    assert scalar(http_pipeline, "SELECT count(*) FROM embedline.dead_letter") == 0


@pytest.mark.parametrize("poison", [[float("nan")] * 8, [float("inf")] + [0.0] * 7, [0.0] * 8])
def test_a_vector_that_is_no_vector_is_not_stored(
    http_pipeline: psycopg.Connection, endpoint: Endpoint, poison: list[float]
) -> None:
    endpoint.behave = lambda texts: answer(
        [poison if "number 3 " in text else row for text, row in zip(texts, vectors(texts), strict=True)]
    )
    assert drain(http_pipeline) == 19
    assert [row[0] for row in http_pipeline.execute("SELECT key FROM embedline.dead_letter")] == [{"id": "3"}]
    assert data_count(http_pipeline, "v1") == 19


def test_a_provider_that_is_down_charges_no_row_and_loses_none(
    http_pipeline: psycopg.Connection, endpoint: Endpoint
) -> None:
    endpoint.behave = lambda texts: Response("slow down", status=429, headers={"Retry-After": "1"})
    assert drain(http_pipeline) == 0
    assert queued(http_pipeline) == 20
    assert scalar(http_pipeline, f"SELECT max(attempts) FROM {PAGE('outbox')}") == 0
    assert scalar(http_pipeline, "SELECT last_error FROM embedline.status") is not None
    asked = endpoint.requests
    assert drain(http_pipeline) == 0
    assert endpoint.requests == asked, "an open circuit is not asked again at once"
    endpoint.behave = lambda texts: answer(vectors(texts))
    settle(http_pipeline)
    assert data_count(http_pipeline, "v1") == 20
    assert scalar(http_pipeline, "SELECT count(*) FROM embedline.circuit") == 0


def _drain_without_waiting(connection: psycopg.Connection) -> None:
    # Backoff and breaker are real; the tests do not wait for them.
    connection.execute("UPDATE embedline.circuit SET open_until = now()")
    connection.execute(f"UPDATE {PAGE('outbox')} SET not_before = now()")
    drain(connection)


def test_five_failures_of_a_row_make_a_dead_letter(http_pipeline: psycopg.Connection, endpoint: Endpoint) -> None:
    """Where the provider answers others."""
    endpoint.behave = lambda texts: answer(vectors(texts)) if texts == [PROBE_TEXT] else Response("broken", status=500)

    def all_dead() -> bool:
        _drain_without_waiting(http_pipeline)
        return bool(scalar(http_pipeline, "SELECT count(*) = 20 FROM embedline.dead_letter"))

    wait_until(all_dead, 30)
    assert queued(http_pipeline) == 0
    assert scalar(http_pipeline, "SELECT array_agg(DISTINCT attempts) FROM embedline.dead_letter") == [5]
    assert endpoint.texts.count(PROBE_TEXT) > 1


def test_a_provider_that_fails_everybody_makes_no_dead_letter(
    http_pipeline: psycopg.Connection, endpoint: Endpoint
) -> None:
    endpoint.behave = lambda texts: Response("broken", status=500)
    for _ in range(20):
        _drain_without_waiting(http_pipeline)
    assert endpoint.texts.count(PROBE_TEXT) > 1
    assert scalar(http_pipeline, "SELECT count(*) FROM embedline.dead_letter") == 0
    assert queued(http_pipeline) == 20
    assert scalar(http_pipeline, "SELECT last_error FROM embedline.circuit") is not None
    endpoint.behave = lambda texts: answer(vectors(texts))
    wait_until(lambda: _drain_without_waiting(http_pipeline) or queued(http_pipeline) == 0, 30)
    assert data_count(http_pipeline, "v1") == 20


def test_unchanged_chunks_are_never_paid_for_twice(http_pipeline: psycopg.Connection, endpoint: Endpoint) -> None:
    settle(http_pipeline)
    endpoint.texts.clear()
    http_pipeline.execute("UPDATE page SET views = views + 1")
    http_pipeline.execute("UPDATE page SET body = body")
    # The same content under another key: the vector is lent.
    http_pipeline.execute("INSERT INTO page SELECT id + 100, title, body FROM page")
    settle(http_pipeline)
    assert endpoint.texts == []
    assert data_count(http_pipeline, "v1") == 40


def test_one_pipelines_dead_provider_does_not_stop_another(
    http_pipeline: psycopg.Connection, endpoint: Endpoint
) -> None:
    create_pages(http_pipeline, 5, "other")
    create_pipeline(http_pipeline, "other", "other")
    endpoint.behave = lambda texts: Response("no", status=503)
    assert drain(http_pipeline) == 5


def test_a_wrong_dimension_is_refused(http_pipeline: psycopg.Connection, endpoint: Endpoint) -> None:
    """It is wrong of every text, so no row is given up."""
    endpoint.behave = lambda texts: answer([row[:4] for row in vectors(texts)])
    assert drain(http_pipeline) == 0
    assert data_count(http_pipeline, "v1") == 0
    assert "dimension" in scalar(http_pipeline, "SELECT last_error FROM embedline.status")
    assert scalar(http_pipeline, "SELECT count(*) FROM embedline.dead_letter") == 0
    assert queued(http_pipeline) == 20


def test_text_without_anything_printable_is_a_dead_letter(database: psycopg.Connection) -> None:
    create_pages(database, 2)
    database.execute(
        "INSERT INTO page VALUES (3, '', ''), (4, ' ', E'\\t\\n'), (5, NULL, 'x'), (6, E'\\u200b', E'\\u0007')"
    )
    create_pipeline(database)
    assert drain(database) == 2
    assert {row[0]["id"] for row in database.execute("SELECT key FROM embedline.dead_letter")} == {"3", "4", "6"}
    assert scalar(database, f"SELECT state FROM {PAGE('document')} WHERE key_id = 5") == "empty"


def test_mojibake_and_entities_are_repaired_before_embedding(
    http_pipeline: psycopg.Connection, endpoint: Endpoint
) -> None:
    settle(http_pipeline)
    endpoint.texts.clear()
    http_pipeline.execute("UPDATE page SET title = 'CafÃ© &amp; bar', body = 'â€œopenâ€\x9d' WHERE id = 1")
    settle(http_pipeline)
    assert endpoint.texts == ["Café & bar\n\n“open”"]


def test_a_document_of_five_megabytes_is_chunked_and_stored(database: psycopg.Connection) -> None:
    create_pages(database, 1)
    create_pipeline(database)
    database.execute(
        "UPDATE page SET body = (SELECT string_agg('sentence number ' || n || ' of the long report.', ' ')"
        " FROM generate_series(1, 130000) AS n) WHERE id = 1"
    )
    assert scalar(database, "SELECT length(body) FROM page") > 5_000_000
    settle(database, 90)
    assert data_count(database, "v1") == data_count(database, "chunk") > 3000


def test_a_volatile_content_ends_as_a_dead_letter_not_in_a_loop(database: psycopg.Connection) -> None:
    create_pages(database, 2)
    # Declared stable, and not true to it.
    database.execute("CREATE FUNCTION now_text() RETURNS text LANGUAGE sql STABLE AS 'SELECT clock_timestamp()::text'")
    create_pipeline(database, content="title || now_text()")

    def dead() -> bool:
        drain(database)
        return bool(scalar(database, "SELECT count(*) = 2 FROM embedline.dead_letter WHERE error_code = 'EL021'"))

    wait_until(dead, 30)
    assert queued(database) == 0
