"""Prepared ONNX models: a directory with the graph, the tokenizer and a manifest, written once and then only read.

    model.onnx      from token ids to the sentence embedding, pooling and all, in float32 or int8
    tokenizer.json  with the truncation and padding that the model wants
    embedline.json  the manifest: what it was made of, and how

They are kept in `$XDG_CACHE_HOME/embedline` (else `~/.cache/embedline`) of the server's operating-system user, one
directory for each weights, precision and recipe, so every server of that user shares them and restarts find them.
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
# Part of a prepared model's name: a new number has every model prepared anew, with another fingerprint.
RECIPE = 1


@dataclass(frozen=True)
class Manifest:
    """What a prepared model is. `max_tokens` is without special tokens; None where the model has no limit."""

    weights: str
    precision: str
    dimensions: int
    max_tokens: int | None
    recipe: int = RECIPE


def read_manifest(directory: str) -> Manifest | None:
    """Return the manifest of a prepared model, None where the directory is none.

    Raises ProviderMisconfigured for one that another version of Embedline has written.
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
    """Write the manifest; it comes last, so a directory that has one is complete."""
    with open(os.path.join(directory, MANIFEST), "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=4)
        file.write("\n")


def cache_root() -> str:
    """Return the directory of the user's prepared models, made where it is missing.

    Raises ProviderMisconfigured where someone else could write into it: the host loads what lies there.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        return make_private(os.path.join(home, "embedline"))
    except OSError:
        # A service account may have no home. What lies here outlives the server, if not the machine's next start.
        base = make_private(os.path.join(tempfile.gettempdir(), f"embedline-{os.geteuid()}"))
        return make_private(os.path.join(base, "models"))


def cached_path(root: str, weights: str, precision: str) -> str:
    """Return where the prepared form of some weights lies, or will."""
    name = json.dumps([RECIPE, weights, precision])
    return os.path.join(root, f"onnx-{hashlib.sha256(name.encode()).hexdigest()[:32]}")
