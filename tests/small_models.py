"""Static models made of the demo's: versions of other models that cost next to nothing to run."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import psycopg

from support import MODELS, scalar


@functools.cache
def static_model(dimensions: int, *, is_reversed: bool = False) -> Path:
    """Return the folder of the demo's static model cut to its first dimensions; the server's user can read it.

    Reversed, its dimensions stand in the other order: a model that ranks as the other does, and whose vectors are as wide,
    but mean nothing to it.
    """
    from safetensors.numpy import load_file, save_file

    folder = Path(tempfile.gettempdir()) / f"embedline-static-{dimensions}{'-reversed' if is_reversed else ''}"
    if not (folder / "modules.json").exists():
        building = Path(tempfile.mkdtemp(prefix="embedline-static-"))
        shutil.copytree(MODELS / "static-256", building, dirs_exist_ok=True)
        (name, table), *_ = load_file(building / "model.safetensors").items()
        cut = table[:, :dimensions]
        save_file({name: (cut[:, ::-1] if is_reversed else cut).copy()}, building / "model.safetensors")
        for path in (building, *building.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            shutil.rmtree(building)
        else:
            building.rename(folder)
    return folder


def register_static(connection: psycopg.Connection, dimensions: int, *, is_reversed: bool = False) -> str:
    """Register the model and return its name."""
    folder = static_model(dimensions, is_reversed=is_reversed)
    name = folder.name.removeprefix("embedline-")
    query = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
    return str(scalar(connection, query, (name, str(folder))))
