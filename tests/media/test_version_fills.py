"""A version that is added reads the files again; a row that cannot be read is its own dead letter."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from pictures import COLOURS, picture
from support import create_pipeline, drain, scalar, settle
from upgrading import add_version, settle_versions, versions

_LETTERS = "SELECT (key ->> 'id')::integer, stage, error_code, message FROM embedline.version_dead_letter ORDER BY 1"
# A function of users that raises for some rows, with the SQLSTATE that this one has.
_CHECKED = """
    CREATE OR REPLACE FUNCTION checked(id bigint, value {type}) RETURNS {type} LANGUAGE plpgsql AS $$
    BEGIN
        IF id = ANY ('{{{poison}}}'::bigint[]) THEN
            RAISE EXCEPTION 'row % is poison', id USING ERRCODE = '{state}';
        END IF;
        RETURN value;
    END $$
"""


def _poison(connection: psycopg.Connection, *keys: int, kind: str, state: str = "P0001") -> None:
    connection.execute(_CHECKED.format(type=kind, poison=",".join(map(str, keys)), state=state))


def _photos(connection: psycopg.Connection) -> int:
    connection.execute("CREATE TABLE photo (id bigint PRIMARY KEY, title text, picture bytea)")
    for key, colour in COLOURS.items():
        connection.execute("INSERT INTO photo VALUES (%s, %s, %s)", (key, colour, picture(colour)))
    return len(COLOURS)


@pytest.mark.parametrize(
    ("kind", "expressions"),
    [
        ("bytea", {"content": "checked(id, picture)", "caption": "title"}),
        ("text", {"content": "picture", "caption": "checked(id, title)"}),
    ],
)
def test_a_row_whose_expression_raises_holds_up_no_other_of_its_version(
    database: psycopg.Connection, kind: str, expressions: dict[str, str]
) -> None:
    count = _photos(database)
    _poison(database, kind=kind)
    create_pipeline(database, "photo", "photo", model="towers", modality="image", **expressions)
    settle(database)
    _poison(database, 3, 5, kind=kind)
    add_version(database, "towers", "photo", distance="l2")
    settle_versions(database)
    assert versions(database, "dead_letters", "photo") == {1: 0, 2: 2}
    assert versions(database, "vectors", "photo") == {1: count, 2: count - 2}
    assert database.execute(_LETTERS).fetchall() == [(key, "read", "P0001", f"row {key} is poison") for key in (3, 5)]
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 0
    _poison(database, kind=kind)
    assert scalar(database, "SELECT embedline.requeue_version('photo', 2)") == 2
    settle_versions(database)
    assert versions(database, "vectors", "photo") == {1: count, 2: count}


def test_an_error_that_may_pass_is_tried_again_and_then_given_up(database: psycopg.Connection) -> None:
    count = _photos(database)
    _poison(database, kind="bytea")
    create_pipeline(database, "photo", "photo", "checked(id, picture)", "towers", modality="image")
    settle(database)
    _poison(database, 3, kind="bytea", state="XX001")
    add_version(database, "towers", "photo", distance="l2")
    drain(database)
    assert versions(database, "vectors", "photo")[2] == count - 1
    assert versions(database, "dead_letters", "photo")[2] == 0
    for _ in range(4):
        database.execute("UPDATE embedline.version_queue SET not_before = now()")
        drain(database)
    assert database.execute(_LETTERS).fetchall() == [(3, "read", "XX001", "row 3 is poison")]


def test_an_address_that_cannot_be_read_holds_up_no_other(database: psycopg.Connection, folder: Path) -> None:
    database.execute("CREATE TABLE photo (id bigint PRIMARY KEY, address text)")
    _poison(database, kind="text")
    create_pipeline(
        database, "photo", "photo", "checked(id, address)", "towers", modality="image", changed_by="address"
    )
    database.execute("INSERT INTO embedline.media_source VALUES (%s)", (f"file://{folder}/",))
    for key, name in ((1, "red"), (2, "blue"), (3, "red")):
        database.execute("INSERT INTO photo VALUES (%s, %s)", (key, f"file://{folder}/{name}.png"))
    settle(database)
    _poison(database, 2, kind="text")
    add_version(database, "towers", "photo", distance="l2")
    settle_versions(database)
    assert versions(database, "vectors", "photo") == {1: 3, 2: 2}
    assert database.execute(_LETTERS).fetchall() == [(2, "read", "P0001", "row 2 is poison")]
