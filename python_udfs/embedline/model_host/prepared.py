"""Read and write prepared ONNX models.

A prepared model is a directory with the graph, the tokenizer and a manifest, written once and then only read:

    model.onnx      from token ids to the sentence embedding, pooling and all, in float32 or int8
    tokenizer.json  with the truncation and padding that the model needs
    embedline.json  the manifest: its source, and how it was made

They are kept in `$XDG_CACHE_HOME/embedline` (else `~/.cache/embedline`) of the server's operating-system user. Each
combination of weights, precision and recipe has its own directory, so every server of that user shares them. Restarts
find them, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass

from embedline.errors import ProviderMisconfigured
from embedline.model_host.choice import MANIFEST
from embedline.model_host.place import make_private

GRAPH, TOKENIZER = "model.onnx", "tokenizer.json"
# Part of a prepared model's name. A new number has every model prepared again, with another fingerprint.
RECIPE = 1


@dataclass(frozen=True)
class Manifest:
    """The facts of a prepared model.

    `max_tokens` is without special tokens, None if the model has no limit.
    """

    weights: str
    precision: str
    dimensions: int
    max_tokens: int | None
    recipe: int = RECIPE


def read_manifest(directory: str) -> Manifest | None:
    """Return the manifest of a prepared model, None if the directory is not one.

    Raises ProviderMisconfigured if another version of Embedline has written it.
    """
    try:
        with open(os.path.join(directory, MANIFEST), encoding="utf-8") as file:
            fields = json.load(file)
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest(**fields)
    except TypeError:
        manifest = None
    if manifest is None or manifest.recipe != RECIPE:
        raise ProviderMisconfigured(
            f'the ONNX model in "{directory}" was prepared by another version of Embedline',
            hint="Prepare it again: embedline export-onnx MODEL DIRECTORY.",
        )
    return manifest


def write_manifest(directory: str, manifest: Manifest) -> None:
    """Write the manifest last, so that a directory that has one is complete."""
    with open(os.path.join(directory, MANIFEST), "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=4)
        file.write("\n")


def cache_root() -> str:
    """Return the directory of the user's prepared models, made if it is missing.

    Raises ProviderMisconfigured if another user could write into it, because the host loads its files.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        return make_private(os.path.join(home, "embedline"))
    except OSError:
        # A service account may have no home. This directory outlives the server, but not always the machine's next
        # start.
        base = make_private(os.path.join(tempfile.gettempdir(), f"embedline-{os.geteuid()}"))
        return make_private(os.path.join(base, "models"))


def cached_path(root: str, weights: str, precision: str) -> str:
    """Return the path of the prepared form of some weights, existing or not."""
    name = json.dumps([RECIPE, weights, precision])
    return os.path.join(root, f"onnx-{hashlib.sha256(name.encode()).hexdigest()[:32]}")
