"""embedline.rerank and models of task rerank, with a real cross-encoder and with endpoints that answer as told."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from stub_provider import StubProvider, stub_provider
from stub_rerank import score_of, tokens_of
from support import MODELS, create_pages, create_pipeline, scalar

QUERY = "two transactions block each other"
TEXTS = ["VACUUM reclaims storage.", "A deadlock occurs when two transactions wait for each other.", "The weather."]


@pytest.fixture(scope="module")
def running_stub() -> Iterator[StubProvider]:
    with stub_provider(8) as started:
        yield started


@pytest.fixture
def stub(running_stub: StubProvider) -> StubProvider:
    running_stub.behave()
    running_stub.forget()
    return running_stub


def create_reranker(connection: psycopg.Connection, stub: StubProvider, form: str = "jina", **options: Any) -> str:
    """Register a reranker behind the stub; its name is its form."""
    options = {"base_url": stub.rerank_urls[form], "task": "rerank", **options}
    named = ", ".join(f"{name} => %s" for name in options)
    return str(
        scalar(connection, f"SELECT embedline.create_model(%s, %s, 'm', {named})", (form, form, *options.values()))
    )


def create_local(connection: psycopg.Connection) -> None:
    connection.execute(
        "SELECT embedline.create_model('local', 'sentence-transformers', %s, task => 'rerank')",
        (str(MODELS / "reranker"),),
    )


def rerank(connection: psycopg.Connection, model: str, texts: list[Any] = TEXTS, query: str = QUERY) -> list[float]:
    found: list[float] = scalar(connection, "SELECT embedline.rerank(%s, %s, %s)", (model, query, texts))
    return found


def usage(connection: psycopg.Connection) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT model, pipeline, requests, tokens, money FROM embedline.usage").fetchall()


def test_a_local_reranker_scores_the_answer_best(database: psycopg.Connection) -> None:
    create_local(database)
    scores = rerank(database, "local")
    assert max(scores) == scores[1] > 0 > max(scores[0], scores[2])
    # The same score whichever texts come along, and none without texts.
    assert rerank(database, "local", TEXTS[1:2]) == scores[1:2]
    assert rerank(database, "local", []) == []
    assert usage(database) == []
    shown = database.execute("SELECT task, dimensions, max_tokens FROM embedline.model WHERE name = 'local'").fetchone()
    assert shown == ("rerank", None, 509)


def test_a_reranker_is_no_pipelines_model_and_an_embedding_model_no_reranker(database: psycopg.Connection) -> None:
    create_local(database)
    create_pages(database, 1)
    with pytest.raises(errors.InvalidParameterValue, match='model "local" is a reranker') as refused:
        create_pipeline(database, model="local")
    assert "task = 'embed'" in str(refused.value.diag.message_hint)
    create_pipeline(database)
    with pytest.raises(errors.InvalidParameterValue, match='model "local" is a reranker'):
        database.execute("SELECT embedline.add_embedding_version('page', 'local')")
    with pytest.raises(errors.InvalidParameterValue, match='model "local" is a reranker'):
        database.execute("SELECT * FROM embedline.estimate('page', 'local')")
    database.execute("SELECT embedline.set_price('local', 3)")
    database.execute("SELECT embedline.set_price('minilm', 2)")
    compared = database.execute("SELECT unit FROM embedline.estimate('page') WHERE figure LIKE '%minilm%'").fetchall()
    assert compared
    assert not database.execute("SELECT unit FROM embedline.estimate('page') WHERE figure LIKE '%local%'").fetchall()
    with pytest.raises(errors.InvalidParameterValue, match='model "static-256" makes vectors') as refused:
        rerank(database, "static-256")
    assert "task => 'rerank'" in str(refused.value.diag.message_hint)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("'x', 'openai', 'm', task => 'rerank'", "has no rerankers"),
        ("'x', 'cohere', 'm'", "makes no vectors"),
        ("'x', 'tei', 'm', task => 'sort'", "is not known"),
        ("'x', 'tei', 'm', task => 'rerank', dimensions => 8", "has no dimensions"),
        ("'x', 'tei', 'm', task => 'rerank', options => '{\"send_dimensions\": true}'", "unknown option"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(database: psycopg.Connection, arguments: str, words: str) -> None:
    with pytest.raises(errors.InvalidParameterValue, match=words):
        database.execute(f"SELECT embedline.create_model({arguments})")


def test_texts_that_cannot_be_scored_are_named(database: psycopg.Connection) -> None:
    create_local(database)
    with pytest.raises(errors.InvalidParameterValue, match="text 2 of 2 is NULL"):
        rerank(database, "local", ["a", None])
    with pytest.raises(psycopg.Error, match="text 2 of 2 has nothing in it") as refused:
        rerank(database, "local", ["a", " \t"])
    assert refused.value.sqlstate == "EL002"
    with pytest.raises(errors.InvalidParameterValue, match="query must not be NULL"):
        database.execute("SELECT embedline.rerank('local', NULL, '{a}')")


def test_readers_may_rerank_and_others_not(
    database: psycopg.Connection, stub: StubProvider, connect: Connect, make_role: MakeRole
) -> None:
    create_reranker(database, stub, price_per_million_tokens=1000)
    assert rerank(connect(make_role("embedline_reader")), "jina") == pytest.approx([score_of(QUERY, t) for t in TEXTS])
    assert usage(database)[0][:2] == ("jina", None)
    with pytest.raises(errors.InsufficientPrivilege):
        rerank(connect(make_role()), "jina")


def test_what_the_provider_counts_is_in_the_ledger(database: psycopg.Connection, stub: StubProvider) -> None:
    create_reranker(database, stub, price_per_million_tokens=1000)
    rerank(database, "jina")
    tokens = tokens_of(QUERY, TEXTS)
    assert usage(database) == [("jina", None, 1, tokens, Decimal(tokens) / 1000)]


def test_cohere_is_counted_in_search_units(database: psycopg.Connection, stub: StubProvider) -> None:
    create_reranker(database, stub, "cohere", price_per_million_tokens=2000)
    rerank(database, "cohere")
    assert usage(database) == [("cohere", None, 1, 1, Decimal("0.002"))]


def test_a_used_up_budget_stops_the_call_before_it_is_sent(database: psycopg.Connection, stub: StubProvider) -> None:
    create_reranker(database, stub)
    database.execute("SELECT embedline.set_budget('day', model => 'jina', tokens => 1)")
    stub.forget()
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match='budget of model "jina"'):
        rerank(database, "jina")
    assert stub.counts().get("requests", 0) == 0


def test_readers_cannot_lower_what_was_spent(
    database: psycopg.Connection, stub: StubProvider, connect: Connect, make_role: MakeRole
) -> None:
    create_reranker(database, stub)
    database.execute(
        "INSERT INTO embedline.reservation (model_id, pipeline_id, requests, tokens) VALUES (1, 1, 1, 500)"
    )
    reader = connect(make_role("embedline_reader"))
    reader.execute("SELECT embedline._reserve_rerank('jina', NULL, 100)")
    reader.execute("SELECT embedline._reserve_rerank('jina', NULL, -100)")
    for amount in (-1000, 7):
        # The second amount comes too late for those that the first has settled.
        query = "SELECT embedline._settle_rerank(r, %s) FROM generate_series(1, 10) AS r"
        reader.execute(query, (amount,))
    tokens = database.execute(
        "SELECT pipeline_id, tokens FROM embedline.reservation ORDER BY 1, reservation_id"
    ).fetchall()
    assert tokens == [(0, 0), (0, 0), (1, 500)]


def test_a_rate_limit_refuses_at_once(database: psycopg.Connection, stub: StubProvider) -> None:
    create_reranker(database, stub)
    database.execute("SELECT embedline.set_rate_limit('jina', requests_per_minute => 1)")
    rerank(database, "jina")
    with pytest.raises(psycopg.Error, match="rate limit of 1 requests a minute") as refused:
        rerank(database, "jina")
    assert refused.value.sqlstate == "EL011"


def test_a_read_only_transaction_reranks_unless_the_call_must_be_counted(
    database: psycopg.Connection, stub: StubProvider
) -> None:
    create_reranker(database, stub, price_per_million_tokens=1000)
    with database.transaction():
        database.execute("SET TRANSACTION READ ONLY")
        assert len(rerank(database, "jina")) == 3
    database.execute("SELECT embedline.set_budget('day', model => 'jina', tokens => 1000000)")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="read-only"), database.transaction():
        database.execute("SET TRANSACTION READ ONLY")
        rerank(database, "jina")


def test_a_search_can_have_its_pipeline_pay(database: psycopg.Connection, stub: StubProvider) -> None:
    create_reranker(database, stub)
    create_pages(database, 1)
    create_pipeline(database)
    database.execute(
        """
        CREATE FUNCTION public.rerank_for(pipeline_id bigint) RETURNS float8[] LANGUAGE plpython3u AS $python$
            from embedline.models.reranking import Reranking
            from embedline.postgres.session import Session
            return Reranking(Session(plpy, GD), "jina", "a word", ["a word", "another"], pipeline_id).result()
        $python$
        """
    )
    call = "SELECT public.rerank_for((SELECT pipeline_id FROM embedline.pipeline))"
    assert scalar(database, call) == [1.0, 0.5]
    assert usage(database)[0][:2] == ("jina", "page")


@pytest.mark.parametrize(
    ("rule", "sqlstate"),
    [
        ({"status": 401}, "EL013"),
        ({"answer": "nan"}, "EL016"),
        ({"answer": "few"}, "EL016"),
    ],
)
def test_a_failing_reranker_is_an_error(
    database: psycopg.Connection, stub: StubProvider, rule: dict[str, Any], sqlstate: str
) -> None:
    create_reranker(database, stub)
    stub.behave(rules=[rule])
    with pytest.raises(psycopg.Error) as failed:
        rerank(database, "jina")
    assert failed.value.sqlstate == sqlstate


def test_what_one_session_learns_of_a_dead_endpoint_spares_the_others(
    database: psycopg.Connection, stub: StubProvider, connect: Connect
) -> None:
    # The host that all sessions share keeps a client for each config. No other test has this one.
    create_reranker(database, stub, timeout_seconds=21)
    stub.behave(rules=[{"status": 503, "headers": {"Retry-After": "20"}}])
    stub.forget()
    for session in (database, connect()):
        with pytest.raises(psycopg.Error) as failed:
            rerank(session, "jina")
        assert failed.value.sqlstate == "EL011"
    assert stub.counts()["requests"] == 1


def test_a_statements_timeout_ends_the_wait(database: psycopg.Connection, stub: StubProvider) -> None:
    create_reranker(database, stub)
    stub.behave(latency=60)
    with pytest.raises(errors.QueryCanceled), database.transaction():
        database.execute("SET LOCAL statement_timeout = '300ms'")
        rerank(database, "jina")


def test_registration_warns_of_a_model_that_does_not_rank(database: psycopg.Connection, stub: StubProvider) -> None:
    told: list[str] = []

    def handler(notice: psycopg.errors.Diagnostic) -> None:
        told.append(str(notice.message_primary))

    database.add_notice_handler(handler)
    try:
        create_reranker(database, stub)
        assert told == []
        # A prefix with all words of the query gives every text the same score.
        create_reranker(database, stub, "vllm", document_prefix="Where do polar bears live? ")
    finally:
        database.remove_notice_handler(handler)
    assert len(told) == 1
    assert "no higher" in told[0]


def test_registration_fails_with_the_provider(database: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"status": 404}])
    with pytest.raises(psycopg.Error) as failed:
        create_reranker(database, stub)
    assert failed.value.sqlstate == "EL013"
    assert scalar(database, "SELECT count(*) FROM embedline.model WHERE task = 'rerank'") == 0


def test_a_reranker_moves_to_another_endpoint_that_answers(database: psycopg.Connection, stub: StubProvider) -> None:
    create_reranker(database, stub)
    before = scalar(database, "SELECT fingerprint FROM embedline.model WHERE name = 'jina'")
    stub.behave(rules=[{"status": 404}])
    with pytest.raises(psycopg.Error, match="answered with HTTP status 404"):
        database.execute("SELECT embedline.alter_model('jina', base_url => %s)", (stub.rerank_urls["tei"],))
    stub.behave()
    assert scalar(database, "SELECT fingerprint FROM embedline.model WHERE name = 'jina'") == before
    database.execute(
        "SELECT embedline.alter_model('jina', base_url => %s, options => %s)",
        (stub.rerank_urls["tei"], '{"extra_body": {"priority": 1}}'),
    )
    assert scalar(database, "SELECT fingerprint FROM embedline.model WHERE name = 'jina'") != before
    rerank(database, "jina")
    assert stub.last_rerank()["priority"] == 1
    database.execute("SELECT embedline.drop_model('jina')")
    with pytest.raises(errors.UndefinedObject):
        rerank(database, "jina")
