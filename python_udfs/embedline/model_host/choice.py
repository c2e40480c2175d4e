"""Choose the backend of a model whose options name none.

Only the model's files decide, so that every server chooses the same. Backends load this module, so it has light imports
only.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

# The file that makes a directory a prepared ONNX model; see prepared.py.
MANIFEST = "embedline.json"
# The file that makes a directory a model of texts, images and recordings; see towers.py.
TOWERS = "towers.json"
# Types that numpy's reader of safetensors knows; only torch reads the others.
_TABLE_TYPES = ("F16", "F32", "F64")
# Most bytes of a header, at which safetensors itself stops reading. The header of a static model has a few hundred
# bytes.
_MAX_HEADER_BYTES = 100_000_000


def choose_backend(directory: str) -> str:
    """Return "static", "onnx", "towers" or "torch" for the directory of a model.

    - static: a table of token vectors, perhaps followed by a normalisation; numpy runs it.
    - onnx: a prepared graph.
    - towers: a graph or a table for each of texts, images and recordings.
    - torch: any other model, and a directory that does not exist.
    """
    if os.path.exists(os.path.join(directory, MANIFEST)):
        return "onnx"
    if os.path.exists(os.path.join(directory, TOWERS)):
        return "towers"
    return "static" if static_modules(directory) is not None else "torch"


# Where the graph of a cross-encoder lies; the second place is that of models on the hub.
RERANK_GRAPHS = ("model.onnx", os.path.join("onnx", "model.onnx"))


def rerank_backend(directory: str) -> str:
    """Return "onnx" for a directory with a graph and a tokenizer, else "torch"."""
    return "onnx" if rerank_graph(directory) is not None else "torch"


def rerank_graph(directory: str) -> str | None:
    """Return the path of a reranker's graph, None if the directory has none."""
    paths = [os.path.join(directory, name) for name in RERANK_GRAPHS]
    has_tokenizer = os.path.isfile(os.path.join(directory, "tokenizer.json"))
    return next((path for path in paths if has_tokenizer and os.path.isfile(path)), None)


def static_modules(directory: str) -> tuple[str, bool] | None:
    """Return the folder of a static model's table, None for another model.

    The second value is True if the vectors are normalised.
    """
    modules = _read_json(os.path.join(directory, "modules.json"))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"]):
        return None
    folder = os.path.join(directory, str(modules[0].get("path", "")))
    if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return None
    tensors = tensor_types(os.path.join(folder, "model.safetensors"))
    table = tensors.get("embedding.weight", tensors.get("embeddings"))
    return (folder, len(kinds) == 2) if table in _TABLE_TYPES else None


def tensor_types(path: str) -> dict[str, str]:
    """Return the types of a safetensors file's tensors by name.

    The result is empty if the file is not one.
    """
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size)) if size <= _MAX_HEADER_BYTES else {}
        return {str(name): str(tensor["dtype"]) for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError):
        return {}


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
