"""The client of rerank endpoints, before a server that answers in the form of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_httpserver import HTTPServer

from embedline.core.embedding import ModelConfig
from embedline.core.reranking import RerankScores
from embedline.embedders import create_reranker
from embedline.errors import (
    InputRejected,
    InvalidParameter,
    InvalidScores,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.providers.rerank_endpoint import RerankEndpoint
from stub_provider import StubProvider, stub_provider
from stub_rerank import score_of, tokens_of

KEY = "sk-test-0123456789abcdef"
LIMIT = 30.0
QUERY = "who vacuums dead tuples"
TEXTS = ["An index speeds up a search.", "VACUUM removes dead tuples.", "Nobody knows who wrote this."]
FORMS = ("tei", "cohere", "jina", "vllm")


@pytest.fixture(scope="module")
def running_stub() -> Iterator[StubProvider]:
    with stub_provider(8) as started:
        yield started


@pytest.fixture
def stub(running_stub: StubProvider) -> StubProvider:
    running_stub.behave()
    running_stub.forget()
    return running_stub


Make = Callable[..., RerankEndpoint]


@pytest.fixture
def make(running_stub: StubProvider) -> Iterator[Make]:
    opened: list[RerankEndpoint] = []

    def reranker(form: str = "jina", **changes: Any) -> RerankEndpoint:
        fields: dict[str, Any] = {"base_url": running_stub.rerank_urls[form], "task": "rerank", **changes}
        made = create_reranker(ModelConfig("r", form, "a-reranker", **fields))
        assert isinstance(made, RerankEndpoint)
        opened.append(made)
        return made

    yield reranker
    for made in opened:
        made.close()


def scores(reranker: RerankEndpoint, texts: list[str] = TEXTS) -> RerankScores:
    return reranker.submit_rerank(QUERY, texts).result(LIMIT)


def fail(reranker: RerankEndpoint, texts: list[str] = TEXTS) -> BaseException:
    error = reranker.submit_rerank(QUERY, texts).exception(LIMIT)
    assert error is not None
    return error


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_scores_in_the_order_of_the_texts(stub: StubProvider, make: Make, form: str) -> None:
    found = scores(make(form))
    assert found.values() == pytest.approx([score_of(QUERY, text) for text in TEXTS])
    body = stub.last_rerank()
    assert body["query"] == QUERY
    assert body["texts" if form == "tei" else "documents"] == TEXTS
    expected_units = {"tei": None, "cohere": 1}.get(form, tokens_of(QUERY, TEXTS))
    assert found.units == expected_units
    assert ("truncate" in body) == (form == "tei")
    assert body.get("model") == (None if form == "tei" else "a-reranker")


@pytest.mark.parametrize("form", ["tei", "jina"])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("few", "2 scores for 3 texts"),
        ("more", "4 scores for 3 texts"),
        ("twice", "two scores with index"),
        ("range", "index 3 for 3 texts"),
        ("negative", "index -1 for 3 texts"),
        ("unindexed", "without an index"),
        ("nan", "not one usable score"),
        ("huge", "not one usable score"),
        ("words", "without a number"),
        ("numbers", "without an index"),
    ],
)
def test_a_wrong_answer_is_refused(stub: StubProvider, make: Make, form: str, answer: str, words: str) -> None:
    stub.behave(rules=[{"answer": answer}])
    error = fail(make(form))
    assert isinstance(error, InvalidScores)
    assert words in error.message


def test_a_page_in_place_of_an_answer_is_a_failure_for_now(stub: StubProvider, make: Make) -> None:
    stub.behave(rules=[{"answer": "html"}])
    error = fail(make())
    assert isinstance(error, TransientProviderError)
    assert "not JSON" in error.message


def test_a_request_that_is_too_large_is_halved(stub: StubProvider, make: Make) -> None:
    stub.behave(most_texts=8)
    texts = [f"text {number} about dead tuples" for number in range(30)]
    assert scores(make("tei"), texts).count == 30
    # 30 and 15 are refused; 7 and 8 pass.
    assert stub.counts()["requests"] == 1 + 2 + 4


def test_a_text_that_is_refused_alone_ends_the_call(stub: StubProvider, make: Make) -> None:
    stub.behave(rules=[{"match": "index", "status": 422, "times": 100}])
    assert isinstance(fail(make()), InputRejected)


def test_the_declared_limits_split_requests(stub: StubProvider, make: Make) -> None:
    found = scores(make(max_batch_items=2), [*TEXTS, *TEXTS])
    assert found.values() == pytest.approx([score_of(QUERY, text) for text in [*TEXTS, *TEXTS]])
    assert stub.counts()["requests"] == 3
    assert found.units == 2 * tokens_of(QUERY, TEXTS)


def test_an_endpoint_that_is_away_is_not_asked_again_at_once(stub: StubProvider, make: Make) -> None:
    stub.behave(rules=[{"status": 503, "headers": {"Retry-After": "20"}}])
    reranker = make()
    first, second = fail(reranker), fail(reranker)
    assert isinstance(first, TransientProviderError)
    assert isinstance(second, TransientProviderError)
    assert second.is_refusal
    assert "away" in second.message
    assert stub.counts()["requests"] == 1


def test_a_rate_limit_is_told_with_its_wait(stub: StubProvider, make: Make) -> None:
    stub.behave(rules=[{"status": 429, "headers": {"Retry-After": "20"}}])
    error = fail(make())
    assert isinstance(error, TransientProviderError)
    assert (error.throttled, error.retry_after) == (True, 20)


def test_the_key_goes_in_its_header_and_into_no_message(
    httpserver: HTTPServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDLINE_TEST_KEY", KEY)
    httpserver.expect_request("/v1/rerank", headers={"Authorization": f"Bearer {KEY}"}).respond_with_data(
        f"no credit for {KEY}", status=402
    )
    error = fail(make(base_url=httpserver.url_for("/v1"), api_key_env="EMBEDLINE_TEST_KEY"))
    assert isinstance(error, ProviderMisconfigured)
    assert "no credit" in str(error.detail)
    assert KEY not in f"{error.message} {error.detail} {error.hint}"


def test_a_redirect_is_refused(httpserver: HTTPServer, make: Make) -> None:
    moved = {"Location": httpserver.url_for("/elsewhere")}
    httpserver.expect_request("/v1/rerank").respond_with_data("", status=307, headers=moved)
    assert isinstance(fail(make(base_url=httpserver.url_for("/v1"))), ProviderMisconfigured)


def test_extra_body_wins_over_the_defaults_and_not_over_the_texts(stub: StubProvider, make: Make) -> None:
    scores(make("tei", options={"extra_body": {"truncate": False, "raw_scores": True, "texts": ["other"]}}))
    body = stub.last_rerank()
    assert (body["truncate"], body["raw_scores"], body["texts"]) == (False, True, TEXTS)


def test_a_form_without_an_address_of_its_own_needs_one(make: Make) -> None:
    with pytest.raises(ProviderError, match="needs a base_url"):
        make("tei", base_url=None)


def test_an_embedding_provider_is_no_reranker() -> None:
    with pytest.raises(InvalidParameter, match="has no rerankers"):
        create_reranker(ModelConfig("r", "openai", "m", task="rerank"))
