"""Static models of fewer dimensions, made of the demo's: a version of another model that costs nothing to run."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import psycopg

from support import MODELS, scalar


@functools.cache
def static_model(dimensions: int) -> Path:
    """Return the folder of the demo's static model cut to its first dimensions; the server's user can read it."""
    from safetensors.numpy import load_file, save_file

    folder = Path(tempfile.gettempdir()) / f"embedline-static-{dimensions}"
    if not (folder / "modules.json").exists():
        building = Path(tempfile.mkdtemp(prefix="embedline-static-"))
        shutil.copytree(MODELS / "static-256", building, dirs_exist_ok=True)
        (name, table), *_ = load_file(building / "model.safetensors").items()
        save_file({name: table[:, :dimensions].copy()}, building / "model.safetensors")
        for path in (building, *building.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            shutil.rmtree(building)
        else:
            building.rename(folder)
    return folder


def register_static(connection: psycopg.Connection, dimensions: int) -> str:
    """Register the cut model and return its name."""
    name = f"static-{dimensions}"
    query = "SELECT embedline.create_model(%s, 'sentence-transformers', %s)"
    return str(scalar(connection, query, (name, str(static_model(dimensions)))))
