"""The page on providers of your own: its provider runs as it stands there; and addresses reach the endpoints they name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from embedline.core.embedding import Embedder, ModelConfig
from embedline.embedders import create_embedder, known_options
from embedline.errors import InputRejected, InvalidParameter, InvalidVectors, TransientProviderError
from embedline.providers.options import check_options

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "add-a-provider.md"


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, httpserver: HTTPServer) -> Iterator[Embedder]:
    """The provider of the page, installed as a package would be."""
    text = PAGE.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    announcement = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert code and announcement
    name, value = re.search(r'(\w+) = "(.*?)"', announcement.group(1)).groups()
    (tmp_path / "house_embedder.py").write_text(code.group(1), encoding="utf-8")
    info = tmp_path / "house_embedder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house-embedder\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[embedline.embedders]\n{name} = {value}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    embedder = create_embedder(
        ModelConfig("m", "house", "m", base_url=httpserver.url_for("/embed"), document_prefix="d ")
    )
    yield embedder
    embedder.close()
    sys.modules.pop("house_embedder", None)


def test_the_provider_of_the_page_embeds(house: Embedder, httpserver: HTTPServer) -> None:
    seen: list[str] = []

    def answer(request: Request) -> Response:
        texts = request.get_json()["texts"]
        seen.extend(texts)
        return Response(json.dumps({"vectors": [[1, 2, 3] for _ in texts]}), content_type="application/json")

    httpserver.expect_request("/embed").respond_with_handler(answer)
    info = house.probe().result(10)
    assert (info.dimensions, info.max_tokens) == (3, 512)
    block = house.submit(["a", "b"], "document").result(10)
    assert (block.count, block.dimensions, len(block.data)) == (2, 3, 24)
    assert seen == ["probe", "d a", "d b"]


def test_options_that_a_package_does_not_name_are_refused(house: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_options("house") == ()
    monkeypatch.setattr(type(house), "options", ("region",))
    check_options("m", {"region": "eu"}, known_options("house") or ())
    with pytest.raises(InvalidParameter, match='unknown option "regoin"') as refused:
        check_options("m", {"regoin": "eu"}, known_options("house") or ())
    assert 'Did you mean "region"?' in str(refused.value.hint)
    monkeypatch.delattr(type(house), "options")
    assert known_options("house") is None


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (Response("no", status=400), InputRejected),
        (Response("no", status=503), TransientProviderError),
        (Response("no JSON"), TransientProviderError),
        (Response('{"vectors": [[1, 2]]}'), InvalidVectors),
    ],
)
def test_the_provider_of_the_page_says_what_went_wrong(
    house: Embedder, httpserver: HTTPServer, response: Response, error: type[Exception]
) -> None:
    httpserver.expect_request("/embed").respond_with_response(response)
    assert isinstance(house.submit(["a", "b"], "document").exception(10), error)


def test_a_provider_that_nobody_announces_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="unknown provider") as caught:
        create_embedder(ModelConfig("m", "elsewhere", "m"))
    assert "embedline.embedders" in str(caught.value.hint)


def _vectors(request: Request) -> Response:
    count = len(request.get_json()["input"])
    data = [{"index": i, "embedding": [1, 2]} for i in range(count)]
    return Response(json.dumps({"data": data}), content_type="application/json")


def test_an_azure_address_keeps_its_version_and_its_own_header(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret")
    seen: list[Request] = []

    def answer(request: Request) -> Response:
        seen.append(request)
        return _vectors(request)

    path = "/openai/deployments/DEPLOYMENT"
    httpserver.expect_request(f"{path}/embeddings").respond_with_handler(answer)
    config = ModelConfig(
        "azure",
        "openai",
        "text-embedding-3-small",
        base_url=httpserver.url_for(path) + "?api-version=2024-10-21",
        api_key_env="AZURE_OPENAI_API_KEY",
        dimensions=2,
        options={"key_header": "api-key"},
    )
    embedder = create_embedder(config)
    try:
        assert embedder.submit(["a"], "document").result(10).count == 1
    finally:
        embedder.close()
    assert seen[0].args["api-version"] == "2024-10-21"
    assert seen[0].headers["api-key"] == "secret"
    assert "Authorization" not in seen[0].headers
    assert seen[0].get_json()["dimensions"] == 2, "a model that shortens its vectors is told to"
