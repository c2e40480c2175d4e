"""Images of remote models: one request for each, in the form of the provider, and a refused one fails alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from pictures import COLOURS, create_photos, picture
from support import scalar, settle

PATHS = {"vllm": "/embeddings", "cohere": "/embed", "voyage": "/multimodalembeddings"}
VECTORS = {colour: [float(place == number) for place in range(8)] for number, colour in enumerate(COLOURS.values())}
BY_FILE = {picture(colour): vector for colour, vector in VECTORS.items()}


def _image_of(form: str, body: dict[str, Any]) -> str | None:
    """Return the data URL of a request, None for one of texts."""
    match form, body:
        case "vllm", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}:
            return str(url)
        case "cohere", {"images": [url], "input_type": "image"}:
            return str(url)
        case "voyage", {"inputs": [{"content": [{"type": "image_base64", "image_base64": url}]}]}:
            return str(url)
    return None


def _answer(form: str, vectors: list[list[float]]) -> Response:
    answer: dict[str, Any] = {"data": [{"index": i, "embedding": v} for i, v in enumerate(vectors)]}
    if form == "cohere":
        answer = {"embeddings": {"float": vectors}, "meta": {"billed_units": {"images": 1}}}
    return Response(json.dumps(answer), content_type="application/json")


def _provider(form: str) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        body = json.loads(request.data)
        assert body["model"] == "joint"
        url = _image_of(form, body)
        if url is None:
            texts = body.get("input") or body.get("texts") or body.get("inputs")
            return _answer(form, [[0.0] * 7 + [1.0] for _ in texts])
        header, _, encoded = url.partition(",")
        assert header == "data:image/png;base64"
        vector = BY_FILE.get(base64.b64decode(encoded))
        if vector is None:
            return Response('{"message": "the image is damaged"}', status=400, content_type="application/json")
        return _answer(form, [vector])

    return answer


@pytest.fixture(params=PATHS)
def form(request: pytest.FixtureRequest, httpserver: HTTPServer, database: psycopg.Connection) -> str:
    """The form of an endpoint that is registered as model `joint`."""
    name = str(request.param)
    httpserver.expect_request(PATHS[name]).respond_with_handler(_provider(name))
    database.execute(
        "SELECT embedline.create_model('joint', 'openai', 'joint', base_url => %s, options => %s)",
        (httpserver.url_for("").rstrip("/"), json.dumps({"image_form": name})),
    )
    return name


def test_images_are_embedded_one_by_one_and_found_by_words_and_by_a_picture(
    database: psycopg.Connection, form: str, httpserver: HTTPServer
) -> None:
    assert scalar(database, "SELECT modalities FROM embedline.model WHERE name = 'joint'") == ["text", "image"]
    create_photos(database, "joint")
    assert scalar(database, "SELECT count(*) FROM photo_embedding") == len(COLOURS)
    database.execute("INSERT INTO photo VALUES (20, 'damaged', 'north', %s)", (picture("brown"),))
    database.execute("INSERT INTO photo VALUES (21, 'words', 'north', 'no picture')")
    settle(database)
    letters = dict(database.execute("SELECT (key ->> 'id')::integer, message FROM embedline.dead_letter").fetchall())
    assert "the image is damaged" in letters[20]
    assert "no JPEG, PNG, WebP or GIF" in letters[21]
    found = scalar(database, "SELECT chunk FROM embedline.search('photo', %s::bytea, k => 1)", (picture("blue"),))
    assert found == "blue"
    assert scalar(database, "SELECT count(*) FROM embedline.search('photo', 'words', k => 6)") == len(COLOURS)
    images = [request for request, _ in httpserver.log if _image_of(form, json.loads(request.data))]
    # One for each file that can be sent, and the query.
    assert len(images) == len(COLOURS) + 2
    with pytest.raises(psycopg.Error, match="only the host of a local model"):
        database.execute("SELECT embedline.alter_pipeline('photo', chunking => 'tiles')")
