"""A host that cannot look into files says so, and goes on; one that listens to a long recording is waited for."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from embedline.chunking import ChunkingSpec
from embedline.core.embedding import ModelConfig
from embedline.embedders.local import LocalEmbedder
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


def _without_decoder(frame: Frame, on_progress: Callable[[], None]) -> bytes:
    raise ImportError("No module named 'PIL'")


def load(settings: HostSettings) -> LoadedModel:
    """Return a model beside which no decoder is installed."""
    segments.find_segments = _without_decoder
    return LoadedModel(settings, Constant())


def _in_steps(frame: Frame, on_progress: Callable[[], None]) -> bytes:
    for _ in range(60):
        time.sleep(0.1)
        on_progress()
    return b"[[[0, 6000]]]"


def load_patient(settings: HostSettings) -> LoadedModel:
    """Return a model beside which a recording is heard for longer than its clients wait for a silent host."""
    segments.find_segments = _in_steps
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


def test_a_host_that_listens_to_a_long_recording_is_waited_for() -> None:
    settings = HostSettings("/constant")
    config = ModelConfig("injected", "sentence-transformers", settings.model, timeout_seconds=4.0)
    with tempfile.TemporaryDirectory(prefix="el-") as root, injected_host(__file__, "load_patient", settings, root):
        embedder = LocalEmbedder(config, owner_pid=os.getpid(), runtime_root=root, settings=settings)
        found = embedder.submit_segments([b"file"], "audio", ChunkingSpec("silence")).result(30)
        assert found == [[(0, 6000)]]
        embedder.close()
