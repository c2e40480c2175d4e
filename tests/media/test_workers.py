"""Resident workers embed pictures while rows are written."""

from __future__ import annotations

import time

import numpy as np
import psycopg
from PIL import ImageColor

from pictures import picture
from support import create_pipeline, scalar, settle, wait_until
from working import working, writing

COLOURS = ("red", "green", "blue", "purple", "orange", "white", "yellow", "pink")


def _colour_of(vector: str) -> list[float]:
    return [float(value) for value in vector.strip("[]").split(",")]


def test_every_vector_is_that_of_the_row_s_last_picture(database: psycopg.Connection) -> None:
    files = {colour: picture(colour) for colour in COLOURS}
    database.execute("CREATE TABLE photo (id bigint PRIMARY KEY, colour text, picture bytea)")
    database.execute("CREATE TABLE file (colour text PRIMARY KEY, picture bytea)")
    for colour, file in files.items():
        database.execute("INSERT INTO file VALUES (%s, %s)", (colour, file))
    database.execute(
        "INSERT INTO photo SELECT n, f.colour, f.picture FROM generate_series(1, 400) AS n"
        " JOIN (SELECT row_number() OVER (ORDER BY colour) - 1 AS place, * FROM file) AS f ON f.place = mod(n, 8)"
    )
    create_pipeline(database, "photo", "photo", "picture", "towers", modality="image", caption="colour")
    change = (
        "UPDATE photo SET (colour, picture) = (SELECT colour, picture FROM file ORDER BY random() + photo.id * 0 LIMIT 1)"
        " WHERE id = 1 + floor(random() * 400)::bigint"
    )
    remove = "DELETE FROM photo WHERE id = 1 + floor(random() * 400)::bigint AND random() < 0.1"
    with working(database, 2, seconds=120), writing(database, change, remove):
        wait_until(lambda: scalar(database, "SELECT count(*) FROM photo_embedding") >= 100, 60, "workers are under way")
        time.sleep(3)
    settle(database, 60)
    rows = database.execute("SELECT colour, chunk, embedding::text FROM photo_embedding").fetchall()
    assert len(rows) == scalar(database, "SELECT count(*) FROM photo")
    for colour, caption, vector in rows:
        expected = np.array(ImageColor.getrgb(colour), dtype=float)
        assert caption == colour
        assert np.allclose(_colour_of(vector), expected / np.linalg.norm(expected), atol=1e-3)
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 0
