"""Addresses at which models are asked: those on the list, and no link-local one however it is written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from embedline.core import endpoints
from embedline.core.embedding import ModelConfig
from embedline.core.endpoints import LOOPBACK, allowing_statement, is_allowed, is_forbidden_address
from embedline.errors import ProviderError, ProviderMisconfigured, TransientProviderError
from embedline.providers.openai_compatible import OpenAIEmbedder

LIMIT = 10.0


@pytest.mark.parametrize(
    ("url", "entry", "is_on_list"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com:443", True),
        ("https://API.OpenAI.com:443/v1", "https://api.openai.com:443", True),
        ("http://api.openai.com/v1", "https://api.openai.com:443", False),
        ("https://api.openai.com:444/v1", "https://api.openai.com:443", False),
        ("https://api.openai.com.evil.example/v1", "https://api.openai.com:443", False),
        ("https://evil.example/?https://api.openai.com", "https://api.openai.com:443", False),
        ("https://api.openai.com@evil.example/v1", "https://api.openai.com:443", False),
        ("https://one.azure.example/v1", "https://*.azure.example:443", True),
        ("https://azure.example/v1", "https://*.azure.example:443", False),
        ("https://notazure.example/v1", "https://*.azure.example:443", False),
        ("http://[::1]:8080/v1", "http://::1:*", True),
        ("http://127.0.0.1:8080", "http://127.0.0.1:*", True),
    ],
)
def test_scheme_host_and_port_are_those_of_an_entry(url: str, entry: str, is_on_list: bool) -> None:
    assert is_allowed(url, [entry]) is is_on_list


def test_the_statement_of_the_hint_names_the_address_and_cannot_be_left() -> None:
    assert allowing_statement("http://gpu.internal:8000/v1").endswith("VALUES ('http', 'gpu.internal', 8000);")
    assert "'x'');--'" in allowing_statement("http://x');--/v1")


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0", "febf::1", "::ffff:169.254.169.254"),
        *("64:ff9b::a9fe:a9fe", "fd00:ec2::254", "100.100.100.200", "168.63.129.16"),
    ],
)
def test_link_local_addresses_and_those_of_metadata_are_forbidden(address: str) -> None:
    assert is_forbidden_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", "192.168.1.1", "8.8.8.8", "gpu.internal"])
def test_other_addresses_are_for_the_list(address: str) -> None:
    assert not is_forbidden_address(address)


Fail = Callable[..., ProviderError]


@pytest.fixture
def fail() -> Iterator[Fail]:
    """Embed a text at an address and return the error."""
    opened: list[OpenAIEmbedder] = []

    def _fail(url: str, allowed: tuple[str, ...] = LOOPBACK, **changes: Any) -> ProviderError:
        config = ModelConfig(
            "m", "openai", "m", base_url=url, allowed_endpoints=allowed, timeout_seconds=5.0, **changes
        )
        opened.append(OpenAIEmbedder(config))
        error = opened[-1].submit(["a text"], "document").exception(LIMIT)
        assert isinstance(error, ProviderError), error
        return error

    yield _fail
    for embedder in opened:
        embedder.close()


def test_an_address_outside_the_list_is_not_asked(httpserver: HTTPServer, fail: Fail) -> None:
    error = fail(httpserver.url_for("/v1"), ("http://127.0.0.1:1",))
    assert isinstance(error, ProviderMisconfigured)
    assert error.is_refusal
    assert error.hint == (
        "As a superuser: INSERT INTO embedline.allowed_endpoint (scheme, host, port)"
        f" VALUES ('http', '{httpserver.host}', {httpserver.port});"
    )
    assert httpserver.log == []


def test_a_link_local_address_on_the_list_is_not_asked(fail: Fail) -> None:
    error = fail("http://169.254.169.254/latest", ("http://169.254.169.254:*",))
    assert isinstance(error, ProviderMisconfigured)
    assert error.message == "169.254.169.254 is not asked, because it is at 169.254.169.254"


@pytest.mark.parametrize(
    ("host", "proxied"), [("localhost", False), ("2130706433", False), ("127.1", False), ("localhost", True)]
)
def test_a_name_that_leads_to_a_forbidden_address_is_sent_nothing(
    httpserver: HTTPServer, fail: Fail, monkeypatch: pytest.MonkeyPatch, host: str, proxied: bool
) -> None:
    # No machine of a test has an address of metadata, so this one's is declared to be one.
    monkeypatch.setattr(endpoints, "_METADATA", frozenset(("127.0.0.1", "::1")))
    url = f"http://{host}:{httpserver.port}/v1"
    if proxied:
        monkeypatch.setenv("HTTP_PROXY", f"http://localhost:{httpserver.port}")
        url = "http://elsewhere.example/v1"
    error = fail(url, (f"http://{host}:*", "http://elsewhere.example:*"))
    assert isinstance(error, ProviderMisconfigured), error
    assert "because it is at 127.0.0.1" in error.message or "because it is at ::1" in error.message
    assert httpserver.log == []


def test_an_endless_answer_ends_at_a_bound(httpserver: HTTPServer, fail: Fail) -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(2000):
            sent.append(1)
            yield b" " * (1 << 16)

    httpserver.expect_request("/v1/embeddings").respond_with_handler(lambda _: Response(endless()))
    error = fail(httpserver.url_for("/v1"), dimensions=8)
    assert isinstance(error, TransientProviderError)
    assert "bytes" in str(error.detail)
    # 128 MB were there to be read.
    assert len(sent) < 200


def test_a_compressed_answer_is_not_unpacked(httpserver: HTTPServer, fail: Fail) -> None:
    bomb = gzip.compress(b"[" * (1 << 24))
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    httpserver.expect_request("/v1/embeddings").respond_with_data(bomb, headers=headers)
    error = fail(httpserver.url_for("/v1"))
    assert isinstance(error, TransientProviderError)
    assert "compressed (gzip)" in str(error.detail)


def test_an_endless_error_ends_at_a_bound(httpserver: HTTPServer, fail: Fail) -> None:
    httpserver.expect_request("/v1/embeddings").respond_with_data(json.dumps({"error": "x" * (1 << 22)}), status=400)
    error = fail(httpserver.url_for("/v1"))
    assert isinstance(error, TransientProviderError)
    assert "bytes" in str(error.detail)
