"""Models that take images as well: a text is always a text, whatever it looks like."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clip_model import DIMENSIONS, make_clip_model
from embedline.core.embedding import ModelConfig
from embedline.embedders.local import LocalEmbedder

pytestmark = pytest.mark.torch
LIMIT = 120.0
# One pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL", reason="needs Pillow")
    return make_clip_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def embedder(model: Path) -> Iterator[LocalEmbedder]:
    config = ModelConfig("clip", "sentence-transformers", str(model), timeout_seconds=LIMIT)
    with (
        tempfile.TemporaryDirectory(prefix="el-") as root,
        subprocess.Popen(["sleep", "600"]) as owner,
    ):
        started = LocalEmbedder(config, owner_pid=owner.pid, runtime_root=root)
        yield started
        started.close()
        owner.kill()


class Listener:
    """Answers every connection with an image, and counts them."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    started = Listener()
    yield started
    started.close()


def embed(embedder: LocalEmbedder, *texts: str) -> np.ndarray:
    block = embedder.submit(texts, "document").result(LIMIT)
    return np.frombuffer(block.data, dtype="<f4").reshape(block.count, DIMENSIONS)


def test_an_address_is_embedded_and_not_fetched(embedder: LocalEmbedder, listener: Listener) -> None:
    paths = ("x.png", "x.jpg?size=1", "x.webp", "film.mp4", "sound.mp3", "sound.wav")
    texts = [f"{listener.address}/{path}" for path in paths]
    rows = embed(embedder, *texts, f"{listener.address}/x.png in a sentence")
    assert np.isfinite(rows).all()
    assert listener.connections == 0
    for text, row in zip(texts, rows, strict=False):
        # The same text in company of others, and alone.
        np.testing.assert_allclose(embed(embedder, text)[0], row, atol=1e-5)
    assert listener.connections == 0
    assert len(np.unique(rows.round(5), axis=0)) == len(rows), "each text has a vector of its own"


def test_a_path_and_the_bytes_of_an_image_are_words(embedder: LocalEmbedder, tmp_path: Path) -> None:
    import base64

    image = tmp_path / "x.png"
    image.write_bytes(base64.b64decode(PIXEL))
    texts = [str(image), f"data:image/png;base64,{PIXEL}", "data:image/png;base64,no image at all"]
    before = embed(embedder, *texts)
    image.unlink()
    # Whether there is such a file makes no difference.
    np.testing.assert_allclose(embed(embedder, *texts), before, atol=1e-5)


def test_common_texts_have_the_vectors_of_the_library(embedder: LocalEmbedder, model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(model), device="cpu")
    assert library.supports("image"), "else the other tests prove nothing"
    texts = ["a photo of a cat", "a longer photo of a dog that runs after it", "a"]
    own = library.encode(texts, prompt="", show_progress_bar=False)
    np.testing.assert_allclose(embed(embedder, *texts), own, atol=1e-5)
