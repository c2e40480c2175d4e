"""Models of a hub that does not answer: the model host says so soon, with the way out, instead of trying for minutes."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer

from embedline.core.embedding import ModelConfig
from embedline.embedders.local import LocalEmbedder
from embedline.errors import ModelHostUnavailable, ProviderError, ProviderMisconfigured
from support import MODELS

# What a test waits for at most. The host gives up after 8 s; a loaded machine takes some to start it.
LIMIT = 60.0
NAME = "example/all-MiniLM-L6-v2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Ask = Callable[[str], LocalEmbedder]


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's files; no proxy of the machine stands between the host and the test's hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path


@pytest.fixture
def ask(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Make an embedder of the hub's model NAME, on a server of the test's own, with HF_ENDPOINT as given."""
    opened: list[LocalEmbedder] = []
    with tempfile.TemporaryDirectory(prefix="el-") as root, subprocess.Popen(["sleep", "600"]) as server:

        def make(endpoint: str, **options: object) -> LocalEmbedder:
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            config = ModelConfig("m", "sentence-transformers", NAME, timeout_seconds=60.0, options=options)
            opened.append(LocalEmbedder(config, owner_pid=server.pid, runtime_root=root))
            return opened[-1]

        yield make
        for embedder in opened:
            embedder.close()
        server.kill()
        server.wait()


@contextlib.contextmanager
def silent_hub() -> Iterator[str]:
    """A hub that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def refusing_hub() -> Iterator[str]:
    """A port at which no process listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextlib.contextmanager
def unknown_hub() -> Iterator[str]:
    """A name that no resolver knows (RFC 6761)."""
    yield "http://hub.invalid"


@contextlib.contextmanager
def gateway_error() -> Iterator[str]:
    """A proxy that cannot reach the hub behind it."""
    with HTTPServer() as server:
        server.expect_request(_any_path()).respond_with_data("upstream", status=503)
        yield server.url_for("").rstrip("/")


def _any_path() -> object:
    import re

    return re.compile(".*")


def failure_of(embedder: LocalEmbedder) -> ProviderError:
    error = embedder.probe().exception(LIMIT)
    assert isinstance(error, ProviderError)
    return error


@pytest.mark.parametrize("hub", [silent_hub, refusing_hub, unknown_hub, gateway_error])
@pytest.mark.parametrize("options", [{}, {"backend": "onnx", "precision": "int8"}, {"backend": "torch"}])
def test_a_hub_that_cannot_be_reached_is_named_with_the_way_out(
    ask: Ask, hub: Callable[[], contextlib.AbstractContextManager[str]], options: dict[str, object]
) -> None:
    with hub() as endpoint:
        error = failure_of(ask(endpoint, **options))
        assert isinstance(error, ModelHostUnavailable), error
        assert error.message == f'cannot fetch model "{NAME}": the hub {endpoint} cannot be reached'
        assert error.hint is not None
        assert "embedline.create_model(..., '/srv/models/all-MiniLM-L6-v2')" in error.hint
        if hub is silent_hub:
            assert error.detail == "It gave no answer within 8 s." or "timed out" in str(error.detail).lower()


def test_a_hub_that_may_not_be_asked_is_named_with_the_way_out(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = failure_of(ask("http://hub.invalid"))
    assert isinstance(error, ProviderMisconfigured)
    assert "HF_HUB_OFFLINE" in error.message
    assert error.hint is not None
    assert "'/srv/models/all-MiniLM-L6-v2'" in error.hint


@pytest.mark.parametrize("hub", [silent_hub, refusing_hub])
@pytest.mark.parametrize(
    ("model", "options", "dimensions"),
    [("static-256", {}, 256), ("all-MiniLM-L6-v2", {"backend": "onnx", "precision": "int8"}, 384)],
)
def test_a_model_that_was_fetched_before_needs_no_hub(
    ask: Ask,
    hub_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub: Callable[[], contextlib.AbstractContextManager[str]],
    model: str,
    options: dict[str, object],
    dimensions: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(hub_home / "cache"))
    cached = hub_home / "hub" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(MODELS / model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    with hub() as endpoint:
        assert ask(endpoint, **options).probe().result(LIMIT).dimensions == dimensions


def test_a_model_that_the_hub_does_not_have_is_told_apart_from_a_silent_hub(ask: Ask) -> None:
    with HTTPServer() as server:
        server.expect_request(_any_path()).respond_with_data(
            "no", status=404, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        )
        error = failure_of(ask(server.url_for("").rstrip("/")))
    assert isinstance(error, ProviderMisconfigured)
    assert f'cannot load model "{NAME}"' in error.message


@pytest.mark.torch
@pytest.mark.parametrize("place", ["modules.json", "config.json"])
def test_code_among_a_models_files_is_not_run(hub_home: Path, place: str) -> None:
    """A model may name classes of its own; the host loads those of the libraries alone."""
    with tempfile.TemporaryDirectory(prefix="el-") as root, subprocess.Popen(["sleep", "600"]) as server:
        marker, folder = hub_home / "was_run", hub_home / "model"
        folder.mkdir()
        (folder / "evil.py").write_text(
            f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nfrom torch.nn import Identity as Evil\n"
        )
        module = {"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}
        named = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        (folder / place).write_text(json.dumps([module] if place == "modules.json" else named))
        config = ModelConfig("m", "sentence-transformers", str(folder), timeout_seconds=60.0)
        embedder = LocalEmbedder(config, owner_pid=server.pid, runtime_root=root)
        try:
            error = failure_of(embedder)
        finally:
            embedder.close()
            server.kill()
            server.wait()
        assert "trust_remote_code" in f"{error.message} {error.detail}"
        assert not marker.exists()
