"""Images beside texts: found by words and by a picture, with versions, captions, filters and the caller's rights."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import psycopg
import pytest
from PIL import Image
from psycopg import sql
from safetensors.numpy import load_file, save_file

from conftest import Connect, MakeRole
from pictures import COLOURS, create_photos, picture
from support import create_pages, create_pipeline, drain, scalar, settle
from upgrading import OVERRIDE, add_version, settle_versions, versions

BY_FILE = "SELECT key, chunk, score FROM embedline.search('photo', %s::bytea, k => 3)"


def _names(connection: psycopg.Connection, query: str, *values: object) -> list[str]:
    return [row[1] for row in connection.execute(query, values).fetchall()]


def _letters(connection: psycopg.Connection) -> dict[int, str]:
    rows = connection.execute("SELECT (key ->> 'id')::integer, message FROM embedline.dead_letter").fetchall()
    return dict(rows)


def test_a_picture_finds_itself_and_words_find_captions(database: psycopg.Connection) -> None:
    create_photos(database, "towers", keyword="english")
    assert scalar(database, "SELECT modalities FROM embedline.model WHERE name = 'towers'") == [
        "text",
        "image",
        "audio",
    ]
    for colour in COLOURS.values():
        first, *_ = database.execute(BY_FILE, (picture(colour, form="JPEG"),)).fetchall()
        assert first[1] == colour
    words = "SELECT key, chunk FROM embedline.search('photo', 'orange', k => 6{})"
    assert set(_names(database, words.format(""))) == set(COLOURS.values())
    assert _names(database, words.format(", mode => 'keyword'")) == ["orange"]
    assert "orange" in _names(database, words.format(", mode => 'hybrid'"))[:2]
    # The vector alone, for a statement of the user's own.
    query = "SELECT id FROM photo_embedding ORDER BY embedding <=> (SELECT embedline.embed_query('photo', %s::bytea)) LIMIT 1"
    assert scalar(database, query, (picture("blue"),)) == 3


def test_filters_and_the_caller_s_rights_hold_for_a_picture(
    database: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    create_photos(database, "towers")
    role = make_role("embedline_reader")
    database.execute("ALTER TABLE photo ENABLE ROW LEVEL SECURITY")
    database.execute("CREATE POLICY of_shop ON photo USING (shop = 'south')")
    database.execute(sql.SQL("GRANT SELECT ON photo, photo_embedding TO {}").format(sql.Identifier(role)))
    red = picture("red")
    assert _names(database, BY_FILE, red)[0] == "red"
    assert set(_names(connect(role), BY_FILE, red)) == {"green", "purple", "orange"}
    filtered = "SELECT key, chunk FROM embedline.search('photo', %s::bytea, filter => $$name < 'h'$$)"
    assert set(_names(database, filtered, red)) == {"green", "blue"}


def test_files_that_cannot_be_decoded_are_dead_letters_and_hold_up_no_other(database: psycopg.Connection) -> None:
    create_photos(database, "towers")
    bad = {
        11: b"", 12: b"just words", 13: picture("red")[:60], 14: b"%PDF-1.7\n" + picture("red"),
        15: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 16: b"\x00" * 1000,
    }  # fmt: skip
    for key, file in bad.items():
        database.execute("INSERT INTO photo VALUES (%s, 'bad', 'north', %s)", (key, file))
    database.execute(
        "INSERT INTO photo VALUES (20, 'yellow', 'north', %s), (21, 'none', 'north', NULL)", (picture("yellow"),)
    )
    settle(database)
    assert set(_letters(database)) == set(bad)
    assert {code for (code,) in database.execute("SELECT error_code FROM embedline.dead_letter")} == {"EL005"}
    assert scalar(database, "SELECT count(*) FROM photo_embedding") == len(COLOURS) + 1
    database.execute("UPDATE photo SET picture = %s WHERE id = 13", (picture("pink"),))
    settle(database)
    assert set(_letters(database)) == set(bad) - {13}


def test_a_new_caption_keeps_the_vector_and_is_found(database: psycopg.Connection) -> None:
    create_photos(database, "towers", keyword="english")
    before = scalar(database, "SELECT embedding::text FROM photo_embedding WHERE id = 1")
    # A file that the model could not read again shows that it is not asked.
    database.execute("UPDATE embedline.model SET model = '/nonexistent' WHERE name = 'towers'")
    database.execute("UPDATE photo SET name = 'crimson' WHERE id = 1")
    settle(database)
    assert _letters(database) == {}
    row = database.execute("SELECT chunk, embedding::text FROM photo_embedding WHERE id = 1").fetchone()
    assert row == ("crimson", before)
    keyword = "SELECT key, chunk FROM embedline.search('photo', %s, mode => 'keyword')"
    assert _names(database, keyword, "crimson") == ["crimson"]
    assert _names(database, keyword, "red") == []


def test_tiles_are_found_by_their_part_of_a_picture(database: psycopg.Connection) -> None:
    create_photos(database, "towers")
    halves = Image.new("RGB", (128, 64), "red")
    halves.paste(Image.new("RGB", (64, 64), "blue"), (64, 0))
    file = io.BytesIO()
    halves.save(file, "PNG")
    database.execute("INSERT INTO photo VALUES (30, 'both', 'north', %s)", (file.getvalue(),))
    options = '{"tile_pixels": 64, "tile_overlap": 0}'
    database.execute(
        "SELECT embedline.alter_pipeline('photo', chunking => 'tiles', chunking_options => %s)", (options,)
    )
    settle(database)
    rows = database.execute(
        "SELECT chunk_seq, chunk_start, chunk_end FROM photo_embedding WHERE id = 30 ORDER BY 1"
    ).fetchall()
    # Pixels counted row by row in a picture 128 wide.
    assert rows == [(0, 0, 63 * 128 + 64), (1, 64, 64 * 128)]
    found = "SELECT key, chunk_start FROM embedline.search('photo', %s::bytea, filter => 'id = 30', k => 1)"
    assert database.execute(found, (picture("blue", (64, 64)),)).fetchall() == [("30", 64)]
    # A file as large as a tile is one tile, and keeps its vector under another place.
    assert scalar(database, "SELECT count(*) FROM photo_embedding WHERE id <> 30") == len(COLOURS)


def test_another_version_is_filled_judged_by_words_and_files_cut_over_and_undone(database: psycopg.Connection) -> None:
    create_photos(database, "towers", index_method="none")
    assert add_version(database, "towers", "photo", column_type="halfvec") == 2
    database.execute("UPDATE photo SET picture = %s WHERE id = 6", (picture("brown"),))
    database.execute("DELETE FROM photo WHERE id = 5")
    settle_versions(database)
    assert versions(database, "missing", "photo") == {1: 0, 2: 0}
    assert versions(database, "chunks", "photo") == {1: 5, 2: 5}
    database.execute("CREATE TABLE canary (query text, file bytea, key text NOT NULL)")
    for key, colour in list(COLOURS.items())[:4]:
        database.execute(
            "INSERT INTO canary VALUES (%s, NULL, %s), (NULL, %s, %s)", (colour, key, picture(colour), key)
        )
    rows = database.execute(
        "SELECT measure, old, new FROM embedline.evaluate('photo', 2, canaries => 'canary', k => 3, min_recall => 0.9)"
    ).fetchall()
    measured = {measure: (old, new) for measure, old, new in rows}
    assert measured["recall@3 by image"] == (1.0, 1.0)
    assert "recall@3 by text" in measured
    database.execute(OVERRIDE, ("photo", 2))
    assert _names(database, BY_FILE, picture("green"))[0] == "green"
    database.execute("SELECT embedline.rollback('photo')")
    assert versions(database, "serving", "photo") == {1: True, 2: False}


def test_vectors_are_checked_against_the_files(database: psycopg.Connection) -> None:
    create_photos(database, "towers")
    assert database.execute("SELECT * FROM embedline.verify('photo')").fetchall() == []


def test_no_tower_is_changed_alone(database: psycopg.Connection, towers: Path) -> None:
    other = towers.parent / "other"
    shutil.copytree(towers, other)
    weights = other / "text" / "model.safetensors"
    (name, table), *_ = load_file(weights).items()
    save_file({name: table[:, ::-1].copy()}, weights)
    weights.chmod(0o644)
    create_photos(database, "towers")
    with pytest.raises(psycopg.Error, match="would have other towers"):
        database.execute("SELECT embedline.alter_model('towers', model => %s)", (str(other),))
    # A folder that was replaced behind the name: the vectors of the pictures are the same, and the check tells all the same.
    database.execute("UPDATE embedline.model SET model = %s", (str(other),))
    with pytest.raises(psycopg.Error, match="are not those that it was registered with"):
        database.execute("SELECT * FROM embedline.search('photo', 'red')")
    with pytest.raises(psycopg.Error, match="are not those that it was registered with"):
        database.execute(BY_FILE, (picture("red"),))
    database.execute("INSERT INTO photo VALUES (20, 'brown', 'north', %s)", (picture("brown"),))
    drain(database)
    assert _letters(database) == {}
    assert scalar(database, "SELECT count(*) FROM photo_embedding WHERE id = 20") == 0
    database.execute("SELECT embedline.resume_model('towers')")
    find = "SELECT finding, example ? 'fingerprint' FROM embedline.verify('photo', repair => {})"
    for repair in ("false", "true", "false"):
        assert database.execute(find.format(repair)).fetchall() == [("foreign", True)]
    shutil.rmtree(other)


CREATE = "SELECT embedline.create_pipeline('x', 'photo', {})"
REFUSED = (
    (CREATE.format("'picture', 'static-256', modality => 'image'"), "makes no vectors of images"),
    (CREATE.format("'picture', 'static-256', modality => 'audio'"), "makes no vectors of recordings"),
    (CREATE.format("'name', 'towers', modality => 'image'"), "must be of type bytea"),
    (CREATE.format("'picture', 'towers', modality => 'film'"), "is not known"),
    (CREATE.format("'picture', 'towers', modality => 'image', chunking => 'recursive'"), "recursive"),
    (CREATE.format("'name', 'towers', chunking => 'tiles'"), "tiles"),
    (CREATE.format("'picture', 'towers', modality => 'image', document_prefix => 'name'"), "document_prefix is for texts"),
    (CREATE.format("'name', 'towers', caption => 'name'"), "caption is for images"),
    ("SELECT embedline.add_embedding_version('photo', 'static-256')", "makes no vectors of images"),
    ("SELECT embedline.alter_pipeline('photo', content => 'name')", "must be of type bytea"),
    ("SELECT * FROM embedline.estimate('photo')", "for texts alone"),
    ("SELECT embedline.grant_remote('photo', 'postgres')", "for texts alone"),
    ("SELECT * FROM embedline.search('photo', '\\x00'::bytea, mode => 'hybrid')", "has no words"),
    ("SELECT * FROM embedline.search('photo', ''::bytea)", "of 0 bytes"),
    ("SELECT * FROM embedline.search('page', '\\x89504e47'::bytea)", "cannot be asked with an image"),
    ("SELECT embedline.embed_query('page', '\\x89504e47'::bytea)", "cannot be asked with an image"),
)  # fmt: skip


def test_what_does_not_fit_is_refused_with_a_reason(database: psycopg.Connection) -> None:
    create_photos(database, "towers")
    create_pages(database, 3)
    create_pipeline(database)
    settle(database)
    for statement, message in REFUSED:
        with pytest.raises(psycopg.Error, match=message):
            database.execute(statement)
