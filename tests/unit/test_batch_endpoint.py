"""What the client of batch endpoints makes of lines, and of what goes wrong on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedline.core.embedding import ModelConfig
from embedline.errors import TransientProviderError
from embedline.providers.batch_endpoint import BatchEndpoint

_KEY = "a-key-of-many-letters-1234567890"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchEndpoint]:
    """The client of an endpoint that is not there."""
    monkeypatch.setenv("EMBEDLINE_TEST_KEY", _KEY)
    config = ModelConfig(
        "small", "openai", "small", 8, base_url="http://127.0.0.1:1/v1", api_key_env="EMBEDLINE_TEST_KEY"
    )
    made = BatchEndpoint(config)
    yield made
    made.close()


@pytest.mark.parametrize("place", ["error", "response"])
@pytest.mark.parametrize(
    "words", [f"the key {_KEY} is not for this", "cut in \ud83d", "a \0 in it"], ids=["key", "half", "nul"]
)
def test_words_of_a_provider_are_told_without_keys_and_halves_of_characters(
    endpoint: BatchEndpoint, place: str, words: str
) -> None:
    error = {"message": words}
    answer = {"response": {"status_code": 400, "body": {"error": error}}} if place == "response" else {"error": error}
    found = endpoint.read(json.dumps({"custom_id": "1", **answer}).encode())
    assert found is not None
    assert _KEY not in found.detail
    assert "\0" not in found.detail
    found.detail.encode()


def test_a_folder_for_files_that_is_gone_is_told_as_a_failure_of_the_call(
    endpoint: BatchEndpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(TransientProviderError, match="a call of the batch endpoint failed") as failed:
        endpoint.download(["file_1"], 16).result(10)
    assert "FileNotFoundError" in (failed.value.detail or "")
