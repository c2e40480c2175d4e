"""Files of S3: the request that is sent, signed with the keys of the environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_httpserver import HTTPServer

from embedline.core.file_addresses import listed_prefix
from embedline.errors import FileUnavailable, InputRejected
from embedline.providers.files import FileFetcher

LIMIT = 10.0
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "planted-secret", "AWS_REGION": "eu-central-1"}


@pytest.fixture
def fetcher(httpserver: HTTPServer) -> Iterator[FileFetcher]:
    made = FileFetcher({**KEYS, "AWS_ENDPOINT_URL": httpserver.url_for("/")})
    yield made
    made.close()


def test_an_object_is_asked_for_with_a_signature(fetcher: FileFetcher, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/photos/2026/a shoe.png").respond_with_data(b"bytes")
    assert fetcher.submit("s3://photos/2026/a%20shoe.png", ["s3://photos/2026/"]).result(LIMIT) == b"bytes"
    (request, _), *_ = httpserver.log
    signature = request.headers["Authorization"]
    assert signature.startswith("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/")
    assert "/eu-central-1/s3/aws4_request" in signature
    assert "planted-secret" not in str(request.headers)


def test_an_object_that_is_too_large_is_not_read_to_its_end(fetcher: FileFetcher, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/photos/film").respond_with_data(b"\0" * ((32 << 20) + 1))
    with pytest.raises(InputRejected, match="more than 33,554,432 bytes"):
        fetcher.submit("s3://photos/film", ["s3://photos/"]).result(LIMIT)


def test_a_server_that_is_away_says_so_without_the_query(fetcher: FileFetcher) -> None:
    with pytest.raises(FileUnavailable, match=r"http://127.0.0.1:1/a failed$") as raised:
        fetcher.submit("http://127.0.0.1:1/a?signature=planted", ["http://127.0.0.1:1/"]).result(LIMIT)
    assert "planted" not in str(raised.value.detail)


@pytest.mark.parametrize(
    "address",
    [
        "https://files.example.com.evil.org/photos/a", "https://files.example.com:8443/photos/a", "http://files.example.com/photos/a",
        "https://files.example.com/photos/../private/a", "https://files.example.com/photos/%2e%2e/private/a",
        "https://files.example.com/photos/%252e%252e/a", "https://files.example.com/photos\\..\\a", "https://user@files.example.com/photos/a",
        "https://files.example.com/photosa", "file:///photos/a", "https:///photos/a", "https://[::1/photos/a", "", "\n",
        "https://files.example.com/photos/a\n", "https://files.example.com/photos/a#b",
    ],
)  # fmt: skip
def test_an_address_beside_the_list_is_refused(address: str) -> None:
    with pytest.raises(InputRejected):
        listed_prefix(address, ["https://files.example.com/photos/"])


def test_the_host_s_case_means_nothing() -> None:
    prefix = "https://files.example.com/photos/"
    assert listed_prefix("https://FILES.example.com/photos/a.png?size=2", [prefix]) == prefix
