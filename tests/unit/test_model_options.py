"""Options of models: which are refused, with which words, and that the fingerprints of models without them stay."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from dialects import Dialect, serving
from embedline.core.embedding import ModelConfig
from embedline.errors import DimensionMismatch, InvalidParameter
from embedline.model_host.launcher import settings_of
from embedline.providers.openai_compatible import OpenAIEmbedder
from embedline.providers.options import OPENAI_OPTIONS, check_options, request_body

LIMIT = 10.0


def refusal(options: dict[str, Any], known: Any = OPENAI_OPTIONS) -> InvalidParameter:
    with pytest.raises(InvalidParameter) as refused:
        check_options("m", options, known)
    return refused.value


@pytest.mark.parametrize(
    ("given", "proposed"),
    [
        ("max_token", '"max_tokens"'),
        ("Max_Tokens", '"max_tokens"'),
        ("extrabody", '"extra_body"'),
        ("encodingFormat", '"encoding_format"'),
        ("documents_body", '"document_body"'),
        ("dimension", "the parameter dimensions"),
        ("timeout", "the parameter timeout_seconds"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(given: str, proposed: str) -> None:
    error = refusal({given: 1})
    assert str(error) == f'model "m" has an unknown option "{given}"'
    assert f"Did you mean {proposed}" in str(error.hint)
    assert "The options are max_tokens, " in str(error.hint)


def test_an_unknown_option_that_is_near_to_nothing_has_the_list_alone() -> None:
    assert str(refusal({"xyzzy": 1}).hint).startswith("The options are ")
    assert refusal({"x": 1}, []).hint == "This provider has no options."
    assert str(refusal({"colour": 1}, ["color"]).hint).startswith('Did you mean "color"? The options are color.')


def test_options_of_local_models_are_refused_in_the_same_words() -> None:
    with pytest.raises(InvalidParameter, match='unknown option "precison"') as refused:
        settings_of(ModelConfig("m", "sentence-transformers", "x/y", options={"precison": "int8"}))
    assert 'Did you mean "precision"?' in str(refused.value.hint)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": "512"}, {"tokenizer": ""}, {"send_dimensions": "yes"},
        {"key_header": "api key"}, {"key_header": "a\nb"}, {"encoding_format": "int8"}, {"extra_body": "x"},
        {"query_body": []}, {"document_body": 1},
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    (name,) = options
    assert str(refusal(options)).startswith(f'option "{name}" of model "m" must be ')


def test_null_stands_for_an_option_that_is_not_given() -> None:
    check_options("m", dict.fromkeys(OPENAI_OPTIONS), OPENAI_OPTIONS)


@pytest.mark.parametrize("option", ["extra_body", "document_body", "query_body"])
@pytest.mark.parametrize("member", ["input", "model", "Input", "dimensions", "encoding_format"])
def test_a_body_overrides_nothing_that_has_its_own_place(option: str, member: str) -> None:
    error = refusal({option: {member: "x"}})
    assert f'must not set "{member}"' in str(error)
    assert error.hint


@pytest.mark.parametrize(
    "body", [{"api_key": "sk-1"}, {"auth": {"Authorization": "x"}}, {"a": [{"password": "x"}]}, {"token": "x"}]
)
def test_a_body_holds_no_secret(body: dict[str, Any]) -> None:
    error = refusal({"extra_body": body})
    assert "must not hold a secret" in str(error)
    assert "sk-1" not in f"{error} {error.detail} {error.hint}"
    check_options("m", {"extra_body": {"truncate_prompt_tokens": 8, "user": "u"}}, OPENAI_OPTIONS)


def test_bodies_are_merged_and_the_kinds_own_members_win() -> None:
    options = {"extra_body": {"a": 1, "b": 1}, "document_body": {"b": 2}, "query_body": {"b": 3, "c": None}}
    assert request_body(options, "document") == {"a": 1, "b": 2}
    assert request_body(options, "query") == {"a": 1, "b": 3, "c": None}
    assert request_body({"extra_body": None}, "query") == {}


def fingerprint(endpoint: Dialect, options: dict[str, Any]) -> str:
    embedder = OpenAIEmbedder(ModelConfig("m", "openai", "stub", base_url=endpoint.url, options=options))
    try:
        return embedder.probe().result(LIMIT).fingerprint
    finally:
        embedder.close()


def test_bodies_are_part_of_the_fingerprint_and_nothing_else_changes_it() -> None:
    with serving(Dialect()) as endpoint:
        identity = ["openai", endpoint.url.removeprefix("http://"), "stub", 8]
        before = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        for options in ({}, {"extra_body": {}}, {"encoding_format": "float", "max_tokens": 5}):
            assert fingerprint(endpoint, options) == before
        bodies = [
            {name: {"input_type": value}} for name in ("extra_body", "document_body", "query_body") for value in "ab"
        ]
        found = [fingerprint(endpoint, options) for options in bodies]
        assert len({before, *found}) == 7
        assert fingerprint(endpoint, {"extra_body": {"b": 1, "a": 2}}) == fingerprint(
            endpoint, {"extra_body": {"a": 2, "b": 1}}
        )


def test_the_probe_tells_documents_and_queries_of_different_widths() -> None:
    import numpy as np

    def embed(_: str, body: dict[str, Any]) -> Any:
        return np.ones(body.get("width", 4), np.float32)

    with serving(Dialect(embed=embed)) as endpoint:
        with pytest.raises(DimensionMismatch, match="documents and queries"):
            fingerprint(endpoint, {"query_body": {"width": 8}})
        assert [body.get("width") for body in endpoint.requests] == [None, 8]
