"""A model that sentence-transformers loads with its own towers, as CLIP is one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from clip_model import make_clip_model
from pictures import COLOURS, create_photos, picture
from support import scalar

pytestmark = pytest.mark.torch


@pytest.fixture
def clip() -> Iterator[Path]:
    """The folder of the model, which the server can read."""
    parent = Path(tempfile.mkdtemp(prefix="embedline-clip-"))
    folder = make_clip_model(parent)
    for path in (parent, *parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(parent)


def test_pictures_are_found_by_a_picture_and_by_words(database: psycopg.Connection, clip: Path) -> None:
    database.execute("SELECT embedline.create_model('clip', 'sentence-transformers', %s)", (str(clip),))
    assert scalar(database, "SELECT modalities FROM embedline.model WHERE name = 'clip'") == ["text", "image"]
    create_photos(database, "clip")
    for colour in COLOURS.values():
        query = "SELECT chunk FROM embedline.search('photo', %s::bytea, k => 1)"
        assert scalar(database, query, (picture(colour, form="TIFF"),)) == colour
    assert scalar(database, "SELECT count(*) FROM embedline.search('photo', 'a red square', k => 6)") == 6
    with pytest.raises(psycopg.Error, match="makes no vectors of recordings"):
        database.execute("SELECT embedline.create_pipeline('x', 'photo', 'picture', 'clip', modality => 'audio')")
