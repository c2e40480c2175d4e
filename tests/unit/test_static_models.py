"""Static models in numpy: chosen by their files, and the same vectors and identity as in torch."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedline.core.embedding import ModelConfig
from embedline.embedders.local import LocalEmbedder
from embedline.model_host import launcher
from embedline.model_host.choice import choose_backend
from embedline.model_host.launcher import HostSettings, settings_of
from embedline.model_host.static_backend import StaticBackend
from embedline.model_host.weights import weights_identity
from support import MODELS

LIMIT = 120.0
STATIC, MINILM, PUBLISHED = (str(MODELS / name) for name in ("static-256", "minilm", "all-MiniLM-L6-v2"))
TEXTS = [
    "",
    " ",
    "  leading and trailing \n",
    "\0 \n",
    "a",
    "Ünïcödé 日本語 🙂",
    "word " * 3000,
    "VACUUM removes dead rows.",
]


def settings(model: str, **options: Any) -> HostSettings:
    return settings_of(ModelConfig("m", "sentence-transformers", model, options=options))


def model2vec(folder: Path) -> str:
    """A model as model2vec saves it: float16, tokens that share rows, weights of tokens, normalised."""
    table = load_file(Path(STATIC) / "model.safetensors")["embedding.weight"]
    shutil.copytree(STATIC, folder)
    mapping = np.arange(len(table), dtype=np.int64) // 2
    weights = np.linspace(0.5, 1.5, len(table), dtype=np.float32)
    tensors = {"embeddings": table[: len(table) // 2].astype(np.float16), "mapping": mapping, "weights": weights}
    save_file(tensors, folder / "model.safetensors")
    modules = [
        {"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Normalize").mkdir()
    return str(folder)


# The choice


def test_what_runs_a_model_follows_from_its_files_and_options(tmp_path: Path) -> None:
    assert settings(STATIC).backend == settings(STATIC, backend="auto").backend == "static"
    assert settings(STATIC, device="cpu").backend == "static"
    assert settings(STATIC, backend="torch").backend == "torch"
    assert settings(STATIC, device="cuda").backend == settings(STATIC, precision="float16").backend == "torch"
    assert settings(model2vec(tmp_path / "m2v")).backend == "static"
    assert settings(MINILM).backend == "onnx"
    assert settings(PUBLISHED).backend == "torch"
    assert settings(PUBLISHED, backend="onnx", precision="int8").backend == "onnx"
    assert settings("org/name").backend == "auto"
    assert settings("org/name", precision="float16").backend == "torch"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "modules.json").unlink(),
        lambda folder: (folder / "modules.json").write_text("{"),
        lambda folder: (folder / "modules.json").write_text('[{"type": "StaticEmbedding"}, {"type": "Dense"}]'),
        lambda folder: (folder / "modules.json").write_text("[3]"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 20),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        # Of a type that numpy has not.
        lambda folder: _rewrite_type(folder / "model.safetensors", "BF16"),
    ],
)
def test_what_numpy_cannot_run_is_left_to_torch(damage: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(STATIC, folder)
    assert choose_backend(str(folder)) == "static"
    damage(folder)
    assert choose_backend(str(folder)) == "torch"


def _rewrite_type(path: Path, kind: str) -> None:
    header = json.dumps({"embedding.weight": {"dtype": kind, "shape": [1, 2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


# The same model


def test_a_text_without_tokens_is_all_zeros() -> None:
    rows = StaticBackend(STATIC).forward(["", "word"])
    assert not rows[0].any()
    assert rows[1].any()


@pytest.mark.torch
@pytest.mark.parametrize("make", [lambda _: STATIC, lambda folder: model2vec(folder / "m2v")])
def test_vectors_are_those_of_sentence_transformers(make: Callable[[Path], str], tmp_path: Path) -> None:
    from embedline.model_host.torch_backend import load_torch

    folder = make(tmp_path)
    ours, theirs = StaticBackend(folder), load_torch(HostSettings(folder))
    np.testing.assert_allclose(ours.forward(TEXTS), theirs.forward(TEXTS), rtol=1e-3, atol=1e-3)
    wanted, got = theirs.forward(TEXTS[4:]), ours.forward(TEXTS[4:])
    cosines = np.einsum("ij,ij->i", wanted, got) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(got, axis=1)
    assert cosines.min() > 1 - 1e-5
    assert ours.max_tokens == theirs.max_tokens is None


def test_the_set_up_makes_the_model_that_earlier_versions_made() -> None:
    # What sentence-transformers 6 saved had this identity; pipelines hold vectors of it.
    assert weights_identity(HostSettings(STATIC)) == "7b5be4e9c10e87c38af9b58528391246b62ef7243569d48c1c54fac367ad08a0"
    assert (
        weights_identity(HostSettings(MINILM))
        == weights_identity(HostSettings(PUBLISHED))
        == "9066a0621f38eabb06b2a319c8161117193fbcbfc9fa704c6ebf197f55b22b88"
    )


# In the host


@pytest.fixture
def start() -> Iterator[Callable[..., LocalEmbedder]]:
    opened: list[LocalEmbedder] = []
    with tempfile.TemporaryDirectory(prefix="el-") as root, subprocess.Popen(["sleep", "600"]) as server:

        def make(model: str, **options: Any) -> LocalEmbedder:
            config = ModelConfig("m", "sentence-transformers", model, timeout_seconds=60.0, options=options)
            opened.append(LocalEmbedder(config, owner_pid=server.pid, runtime_root=root))
            return opened[-1]

        yield make
        for embedder in opened:
            embedder.close()
        server.kill()
        server.wait()


def libraries(embedder: LocalEmbedder) -> set[str]:
    """The heavy libraries that an embedder's host has loaded."""
    connection = launcher.connect(embedder._place)
    assert connection is not None
    with connection:
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    mapped = Path(f"/proc/{struct.unpack('3i', peer)[0]}/maps").read_text()
    return {name for name in ("torch", "onnxruntime", "tokenizers") if f"/{name}/" in mapped}


def test_the_models_of_the_set_up_run_without_torch(start: Callable[..., LocalEmbedder]) -> None:
    static, minilm = start(STATIC), start(MINILM)
    assert static.submit(["a"], "query").result(LIMIT).dimensions == 256
    assert minilm.submit(["a"], "query").result(LIMIT).dimensions == 384
    assert libraries(static) == {"tokenizers"}
    assert libraries(minilm) == {"tokenizers", "onnxruntime"}


@pytest.mark.torch
def test_a_static_model_is_the_same_model_in_numpy_and_in_torch(start: Callable[..., LocalEmbedder]) -> None:
    ours, theirs = start(STATIC), start(STATIC, backend="torch")
    found = [embedder.probe().result(LIMIT) for embedder in (ours, theirs)]
    assert found[0].fingerprint == found[1].fingerprint
    assert "torch" in libraries(theirs)
