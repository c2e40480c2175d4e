"""ONNX models: prepared once, in a process of its own, and then run by a host without torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedline.core.embedding import EmbeddingBlock, ModelConfig, ModelInfo
from embedline.embedders.local import LocalEmbedder
from embedline.errors import ProviderMisconfigured
from embedline.model_host import bert_graph, launcher, onnx_export
from embedline.model_host.launcher import HostSettings
from embedline.model_host.onnx_backend import OnnxBackend
from embedline.model_host.prepared import read_manifest
from support import MODELS

LIMIT = 120.0
INT8 = {"backend": "onnx", "precision": "int8"}
TEXTS = [
    "VACUUM reclaims storage occupied by dead tuples.",
    "  How do I restore a single table?\n",
    "The query planner's cost estimates are only as good as the statistics that ANALYZE has collected. " * 9,
    "Ein Index beschleunigt die Suche.",
    "a",
    "Write-ahead logging means that changes to data files are written only after they have been logged. " * 40,
]


@pytest.fixture(scope="module")
def minilm() -> str:
    return str(MODELS / "all-MiniLM-L6-v2")


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """The cache directory of the server's user."""
    with tempfile.TemporaryDirectory(prefix="el-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        yield Path(folder)


Start = Callable[..., LocalEmbedder]


@pytest.fixture
def start(minilm: str, cache: Path) -> Iterator[Start]:
    """Make embedders on a server of the test's own; hosts end with it."""
    opened: list[LocalEmbedder] = []
    with tempfile.TemporaryDirectory(prefix="el-") as root, subprocess.Popen(["sleep", "600"]) as server:

        def make(model: str = minilm, **options: Any) -> LocalEmbedder:
            config = ModelConfig("m", "sentence-transformers", model, timeout_seconds=60.0, options=options)
            opened.append(LocalEmbedder(config, owner_pid=server.pid, runtime_root=root))
            return opened[-1]

        yield make
        for embedder in opened:
            embedder.close()
        server.kill()
        server.wait()


def probe(embedder: LocalEmbedder) -> ModelInfo:
    return embedder.probe().result(LIMIT)


def embed(embedder: LocalEmbedder) -> NDArray[np.float32]:
    block: EmbeddingBlock = embedder.submit(TEXTS, "document").result(LIMIT)
    return np.frombuffer(block.data, dtype="<f4").reshape(block.count, block.dimensions)


def host_pid(embedder: LocalEmbedder) -> int:
    connection = launcher.connect(embedder._place)
    assert connection is not None
    with connection:
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", peer)[0])


def prepared(cache: Path) -> dict[str, tuple[int, int]]:
    """The graphs in the cache, each with what a new one would change."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.glob("embedline/*/model.onnx")}


def test_an_int8_model_is_prepared_once_and_means_the_same(start: Start, cache: Path) -> None:
    quantised, plain = start(**INT8), start(str(MODELS / "minilm"))
    futures = quantised.probe(), plain.probe()
    infos = [future.result(LIMIT) for future in futures]
    assert (infos[0].dimensions, infos[0].max_tokens) == (infos[1].dimensions, infos[1].max_tokens) == (384, 254)
    assert infos[0].fingerprint != infos[1].fingerprint
    vectors = embed(quantised)
    cosines = np.einsum("ij,ij->i", vectors, embed(plain))
    assert cosines.mean() >= 0.98
    assert cosines.min() >= 0.96
    assert not np.array_equal(vectors, embed(plain))

    before = prepared(cache)
    assert len(before) == 1
    os.kill(host_pid(quantised), signal.SIGKILL)
    assert probe(quantised).fingerprint == infos[0].fingerprint, "after a restart"
    np.testing.assert_array_equal(embed(quantised), vectors)
    assert prepared(cache) == before, "not prepared again"
    # onnxruntime's telemetry would leave a folder of its own.
    assert os.listdir(cache) == ["embedline"]
    tokenizer = json.loads(Path(infos[0].tokenizer_path or "").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None), "it counts tokens, it does not cut"


def test_a_model_prepared_by_command_is_the_same_model(start: Start, minilm: str, cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "minilm-int8"
    command = [sys.executable, "-m", "embedline.client.cli", "export-onnx", minilm, str(target), "--precision", "int8"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert '"precision": "int8"' in done.stdout
    assert os.listdir(tmp_path) == ["minilm-int8"]
    before = prepared(cache)
    assert len(before) == 1
    theirs, ours = start(str(target), **INT8), start(**INT8)
    assert probe(theirs).fingerprint == probe(ours).fingerprint
    np.testing.assert_allclose(embed(theirs), embed(ours), atol=1e-5)
    assert prepared(cache) == before

    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    for options, message, hint in [
        ({"backend": "onnx"}, "is int8, not float32", '"int8"'),
        (INT8 | {"device": "cuda"}, "no support for CUDA", "onnxruntime-gpu"),
    ]:
        error = start(str(target), **options).probe().exception(LIMIT)
        assert isinstance(error, ProviderMisconfigured)
        assert message in error.message
        assert error.hint is not None
        assert hint in error.hint


def test_what_cannot_be_prepared_says_so(start: Start, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    embedder = start(str(tmp_path), **INT8)
    error = embedder.submit(["a"], "query").exception(LIMIT)
    assert isinstance(error, ProviderMisconfigured)
    assert f'cannot load model "{tmp_path}"' in error.message
    assert launcher.log_tail(embedder._place) is not None


def test_a_prepared_model_of_another_version_is_not_read(start: Start, tmp_path: Path) -> None:
    (tmp_path / "embedline.json").write_text('{"weights": "x", "form": 0}')
    error = start(str(tmp_path), **INT8).probe().exception(LIMIT)
    assert isinstance(error, ProviderMisconfigured)
    assert "another version of Embedline" in error.message
    assert error.hint is not None
    assert "export-onnx" in error.hint


# A BERT is written from its weights, without torch; torch and its exporter are the measure.


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    products: NDArray[np.float32] = np.einsum("ij,ij->i", left, right)
    return products / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def opened(directory: Path) -> OnnxBackend:
    manifest = read_manifest(str(directory))
    assert manifest is not None
    return OnnxBackend(str(directory), manifest, "cpu")


@pytest.mark.torch
def test_a_bert_written_from_its_weights_is_the_one_that_torch_exports(
    minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedline.model_host.torch_backend import load_torch

    wanted = load_torch(HostSettings(minilm))
    ours = onnx_export.export(minilm, str(tmp_path / "ours"), "int8")
    monkeypatch.setattr(bert_graph, "read", lambda directory: None)
    theirs = onnx_export.export(minilm, str(tmp_path / "theirs"), "int8")
    assert ours == theirs
    np.testing.assert_allclose(opened(MODELS / "minilm").forward(TEXTS), wanted.forward(TEXTS), atol=1e-5)
    assert opened(MODELS / "minilm").max_tokens == wanted.max_tokens == 254
    left, right = opened(tmp_path / "ours"), opened(tmp_path / "theirs")
    assert cosines(left.forward(TEXTS), right.forward(TEXTS)).min() > 0.9999
    assert left.tokenizer().to_str() == right.tokenizer().to_str()


@pytest.mark.torch
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("max_length", [16, 512])
def test_every_bert_that_is_written_gives_the_vectors_of_torch(
    minilm: str, tmp_path: Path, pooling: str, is_normalised: bool, max_length: int
) -> None:
    import torch
    from transformers import BertConfig, BertModel

    from embedline.model_host.torch_backend import load_torch

    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    torch.manual_seed(7)
    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, layer_norm_eps=1e-6,
        initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 48, f"pooling_mode_{pooling}_token{'s' * (pooling == 'mean')}": True})
    )
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules if is_normalised else modules[:2]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))
    assert bert_graph.read(str(folder)) is not None
    onnx_export.export(str(folder), str(tmp_path / "made"), "float32")
    made, wanted = opened(tmp_path / "made"), load_torch(HostSettings(str(folder)))
    np.testing.assert_allclose(made.forward(TEXTS), wanted.forward(TEXTS), atol=2e-5)
    assert made.max_tokens == wanted.max_tokens


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"model_type": "roberta"}),
        ("config.json", {"hidden_act": "relu"}),
        ("config.json", {"position_embedding_type": "relative_key"}),
        ("config.json", {"is_decoder": True}),
        ("config.json", {"max_position_embeddings": 128}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("sentence_bert_config.json", {"max_seq_length": None}),
        ("tokenizer_config.json", {"do_lower_case": False}),
        ("tokenizer_config.json", {"padding_side": "left"}),
        ("tokenizer_config.json", {"pad_token": None}),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}),
        ("1_Pooling/config.json", {"include_prompt": False}),
    ],
)
def test_a_model_that_is_no_plain_bert_is_left_to_torch(
    minilm: str, tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    assert bert_graph.read(str(folder)) is not None
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert bert_graph.read(str(folder)) is None
    path.unlink()
    assert bert_graph.read(str(folder)) is None
