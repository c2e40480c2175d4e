"""Providers behind https with an authority of their own: a real TLS server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from certificates import Authority, make_authority
from embedline.core.embedding import ModelConfig
from embedline.errors import ProviderError, ProviderMisconfigured
from embedline.providers.openai_compatible import OpenAIEmbedder

LIMIT = 10.0
VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")


@pytest.fixture(scope="module")
def authority() -> Iterator[Authority]:
    with tempfile.TemporaryDirectory(prefix="embedline-") as folder:
        yield make_authority(Path(folder))


@pytest.fixture(scope="module")
def https(authority: Authority) -> Iterator[HTTPServer]:
    def answer(request: Request) -> Response:
        data = [{"index": i, "embedding": [1.0, 2.0]} for i, _ in enumerate(request.get_json()["input"])]
        return Response(json.dumps({"data": data}), content_type="application/json")

    with HTTPServer(threaded=True, ssl_context=authority.server_context()) as server:
        server.expect_request("/v1/embeddings").respond_with_handler(answer)
        yield server


Make = Callable[..., OpenAIEmbedder]


@pytest.fixture
def make(https: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    opened: list[OpenAIEmbedder] = []

    def embedder(host: str = "127.0.0.1", **options: Any) -> OpenAIEmbedder:
        url = f"https://{host}:{https.port}/v1"
        opened.append(OpenAIEmbedder(ModelConfig("private", "openai", "m", base_url=url, options=options)))
        return opened[-1]

    yield embedder
    for each in opened:
        each.close()


def embeds(embedder: OpenAIEmbedder) -> bool:
    return embedder.submit(["a"], "document").result(LIMIT).dimensions == 2


def fail(embedder: OpenAIEmbedder) -> ProviderError:
    error = embedder.submit(["a"], "document").exception(LIMIT)
    assert isinstance(error, ProviderError)
    return error


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_option_names_the_authority(make: Make, authority: Authority, host: str) -> None:
    assert embeds(make(host, ca_file=str(authority.certificate)))


def test_the_option_is_no_part_of_the_fingerprint(
    make: Make, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_option = make(ca_file=str(authority.certificate)).probe().result(LIMIT)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    assert make().probe().result(LIMIT) == with_option


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_variable_names_the_file(
    make: Make, authority: Authority, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(authority.certificate))
    assert embeds(make())


@pytest.mark.parametrize("variable", ["SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"])
def test_a_variable_names_the_directory(
    make: Make, authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    hashed = subprocess.run(
        ["openssl", "x509", "-hash", "-noout", "-in", authority.certificate], capture_output=True, text=True, check=True
    )
    (tmp_path / f"{hashed.stdout.strip()}.0").symlink_to(authority.certificate)
    monkeypatch.setenv(variable, str(tmp_path))
    assert embeds(make())


def test_the_option_comes_before_the_variables(
    make: Make, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent.pem")
    assert embeds(make(ca_file=str(authority.certificate)))


def test_an_authority_that_was_not_named_is_refused_with_the_way_out(make: Make) -> None:
    error = fail(make())
    assert type(error) is ProviderMisconfigured
    assert "is not trusted" in error.message
    assert error.hint is not None
    assert "ca_file" in error.hint
    assert "SSL_CERT_FILE" in error.hint


def test_another_authority_is_refused_until_the_file_is_the_right_one(
    make: Make, authority: Authority, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    file = tmp_path / "ca.pem"
    file.write_bytes(make_authority(other).certificate.read_bytes())
    embedder = make(ca_file=str(file))
    assert type(fail(embedder)) is ProviderMisconfigured
    file.write_bytes(authority.certificate.read_bytes())
    assert embeds(embedder), "without a new session"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("", "holds no certificate"),
        ("a secret of another file", "holds no certificate"),
        ("-----BEGIN CERTIFICATE-----\na secret of another file\n-----END CERTIFICATE-----\n", "holds no certificate"),
    ],
)
@pytest.mark.parametrize("named_by", ["ca_file", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_file_that_cannot_be_used_is_named_and_not_shown(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, words: str, named_by: str
) -> None:
    file = tmp_path / "authority.pem"
    if content is not None:
        file.write_text(content)
    options = {"ca_file": str(file)} if named_by == "ca_file" else {}
    if not options:
        monkeypatch.setenv(named_by, str(file))
    error = fail(make(**options))
    assert type(error) is ProviderMisconfigured
    assert named_by in error.message
    assert words in error.message
    assert str(file) in str(error.detail)
    assert named_by in str(error.hint)
    assert "secret" not in f"{error.message} {error.detail} {error.hint}"


def test_what_is_no_file_is_not_waited_for(make: Make, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "is no file" in fail(make(ca_file=str(pipe))).message
    assert "is no file" in fail(make(ca_file=str(tmp_path))).message


def test_a_directory_that_is_none_is_named(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    error = fail(make())
    assert "SSL_CERT_DIR" in error.message
    assert "names no directory" in error.message
