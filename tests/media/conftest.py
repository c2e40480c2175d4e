"""A model of texts, images and recordings, which needs no torch, and a folder of pictures."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pictures import picture
from towers_model import make_towers_model


@pytest.fixture(scope="session")
def towers() -> Iterator[Path]:
    """The folder of the model, which the server can read."""
    parent = Path(tempfile.mkdtemp(prefix="embedline-towers-"))
    folder = make_towers_model(parent / "towers")
    for path in (parent, *parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(parent)


@pytest.fixture
def database(database: psycopg.Connection, towers: Path) -> psycopg.Connection:
    """The test's database with model `towers`."""
    database.execute("SELECT embedline.create_model('towers', 'sentence-transformers', %s)", (str(towers),))
    return database


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server can read, with two pictures."""
    made = Path(tempfile.mkdtemp(prefix="embedline-photos-"))
    made.chmod(0o755)
    for name, colour in (("red.png", "red"), ("blue.png", "blue")):
        (made / name).write_bytes(picture(colour))
    yield made
    shutil.rmtree(made)
