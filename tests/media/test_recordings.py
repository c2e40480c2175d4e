"""Recordings are found by a recording and by words, and each of their parts by its place in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psycopg
import pytest

from media_files import recorded, tone
from recordings import recording, voice
from support import MODELS, create_pipeline, scalar, settle

BY_FILE = "SELECT key, chunk_start, chunk_end FROM embedline.search('sound', %s::bytea, k => 1{})"


def _create(connection: psycopg.Connection, model: str = "towers", **options: object) -> None:
    connection.execute("CREATE TABLE sound (id bigint PRIMARY KEY, words text, recording bytea)")
    create_pipeline(connection, "sound", "sound", "recording", model, modality="audio", caption="words", **options)


def _insert(connection: psycopg.Connection, key: int, file: bytes, words: str = "") -> None:
    connection.execute("INSERT INTO sound VALUES (%s, %s, %s)", (key, words, file))


def test_a_recording_is_found_by_its_like_whatever_its_form(database: psycopg.Connection) -> None:
    _create(database, keyword="english")
    for key, level in enumerate((-0.8, 0.0, 0.8)):
        _insert(database, key, recording(level), f"level {key}")
    settle(database)
    for form in ("FLAC", "OGG", "MP3", "WAV"):
        assert scalar(database, BY_FILE.format(""), (recording(0.8, form=form),)) == "2"
    assert scalar(database, "SELECT key FROM embedline.search('sound', 'level 1', mode => 'keyword', k => 1)") in "012"
    assert scalar(database, "SELECT count(*) FROM embedline.search('sound', 'some words', k => 3)") == 3


def test_windows_and_parts_between_silences_have_their_places(database: psycopg.Connection) -> None:
    _create(database, chunking="windows", chunking_options='{"window_seconds": 1, "window_overlap": 0}')
    _insert(database, 1, recording(-0.8, 0.0, 0.8))
    settle(database)
    places = "SELECT chunk_start, chunk_end FROM sound_embedding ORDER BY chunk_seq"
    assert database.execute(places).fetchall() == [(0, 1000), (1000, 2000), (2000, 3000)]
    assert database.execute(BY_FILE.format(""), (recording(0.8),)).fetchall() == [("1", 2000, 3000)]
    per_document = BY_FILE.format(", per_document => true")
    assert database.execute(per_document, (recording(-0.8),)).fetchall() == [("1", 0, 1000)]
    database.execute("UPDATE sound SET recording = %s", (recording(-0.8, None, 0.8),))
    database.execute(
        "SELECT embedline.alter_pipeline('sound', chunking => 'silence', chunking_options => '{\"shortest_silence\": 0.5}')"
    )
    settle(database)
    (_, first_end), (second_start, second_end) = database.execute(places).fetchall()
    assert 900 <= first_end <= 2000 and 1000 <= second_start <= 2100 and second_end == 3000


def test_what_is_no_recording_is_a_dead_letter(database: psycopg.Connection) -> None:
    _create(database, chunking="windows")
    whole = recording(0.5)
    bad = {1: b"", 2: b"words", 3: whole[:30], 4: b"RIFF" + whole[4:12] + b"\xff" * 40, 5: b"\x89PNG\r\n\x1a\n" + whole}
    for key, file in bad.items():
        _insert(database, key, file)
    _insert(database, 6, recording(None))
    _insert(database, 7, recording(0.5, seconds=1 / 8000))
    _insert(database, 8, whole)
    settle(database)
    letters = dict(database.execute("SELECT (key ->> 'id')::integer, error_code FROM embedline.dead_letter").fetchall())
    assert {key for key in letters if key in bad} == set(bad)
    # Silence has no direction in this model; a model that is given one embeds it.
    assert set(letters) <= {*bad, 6, 7}
    assert scalar(database, "SELECT count(*) FROM sound_embedding WHERE id = 8") == 1


def test_a_model_without_a_tower_of_texts_is_asked_with_recordings_alone(database: psycopg.Connection) -> None:
    speech: Path = MODELS / "speech"
    database.execute("SELECT embedline.create_model('speech', 'sentence-transformers', %s)", (str(speech),))
    assert scalar(database, "SELECT modalities FROM embedline.model WHERE name = 'speech'") == ["audio"]
    _create(database, "speech")
    _insert(database, 1, recording(0.0, 0.0, 0.0))
    _insert(database, 2, recording(0.0, None, 0.3))
    settle(database)
    assert scalar(database, BY_FILE.format(""), (recording(0.0, 0.0, 0.0),)) == "1"
    with pytest.raises(psycopg.Error, match="cannot be asked with a text"):
        database.execute("SELECT * FROM embedline.search('sound', 'words')")
    assert database.execute("SELECT * FROM embedline.verify('sound')").fetchall() == []


def test_parts_between_pauses_of_speech_have_their_places(database: psycopg.Connection) -> None:
    _create(database, chunking="silence")
    talk = np.concatenate([voice(2), tone(2.0), voice(2, 3)])
    _insert(database, 1, recorded(talk))
    settle(database)
    places = "SELECT chunk_start, chunk_end FROM sound_embedding ORDER BY chunk_seq"
    assert database.execute(places).fetchall() == [(0, 6000)]
    database.execute("SELECT embedline.alter_pipeline('sound', chunking_options => '{\"speech_probability\": 0.5}')")
    settle(database)
    (start, middle), (again, end) = database.execute(places).fetchall()
    assert (start, end) == (0, 6000)
    assert middle == again
    assert 2200 <= middle <= 3800
