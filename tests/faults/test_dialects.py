"""Endpoints that are nearly OpenAI's: what they leave out, refuse or write in another way, and what becomes of it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from dialects import Body, Dialect, as_asked, as_base64, serving
from embedline.core.request_tokens import likely_tokens
from stub_provider import vector_of
from support import create_pipeline, scalar, settle
from working import assert_all_settled, dead_letters, remove_all, work_until_idle

ROWS = 40


@pytest.fixture
def endpoint() -> Iterator[Dialect]:
    """An endpoint that behaves like OpenAI's until the test says otherwise."""
    with serving(Dialect()) as started:
        yield started


@pytest.fixture
def db(module_database: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A connection to a database of this module; pipelines and models are gone after each test."""
    yield module_database
    remove_all(module_database)


def create_model(db: psycopg.Connection, endpoint: Dialect, name: str = "stub", **options: Any) -> None:
    named = "".join(f", {option} => %s" for option in options)
    query = f"SELECT embedline.create_model(%s, 'openai', 'stub', base_url => %s{named})"
    db.execute(query, (name, endpoint.url, *options.values()))
    endpoint.forget()


def create_pages(db: psycopg.Connection, count: int = ROWS, model: str = "stub") -> None:
    db.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    add_pages(db, 1, count)
    create_pipeline(db, "page", "page", "body", model, index_method="none")


def add_pages(db: psycopg.Connection, first: int, last: int) -> None:
    numbers = "generate_series(%s::integer, %s) AS n"
    db.execute(f"INSERT INTO page SELECT n, 'row ' || n || ' about something' FROM {numbers}", (first, last))


def learned(db: psycopg.Connection, name: str = "stub") -> dict[str, str]:
    return dict(scalar(db, "SELECT learned FROM embedline.model WHERE name = %s", (name,)))


def last_error(db: psycopg.Connection) -> str | None:
    return scalar(db, "SELECT last_error FROM embedline.status")  # type: ignore[no-any-return]


# The order of the vectors


def indexes(change: Callable[[int, int], object]) -> Callable[[list[Body]], list[Body]]:
    """Return a shape that writes another index: a function of the number and of how many there are; None leaves it out."""

    def shape(items: list[Body]) -> list[Body]:
        for number, item in enumerate(items):
            del item["index"]
            if (value := change(number, len(items))) is not None:
                item["index"] = None if value == "null" else value
        return items

    return shape


VAGUE = {
    "missing for the first": lambda number, _: number or None,
    "missing for all": lambda *_: None,
    "missing for every other": lambda number, _: number if number % 2 else None,
    "null": lambda *_: "null",
    "null for the first": lambda number, _: number or "null",
    "all 0": lambda *_: 0,
    "a string": lambda number, _: str(number),
    "a float": lambda number, _: float(number),
    "a word": lambda number, _: f"item {number}",
    "counted from 1": lambda number, _: number + 1,
    "duplicated": lambda number, _: max(number, 1),
    "counted again for each part": lambda number, _: number % 16,
    "out of range": lambda number, _: number + 100_000,
    "out of range for the first": lambda number, _: number or 99_999,
    "a duplicate for the first": lambda number, _: number or 7,
    "one out of range": lambda number, count: 99_999 if number == count - 1 else number,
    "-1": lambda *_: -1,
    "true": lambda *_: True,
}


@pytest.mark.parametrize("kind", VAGUE)
def test_without_a_usable_index_vectors_are_taken_by_position_and_paid_once(
    db: psycopg.Connection, endpoint: Dialect, kind: str
) -> None:
    endpoint.shape = indexes(VAGUE[kind])
    create_model(db, endpoint)
    create_pages(db)
    settle(db)
    assert dead_letters(db) == {}
    assert assert_all_settled(db, endpoint.dimensions) == ROWS
    assert sorted(endpoint.paid) == sorted(set(endpoint.paid))
    assert len(endpoint.paid) == ROWS
    assert learned(db)["index"] == "order of the texts"


def test_a_missing_index_is_said_once_and_stays_until_an_error_comes(db: psycopg.Connection, endpoint: Dialect) -> None:
    endpoint.shape = indexes(lambda *_: None)
    create_model(db, endpoint)
    create_pages(db)
    work_until_idle(db)
    remark = last_error(db)
    assert remark is not None
    assert remark.startswith('model "stub": ')
    assert "no usable index" in remark
    said = scalar(db, "SELECT last_error_at FROM embedline.status")
    add_pages(db, 100, 110)
    work_until_idle(db)
    assert last_error(db) == remark
    assert scalar(db, "SELECT last_error_at FROM embedline.status") == said
    db.execute("UPDATE embedline.pipeline_health SET last_error = NULL, last_error_at = NULL")
    add_pages(db, 200, 210)
    db.execute("SELECT embed_pending(100)")
    assert last_error(db) is None


@pytest.mark.parametrize("write", [lambda number: number, str, float])
@pytest.mark.parametrize("left_out", [(), (0,), (7,)])
def test_an_index_that_tells_another_order_is_heeded(
    db: psycopg.Connection, endpoint: Dialect, write: Callable[[int], object], left_out: tuple[int, ...]
) -> None:
    def shape(items: list[Body]) -> list[Body]:
        shaped = indexes(lambda number, _: None if number in left_out and len(items) > 8 else write(number))(items)
        return shaped[::-1]

    endpoint.shape = shape
    create_model(db, endpoint)
    create_pages(db)
    settle(db)
    assert assert_all_settled(db, endpoint.dimensions) == ROWS
    assert len(endpoint.paid) == ROWS


def test_indexes_that_contradict_each_other_never_mix_vectors_up(db: psycopg.Connection, endpoint: Dialect) -> None:
    endpoint.shape = lambda items: indexes(lambda number, _: None if number < 2 else number)(items)[::-1]
    create_model(db, endpoint)
    create_pages(db)
    settle(db)
    # Alone each text has but one vector.
    assert assert_all_settled(db, endpoint.dimensions) == ROWS


@pytest.mark.parametrize("change", [lambda items: items[:-1], lambda items: [*items, items[-1]]])
def test_another_number_of_vectors_than_texts_stays_an_error(
    db: psycopg.Connection, endpoint: Dialect, change: Callable[[list[Body]], list[Body]]
) -> None:
    create_model(db, endpoint)
    create_pages(db)
    endpoint.spares_probe = True
    endpoint.shape = lambda items: change(indexes(lambda *_: None)(items))
    settle(db)
    assert {letter[1] for letter in dead_letters(db).values()} == {"EL014"}
    assert len(dead_letters(db)) == ROWS


# The encoding of the vectors


def refuse_base64(status: int, answer: object) -> Callable[[Body], tuple[int, object] | None]:
    return lambda body: (status, answer) if body.get("encoding_format") == "base64" else None


def refuse_field(body: Body) -> tuple[int, object] | None:
    return (400, {"error": "unknown field: encoding_format"}) if "encoding_format" in body else None


REFUSALS = {
    "a 400 that says so": refuse_base64(400, {"error": {"message": "encoding_format base64 is not supported"}}),
    "a 422 of pydantic": refuse_base64(
        422,
        {"detail": [{"type": "literal_error", "loc": ["body", "encoding_format"], "msg": "Input should be 'float'"}]},
    ),
    "a 400 that names the parameter": refuse_base64(
        400, {"error": {"message": "invalid value", "type": "invalid_request_error", "param": "encoding_format"}}
    ),
    "a 400 without words": refuse_base64(400, {}),
    "a 501": refuse_base64(501, {"error": "not implemented"}),
    "a 500": refuse_base64(500, {"error": "unsupported encoding format: base64"}),
    "an error with status 200": refuse_base64(200, {"error": {"message": "base64 is not supported"}}),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_where_base64_is_refused_lists_are_asked_for_and_that_is_remembered(
    db: psycopg.Connection, endpoint: Dialect, kind: str
) -> None:
    endpoint.refuse = REFUSALS[kind]
    create_model(db, endpoint)
    assert learned(db) == {"encoding_format": "float"}
    create_pages(db)
    # Sessions of their own, which know it from the model.
    work_until_idle(db, count=2)
    assert {body["encoding_format"] for body in endpoint.requests} == {"float"}
    assert assert_all_settled(db, endpoint.dimensions) == ROWS
    assert sorted(endpoint.paid) == sorted(set(endpoint.paid))
    assert last_error(db) is None


def test_where_the_field_is_refused_it_is_left_out(db: psycopg.Connection, endpoint: Dialect) -> None:
    endpoint.refuse = refuse_field
    create_model(db, endpoint)
    assert learned(db) == {"encoding_format": "none"}
    create_pages(db)
    settle(db)
    assert not [body for body in endpoint.requests if "encoding_format" in body]
    assert assert_all_settled(db, endpoint.dimensions) == ROWS


def test_a_worker_learns_it_too_without_a_dead_letter(db: psycopg.Connection, endpoint: Dialect) -> None:
    create_model(db, endpoint)
    assert learned(db) == {}
    create_pages(db)
    endpoint.refuse = REFUSALS["a 400 that says so"]
    work_until_idle(db)
    assert learned(db) == {"encoding_format": "float"}
    assert dead_letters(db) == {}
    assert assert_all_settled(db, endpoint.dimensions) == ROWS
    assert len(endpoint.paid) == ROWS
    endpoint.forget()
    add_pages(db, 100, 140)
    work_until_idle(db)
    assert {body["encoding_format"] for body in endpoint.requests} == {"float"}


def test_a_text_about_base64_that_is_refused_teaches_nothing(db: psycopg.Connection, endpoint: Dialect) -> None:
    create_model(db, endpoint)
    create_pages(db, 4)
    db.execute("UPDATE page SET body = 'data:image/png;base64,AAAA' WHERE id = 2")

    def refuse(body: Body) -> tuple[int, object] | None:
        bad = [text for text in body["input"] if "AAAA" in text]
        return (400, {"error": {"message": f"not a text: {bad[0]}"}}) if bad else None

    endpoint.refuse = refuse
    settle(db)
    assert list(dead_letters(db)) == [2]
    assert learned(db) == {}


@pytest.mark.parametrize("encoding", ["base64", "float", "none"])
def test_the_option_fixes_the_encoding(db: psycopg.Connection, endpoint: Dialect, encoding: str) -> None:
    create_model(db, endpoint, options=f'{{"encoding_format": "{encoding}"}}')
    create_pages(db)
    settle(db)
    assert {body.get("encoding_format", "none") for body in endpoint.requests} == {encoding}
    assert learned(db) == {}
    assert assert_all_settled(db, endpoint.dimensions) == ROWS
    endpoint.forget()
    endpoint.refuse = lambda body: (400, {"error": "encoding_format"})
    with pytest.raises(psycopg.Error, match="400"):
        create_model(db, endpoint, "fixed", options=f'{{"encoding_format": "{encoding}"}}')
    assert len(endpoint.requests) == 1


def test_providers_that_ignore_the_field_and_send_lists_work_as_before(
    db: psycopg.Connection, endpoint: Dialect
) -> None:
    endpoint.encode = lambda vector, _: [float(value) for value in vector]
    create_model(db, endpoint)
    create_pages(db)
    settle(db)
    assert {body["encoding_format"] for body in endpoint.requests} == {"base64"}
    assert learned(db) == {}
    assert assert_all_settled(db, endpoint.dimensions) == ROWS


def written_as(kind: str) -> Callable[[Any, Body], object]:
    return lambda vector, _: base64.b64encode(vector.astype(kind).tobytes()).decode()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("<f8", "base64 holds float64, not little-endian float32"),
        (">f8", "base64 holds big-endian float64,"),
        (">f4", "base64 holds big-endian float32,"),
        ("<f2", "base64 holds float16,"),
    ],
)
def test_base64_of_another_encoding_is_refused_with_the_way_out(db: psycopg.Connection, kind: str, words: str) -> None:
    with serving(Dialect(dimensions=256, encode=written_as(kind))) as endpoint:
        with pytest.raises(psycopg.Error, match=words) as refused:
            create_model(db, endpoint)
        assert refused.value.sqlstate == "EL013"
        assert "encoding_format" in str(refused.value.diag.message_hint)
        # Of a model that was registered well, no row is charged.
        endpoint.encode = as_asked
        create_model(db, endpoint)
        create_pages(db, 4)
        endpoint.encode = written_as(kind)
        db.execute("SELECT embed_pending(10)")
        assert words in str(last_error(db))
        assert dead_letters(db) == {}


@pytest.mark.parametrize(
    ("encode", "code", "words"),
    [
        (
            lambda vector: base64.b64encode(vector.tobytes()[:-3]).decode(),
            "EL014",
            "not made of float32 values: It holds 1021 bytes",
        ),
        (lambda vector: as_base64(vector[:-1]), "EL004", "Expected 256 dimensions, got 255"),
        (lambda vector: as_base64(vector[:128]), "EL004", "as many as 256 values of float16 have"),
        (lambda vector: "not base64!", "EL014", "neither base64 nor a list"),
    ],
)
def test_base64_of_a_wrong_length_is_a_clear_error(
    db: psycopg.Connection, encode: Callable[[Any], str], code: str, words: str
) -> None:
    with serving(Dialect(dimensions=256, spares_probe=True)) as endpoint:
        create_model(db, endpoint)
        create_pages(db, 3)
        endpoint.encode = lambda vector, _: encode(vector)
        settle(db)
        assert {letter[1] for letter in dead_letters(db).values()} == {code}
        assert all(words in letter[2] for letter in dead_letters(db).values())


# Parameters that an endpoint asks for


def needs_input_type(body: Body) -> tuple[int, object] | None:
    known = body.get("input_type") in ("passage", "query") and body.get("truncate") == "END"
    return None if known else (400, {"error": "'input_type' parameter is required"})


def embed_by_type(text: str, body: Body) -> Any:
    return vector_of(f"{body['input_type']} {text}", 8)


BODIES = '{"extra_body": {"truncate": "END"}, "document_body": {"input_type": "passage"}, "query_body": {"input_type": "query"}}'


def test_bodies_are_sent_with_documents_and_queries(db: psycopg.Connection, endpoint: Dialect) -> None:
    endpoint.refuse = needs_input_type
    endpoint.embed = embed_by_type
    with pytest.raises(psycopg.Error, match="status 400"):
        create_model(db, endpoint)
    endpoint.forget()
    create_model(db, endpoint, options=BODIES)
    create_pages(db)
    settle(db)
    assert dead_letters(db) == {}
    assert {body["input_type"] for body in endpoint.requests} == {"passage"}
    assert scalar(db, "SELECT vector_dims(embedline.embed_query('page', 'rivers'))") == 8
    assert endpoint.requests[-1] == {
        "input": ["rivers"], "model": "stub", "encoding_format": "base64", "truncate": "END", "input_type": "query",
    }  # fmt: skip
    expected = vector_of("query rivers", 8)
    found = scalar(db, "SELECT embedline.embed_query('page', 'rivers')::real[]")
    assert found == pytest.approx(list(expected / (expected @ expected) ** 0.5), abs=1e-6)


def test_bodies_that_the_endpoint_refuses_for_queries_fail_at_create_model(
    db: psycopg.Connection, endpoint: Dialect
) -> None:
    endpoint.refuse = needs_input_type
    with pytest.raises(psycopg.Error, match="status 400"):
        create_model(db, endpoint, options=BODIES.replace('"query"}', '"querry"}'))
    assert scalar(db, "SELECT count(*) FROM embedline.model WHERE name = 'stub'") == 0


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ('{"extra_bdy": {}}', 'unknown option "extra_bdy"', 'Did you mean "extra_body"?'),
        ('{"document_body": {"model": "other"}}', 'must not set "model"', "the parameter model"),
        ('{"extra_body": {"input": []}}', 'must not set "input"', "pipeline"),
        ('{"extra_body": 1}', "must be an object", "extra_body"),
        ("[1]", "must be an object", "max_tokens"),
    ],
)
def test_options_are_refused_before_anything_is_sent(
    db: psycopg.Connection, endpoint: Dialect, options: str, message: str, hint: str
) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=message) as refused:
        create_model(db, endpoint, options=options)
    assert hint in str(refused.value.diag.message_hint)
    assert endpoint.requests == []


def test_a_model_that_was_registered_with_a_stray_option_goes_on(db: psycopg.Connection, endpoint: Dialect) -> None:
    create_model(db, endpoint)
    db.execute("""UPDATE embedline.model SET options = '{"stray": 1, "encoding_format": "int8"}' WHERE name = 'stub'""")
    create_pages(db, 4)
    settle(db)
    assert assert_all_settled(db, endpoint.dimensions) == 4


# What an answer says that it cost


USAGES = {
    "0": lambda _: {"prompt_tokens": 0, "total_tokens": 0},
    "null": lambda _: {"prompt_tokens": None, "total_tokens": None},
    "no usage": lambda _: None,
    "a usage that is null": lambda _: "null",
    "without totals": lambda _: {},
    "negative": lambda _: {"total_tokens": -5},
    "a string": lambda _: {"total_tokens": "12"},
    "true": lambda _: {"total_tokens": True},
    "one for all": lambda _: {"total_tokens": 1},
    "as many as texts": lambda texts: {"total_tokens": len(texts)},
    "a billion": lambda _: {"total_tokens": 10**9},
    "more than bigint holds": lambda _: {"total_tokens": 10**30},
}
# Text of 500 characters.
_LONG = "repeat('word ', 100)"
_SPENT = "SELECT sum(tokens) FROM embedline.reservation JOIN embedline.pipeline USING (pipeline_id) WHERE settled_at IS NOT NULL"


@pytest.mark.parametrize("kind", USAGES)
def test_a_usage_that_cannot_be_true_counts_as_unknown_for_budgets(
    db: psycopg.Connection, endpoint: Dialect, kind: str
) -> None:
    endpoint.usage = USAGES[kind]
    create_model(db, endpoint, max_batch_items=2)
    db.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    db.execute(f"INSERT INTO page SELECT n, n || {_LONG} FROM generate_series(1, 20) AS n")
    create_pipeline(db, "page", "page", "body", "stub", index_method="none")
    db.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 1300)")
    db.execute("SELECT embed_pending(1000)")
    db.execute("SELECT embed_pending(1000)")
    # Requests of two texts as long as their estimates fit into the budget.
    spent = sum(map(likely_tokens, endpoint.paid))
    assert 0 < spent <= 1300 < spent + 2 * likely_tokens(endpoint.paid[-1])
    assert scalar(db, _SPENT) == spent
    assert dead_letters(db) == {}


@pytest.mark.parametrize(
    "usage",
    [
        {"total_tokens": 100},
        {"total_tokens": 0, "prompt_tokens": 100},
        {"total_tokens": None, "prompt_tokens": 100},
        {"prompt_tokens": 100},
    ],
)
def test_a_usage_that_can_be_true_is_what_the_ledger_says(
    db: psycopg.Connection, endpoint: Dialect, usage: Body
) -> None:
    endpoint.usage = lambda _: usage
    create_model(db, endpoint)
    create_pages(db, 10)
    db.execute("SELECT embed_pending(1000)")
    assert scalar(db, _SPENT) == 100
