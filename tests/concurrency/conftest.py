"""A provider that takes its time, for the tests of what happens meanwhile."""

from __future__ import annotations

import json
import time

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from stub_fixtures import running_stub, stub, stub_database

__all__ = ["running_stub", "slow_endpoint", "stub", "stub_database"]


@pytest.fixture
def slow_endpoint(httpserver: HTTPServer) -> str:
    """URL of an embeddings endpoint that answers a probe at once and anything else after 2.5 s."""
    seen: list[int] = []

    def handle(request: Request) -> Response:
        texts = request.get_json()["input"]
        if seen:
            time.sleep(2.5)  # the provider's own slowness
        seen.append(len(texts))
        data = [{"object": "embedding", "index": n, "embedding": [1.0, 2.0, 3.0, 4.0]} for n in range(len(texts))]
        body = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        return Response(json.dumps(body), content_type="application/json")

    httpserver.expect_request("/v1/embeddings").respond_with_handler(handle)
    return str(httpserver.url_for("/v1"))
