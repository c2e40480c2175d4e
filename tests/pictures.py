"""Small pictures of one colour each, a table of them, and the catalogue of a page."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping
from pathlib import Path

import psycopg
from PIL import Image

from support import create_pipeline, settle
from towers_model import make_towers_model

COLOURS: Mapping[int, str] = {1: "red", 2: "green", 3: "blue", 4: "purple", 5: "white", 6: "orange"}


def picture(colour: str, size: tuple[int, int] = (20, 20), form: str = "PNG") -> bytes:
    """Return a file with an image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form)
    return file.getvalue()


def create_photos(connection: psycopg.Connection, model: str, **options: object) -> None:
    """Create table photo (id, name, shop, picture) with a row for each colour, and a pipeline on it that is filled."""
    connection.execute("CREATE TABLE photo (id bigint PRIMARY KEY, name text, shop text, picture bytea)")
    for key, colour in COLOURS.items():
        shop = "north" if key % 2 else "south"
        connection.execute("INSERT INTO photo VALUES (%s, %s, %s, %s)", (key, colour, shop, picture(colour)))
    given = {"modality": "image", "caption": "name", **options}
    create_pipeline(connection, "photo", "photo", "picture", model, **given)
    settle(connection)


def make_catalogue(folder: Path, count: int = 32) -> None:
    """Write into a folder, for all to read, what docs/how-to/search-pictures.md has: two models and `count` photos.

    The last photo is as large as the page says. Both models have the same vectors.
    """
    photos = folder / "photos"
    photos.mkdir()
    for number in range(1, count + 1):
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number / count, 0.9, 0.9))
        side = 272 if number == count else 20
        (photos / f"{number}.png").write_bytes(picture(f"#{red:02x}{green:02x}{blue:02x}", (side, side)))
    for name in ("catalogue", "catalogue-2"):
        make_towers_model(folder / name, "text", "image")
    with (folder / "catalogue-2" / "towers.json").open("a") as file:
        file.write("\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
