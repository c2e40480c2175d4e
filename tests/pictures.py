"""Small pictures of one colour each, and a table of them."""

from __future__ import annotations

import io
from collections.abc import Mapping

import psycopg
from PIL import Image

from support import create_pipeline, settle

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
