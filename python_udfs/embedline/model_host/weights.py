"""Identify a model's weights, wherever they lie and whatever reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from embedline.model_host.choice import RERANK_GRAPHS, TOWERS
from embedline.model_host.prepared import read_manifest

if TYPE_CHECKING:
    from embedline.model_host.host_settings import HostSettings


def weights_identity(settings: HostSettings) -> str:
    """Return the identity of a model's weights.

    A directory is known by the content of its weights, tokenizer and module list, a model of the hub by its commit. A
    prepared ONNX model is known by the weights that it was made of. A model of towers is known by all of its files,
    because no tower can change alone. Raises OSError if the weights are not on this machine.
    """
    if not os.path.isdir(settings.model):
        from huggingface_hub import snapshot_download

        snapshot = snapshot_download(settings.model, revision=settings.revision, local_files_only=True)
        return f"{settings.model}@{os.path.basename(snapshot)}"
    if settings.reranks and settings.backend == "onnx":
        return _directory_identity(settings.model, _graph_files(settings.model))
    if os.path.isfile(os.path.join(settings.model, TOWERS)):
        return _directory_identity(settings.model, _all_files(settings.model))
    manifest = read_manifest(settings.model)
    return manifest.weights if manifest is not None else _directory_identity(settings.model)


def _graph_files(directory: str) -> Iterable[str]:
    """Return the files that decide the scores of a cross-encoder's graph."""
    names = (*RERANK_GRAPHS, "tokenizer.json", "tokenizer_config.json", "config.json")
    return {name for name in names if os.path.isfile(os.path.join(directory, name))}


def _directory_identity(directory: str, files: Iterable[str] | None = None) -> str:
    digest = hashlib.sha256()
    for relative in sorted(_identity_files(directory) if files is None else files):
        with open(os.path.join(directory, relative), "rb") as file:
            digest.update(f"{relative}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _all_files(directory: str) -> list[str]:
    return [
        os.path.relpath(os.path.join(folder, name), directory)
        for folder, _, names in os.walk(directory)
        for name in names
    ]


def _identity_files(directory: str) -> Iterable[str]:
    found = _all_files(directory)
    small = [path for path in found if os.path.basename(path) in ("tokenizer.json", "modules.json")]
    # Pooling, dense layers and the sequence limit change vectors as much as weights do.
    small += [path for path in found if path == "sentence_bert_config.json" or path.endswith("/config.json")]
    weights = [path for path in found if path.endswith(".safetensors")]
    weights = weights or [path for path in found if path.endswith(".bin")]
    return {*small, *weights}
