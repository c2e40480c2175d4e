"""Another tower for recordings is filled, judged, cut over to and undone, and each hit can be played from its place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from recordings import recording
from support import create_pipeline, scalar, settle
from towers_model import make_towers_model
from upgrading import add_version, settle_versions, versions

# Each recording has a second at its own level, a second of a plain tone, and a second at the opposite level.
LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
_SECONDS = [(0, 1000), (1000, 2000), (2000, 3000)]
_HALVES = [(0, 1000), (500, 1500), (1000, 2000), (1500, 2500), (2000, 3000)]
_BY_FILE = "SELECT key, chunk_start, chunk_end FROM embedline.search('sound', %s::bytea, k => 1)"


def _insert(connection: psycopg.Connection, key: int, level: float) -> None:
    connection.execute("INSERT INTO sound VALUES (%s, %s)", (key, recording(level, 0.0, -level)))


def _create(connection: psycopg.Connection) -> None:
    connection.execute("CREATE TABLE sound (id bigint PRIMARY KEY, recording bytea)")
    for key, level in enumerate(LEVELS):
        _insert(connection, key, level)
    create_pipeline(
        connection, "sound", "sound", "recording", "towers", modality="audio", index_method="none",
        chunking="windows", chunking_options='{"window_seconds": 1, "window_overlap": 0}',
    )  # fmt: skip
    settle(connection)


def _assert_found(connection: psycopg.Connection, levels: dict[int, float], places: list[tuple[int, int]]) -> None:
    """Assert that each recording has its windows, and that each half of it is found at its place."""
    rows = connection.execute("SELECT id, chunk_start, chunk_end FROM sound_embedding ORDER BY 1, 2").fetchall()
    assert rows == [(key, *place) for key in sorted(levels) for place in places]
    for key, level in levels.items():
        for wanted, place in ((level, places[0]), (-level, places[-1])):
            assert connection.execute(_BY_FILE, (recording(wanted),)).fetchall() == [(str(key), *place)]


def _canaries(connection: psycopg.Connection, levels: dict[int, float]) -> None:
    connection.execute("CREATE TABLE canary (query text, file bytea, key text NOT NULL)")
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO canary VALUES (NULL, %s, %s)",
            [
                (recording(sign * level, seconds=0.5 + step / 100), str(key))
                for key, level in levels.items()
                for sign in (1, -1)
                for step in range(30)
            ],
        )


@pytest.fixture
def other_towers() -> Iterator[Path]:
    """The folder of another model, which the server can read."""
    with tempfile.TemporaryDirectory(prefix="embedline-towers-") as parent:
        folder = make_towers_model(Path(parent) / "towers-2", "text", "audio", heard=("most", "mean", "mean_size"))
        for path in (folder.parent, folder):
            path.chmod(0o755)
        yield folder


def test_another_tower_is_judged_cut_over_to_and_undone(database: psycopg.Connection, other_towers: Path) -> None:
    folder = other_towers
    database.execute("SELECT embedline.create_model('towers-2', 'sentence-transformers', %s)", (str(folder),))
    _create(database)
    levels = dict(enumerate(LEVELS))
    _assert_found(database, levels, _SECONDS)
    # Windows of its own, which begin every half second.
    windows = '{"window_seconds": 1, "window_overlap": 0.5}'
    assert add_version(database, "towers-2", "sound", chunking_options=windows) == 2
    levels |= {1: 0.42, 6: 0.1}
    database.execute("UPDATE sound SET recording = %s WHERE id = 1", (recording(0.42, 0.0, -0.42),))
    _insert(database, 6, 0.1)
    database.execute("DELETE FROM sound WHERE id = 2")
    del levels[2]
    settle_versions(database)
    assert versions(database, "chunks", "sound") == {1: len(_SECONDS) * len(levels), 2: len(_HALVES) * len(levels)}
    _assert_found(database, levels, _SECONDS)
    _canaries(database, levels)
    measured = {
        measure: (old, new, verdict)
        for measure, old, new, verdict in database.execute(
            "SELECT measure, old, new, verdict FROM embedline.evaluate('sound', 2, canaries => 'canary', k => 5)"
        ).fetchall()
    }
    assert measured["recall@5"][:2] == (1.0, 1.0)
    assert measured["verdict"][2] == "pass"
    database.execute("SELECT embedline.cutover('sound', 2)")
    _assert_found(database, levels, _HALVES)
    assert scalar(database, "SELECT count(*) FROM embedline.search('sound', 'words', k => 3)") == 3
    # The version before is written on, so a rollback loses nothing.
    levels |= {0: 0.28, 7: 0.73}
    database.execute("UPDATE sound SET recording = %s WHERE id = 0", (recording(0.28, 0.0, -0.28),))
    _insert(database, 7, 0.73)
    database.execute("DELETE FROM sound WHERE id = 3")
    del levels[3]
    settle_versions(database)
    _assert_found(database, levels, _HALVES)
    assert scalar(database, "SELECT embedline.rollback('sound')") == 1
    _assert_found(database, levels, _SECONDS)
    database.execute("SELECT embedline.cutover('sound', 2)")
    _assert_found(database, levels, _HALVES)
    assert database.execute("SELECT * FROM embedline.verify('sound')").fetchall() == []
