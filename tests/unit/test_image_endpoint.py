"""What the client of image endpoints keeps of a request in which one image fails."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from embedline.core.embedding import ModelConfig
from embedline.core.media import MediaPart
from embedline.errors import TransientProviderError
from embedline.providers.image_endpoint import ImageEndpoint

_IMAGES = [MediaPart("image", b"\x89PNG" + bytes([number])) for number in range(6)]


@pytest.fixture
def endpoint(httpserver: HTTPServer) -> Iterator[ImageEndpoint]:
    """The client of an endpoint in Cohere's form."""
    url = httpserver.url_for("").rstrip("/")
    made = ImageEndpoint(
        ModelConfig("joint", "openai", "joint", base_url=url, concurrency=1, options={"image_form": "cohere"})
    )
    yield made
    made.close()


def _answer(tokens: float = 1) -> Response:
    answer = {"embeddings": {"float": [[1.0, 0.0]]}, "meta": {"billed_units": {"image_tokens": tokens}}}
    return Response(json.dumps(answer), content_type="application/json")


def test_images_that_were_answered_are_not_sent_again(endpoint: ImageEndpoint, httpserver: HTTPServer) -> None:
    asked: Counter[str] = Counter()

    def answer(request: Request) -> Response:
        (url,) = json.loads(request.data)["images"]
        asked[url] += 1
        # The fourth image meets a moment's trouble.
        return Response("{}", status=500) if len(asked) == 4 and asked[url] == 1 else _answer()

    httpserver.expect_request("/embed").respond_with_handler(answer)
    with pytest.raises(TransientProviderError):
        endpoint.submit(_IMAGES, "document").result(10)
    assert sum(asked.values()) == 4, "images were sent after the failure"
    assert endpoint.submit(_IMAGES, "document").result(10).count == len(_IMAGES)
    assert sorted(asked.values()) == [1, 1, 1, 1, 1, 2]


def test_a_count_of_tokens_that_is_no_number_is_ignored(endpoint: ImageEndpoint, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/embed").respond_with_response(_answer(float("inf")))
    block = endpoint.submit(_IMAGES[:1], "document").result(10)
    assert (block.count, block.tokens) == (1, None)
