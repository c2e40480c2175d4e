"""One search over several pipelines: images and texts of one space together, and spaces that cannot be compared."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors, sql

from conftest import Connect, MakeRole
from pictures import COLOURS, create_photos, picture
from support import create_pages, create_pipeline, scalar, settle
from upgrading import add_version, cut_over, settle_versions

ACROSS = "SELECT pipeline, key, score FROM embedline.search_across(%s, {}, k => %s{})"
BY_WORDS, BY_FILE = ACROSS.format("%s::text", ""), ACROSS.format("%s::bytea", "")


@pytest.fixture
def both(database: psycopg.Connection) -> psycopg.Connection:
    """Photos, and words about them, of one model of texts and images."""
    create_photos(database, "towers")
    database.execute("CREATE TABLE word (id bigint PRIMARY KEY, name text NOT NULL)")
    for key, colour in enumerate(COLOURS.values(), 100):
        database.execute("INSERT INTO word VALUES (%s, %s)", (key, colour))
    database.execute("SELECT embedline.create_pipeline('word', 'word', 'name', 'towers')")
    settle(database)
    return database


def _alone(connection: psycopg.Connection, pipeline: str, query: str | bytes, k: int) -> list[tuple[str, str, float]]:
    kind = "bytea" if isinstance(query, bytes) else "text"
    return connection.execute(
        f"SELECT %s, key, score FROM embedline.search(%s, %s::{kind}, k => %s, mode => 'vector')",
        (pipeline, pipeline, query, k),
    ).fetchall()


@pytest.mark.parametrize("query", ["orange", picture("blue")], ids=["words", "file"])
def test_the_best_of_all_pipelines_are_found(both: psycopg.Connection, query: str | bytes) -> None:
    statement = BY_FILE if isinstance(query, bytes) else BY_WORDS
    found = both.execute(statement, (["photo", "word", "photo"], query, 5)).fetchall()
    apart = _alone(both, "photo", query, 5) + _alone(both, "word", query, 5)
    wanted = sorted(apart, key=lambda row: -row[2])[:5]
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in wanted])
    assert len(both.execute(statement, (["photo", "word"], query, 100)).fetchall()) == 2 * len(COLOURS)


def test_the_caller_s_rights_hold_in_each_pipeline(
    both: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role("embedline_reader")
    both.execute("ALTER TABLE word ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON word USING (id < 102)")
    both.execute(sql.SQL("GRANT SELECT ON photo, photo_embedding TO {}").format(sql.Identifier(role)))
    with pytest.raises(errors.InsufficientPrivilege):
        connect(role).execute(BY_WORDS, (["photo", "word"], "red", 20))
    both.execute(sql.SQL("GRANT SELECT ON word, word_embedding TO {}").format(sql.Identifier(role)))
    found = connect(role).execute(BY_WORDS, (["photo", "word"], "red", 20)).fetchall()
    assert {key for pipeline, key, _ in found if pipeline == "word"} == {"100", "101"}
    assert len(found) == len(COLOURS) + 2


def test_pipelines_of_different_spaces_are_refused(both: psycopg.Connection) -> None:
    create_pages(both, 3)
    create_pipeline(both)
    settle(both)
    with pytest.raises(errors.InvalidParameterValue, match='"photo" and "page" are of different spaces') as refused:
        both.execute(BY_WORDS, (["photo", "word", "page"], "red", 5))
    assert "add_embedding_version('page', 'towers')" in (refused.value.diag.message_hint or "")
    # After one of them was cut over to another model they are of different spaces, until it is rolled back.
    number = add_version(both, "static-256", pipeline="word", index_method="none")
    settle_versions(both)
    cut_over(both, number, "word")
    with pytest.raises(errors.InvalidParameterValue, match="different spaces"):
        both.execute(BY_WORDS, (["photo", "word"], "red", 5))
    both.execute("SELECT embedline.rollback('word')")
    assert len(both.execute(BY_WORDS, (["photo", "word"], "red", 5)).fetchall()) == 5


@pytest.mark.parametrize(
    ("names", "query", "k", "message"),
    [
        ([], "red", 5, "must name 1 to 100 pipelines, not 0"),
        ([None], "red", 5, "must name 1 to 100 pipelines, not 0"),
        ([f"p{number}" for number in range(101)], "red", 5, "not 101"),
        (None, "red", 5, "pipeline_names must not be NULL"),
        (["photo"], None, 5, "query must not be NULL"),
        (["photo"], "red", 0, "k must be between 1 and 10000"),
        (["photo"], "red", None, "k must not be NULL"),
        (["photo", "nowhere"], "red", 5, 'there is no pipeline "nowhere"'),
    ],
)
def test_a_wrong_parameter_is_told(
    both: psycopg.Connection, names: list[str | None] | None, query: str | None, k: int | None, message: str
) -> None:
    with pytest.raises(psycopg.Error, match=message):
        both.execute(BY_WORDS, (names, query, k))
    assert scalar(both, "SELECT 1") == 1
