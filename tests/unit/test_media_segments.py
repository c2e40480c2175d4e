"""A host that cannot look into files says so, and goes on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from embedline.chunking import ChunkingSpec
from embedline.errors import ModelHostUnavailable
from embedline.model_host import segments
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.inference import LoadedModel
from embedline.model_host.protocol import Frame
from injected_host import embedder_of, injected_host


class Constant:
    """A model that gives each text the same vector."""

    slice_characters = 1024
    modalities = ("text",)
    max_tokens = None

    def forward(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.ones((len(texts), 2), dtype=np.float32)

    def free_memory(self) -> None:
        """Nothing is freed."""

    def tokenizer(self) -> None:
        """It has none."""


def _without_decoder(frame: Frame) -> bytes:
    raise ImportError("No module named 'PIL'")


def load(settings: HostSettings) -> LoadedModel:
    """Return a model beside which no decoder is installed."""
    segments.find_segments = _without_decoder
    return LoadedModel(settings, Constant())


def test_a_host_without_a_decoder_answers_and_goes_on() -> None:
    settings = HostSettings("/constant")
    with tempfile.TemporaryDirectory(prefix="el-") as root, injected_host(__file__, "load", settings, root):
        embedder = embedder_of(settings, root, os.getpid())
        with pytest.raises(ModelHostUnavailable, match="cannot look into files") as raised:
            embedder.submit_segments([b"file"], "image", ChunkingSpec("tiles")).result(30)
        assert "PIL" in str(raised.value.detail)
        assert embedder.submit(["words"], "document").result(30).count == 1
        embedder.close()
