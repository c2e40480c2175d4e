"""Rows that a model cannot read, wholly or in part, from the source to search, dead letters and back."""

from __future__ import annotations

import base64

import psycopg
import pytest

from support import create_pipeline, data_count, drain, scalar, searching, settle
from working import work_until_idle

BLOB = base64.b64encode(b"a repeated text. " * 60_000).decode()
HEX = b"another text".hex() * 400
THAI = "".join(chr(0x0E01 + number % 45) for number in range(900))
# More words than a chunk has tokens, each longer than the model reads.
DUMP = " ".join(f"{number:03}" + b"a line of a dump".hex() * 4 for number in range(100))
PROSE = "\n\n".join(f"Paragraph {number} tells of rivers, mountains and the sea." for number in range(60))

LETTERS = "SELECT key ->> 'id', stage, error_code FROM embedline.dead_letter ORDER BY 1"
CHUNK_LETTERS = """
    SELECT key ->> 'id', error_code, accepted_by IS NOT NULL FROM embedline.version_dead_letter AS l
    JOIN embedline.version AS v USING (version_id) WHERE v.number = %s ORDER BY 1
"""


@pytest.fixture
def page(database: psycopg.Connection) -> psycopg.Connection:
    """Rows of one word of a megabyte, hex, Thai, prose, and prose around a page of such words."""
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text)")
    mixed = f"{PROSE}\n\n{DUMP}\n\n{PROSE}"
    for number, body in enumerate((BLOB, HEX, THAI, PROSE, mixed, "rivers and mountains"), 1):
        database.execute("INSERT INTO page VALUES (%s, %s)", (number, body))
    return database


def test_a_row_that_cannot_be_read_is_a_dead_letter_and_no_vector(page: psycopg.Connection) -> None:
    create_pipeline(page, "page", "page", "body", "minilm", index_method="none")
    settle(page)
    assert page.execute(LETTERS).fetchall() == [(str(key), "validate", "EL003") for key in (1, 2, 3)]
    message = scalar(page, "SELECT message FROM embedline.dead_letter WHERE key ->> 'id' = '1'")
    assert message.startswith("the model does not know 100% of the tokens")
    assert scalar(page, "SELECT dead_letters FROM embedline.status") == 3
    assert {key for key, _, _ in searching(page, "page", "rivers", 50)} == {"4", "5", "6"}


def test_a_long_word_in_a_readable_chunk_is_left_in_it(page: psycopg.Connection) -> None:
    page.execute("UPDATE page SET body = %s WHERE id = 5", (f"{PROSE} {HEX} {PROSE}",))
    create_pipeline(page, "page", "page", "body", "minilm", index_method="none", chunk_tokens=40)
    settle(page)
    assert page.execute(CHUNK_LETTERS, (1,)).fetchall() == []
    assert data_count(page, "v1") == data_count(page, "chunk")


def test_unreadable_chunks_take_no_other_of_their_row_along(page: psycopg.Connection) -> None:
    create_pipeline(page, "page", "page", "body", "minilm", index_method="none", chunk_tokens=40)
    settle(page)
    assert {(key, code, accepted) for key, code, accepted in page.execute(CHUNK_LETTERS, (1,))} == {
        ("5", "EL003", True)
    }
    chunks = data_count(page, "chunk")
    missing = scalar(page, "SELECT missing FROM embedline.versions")
    assert 0 < missing < 10
    assert data_count(page, "v1") == chunks - missing
    assert all(not chunk.startswith("0") for _, chunk, _ in searching(page, "page", "rivers", 500))
    assert page.execute("SELECT finding, count FROM embedline.verify('page') WHERE count > 0").fetchall() == []
    # An edit of the readable part leaves the rest as it is; one that takes the word away leaves nothing.
    page.execute("UPDATE page SET body = body || ' The end.' WHERE id = 5")
    settle(page)
    assert scalar(page, "SELECT missing FROM embedline.versions") == missing
    page.execute("UPDATE page SET body = 'only rivers' WHERE id = 5")
    settle(page)
    assert scalar(page, "SELECT missing FROM embedline.versions") == 0
    assert scalar(page, "SELECT dead_letters FROM embedline.versions") == 0


def test_a_worker_says_so_in_status(page: psycopg.Connection) -> None:
    create_pipeline(page, "page", "page", "body", "minilm", index_method="none", chunk_tokens=40)
    page.execute("DELETE FROM page WHERE id < 5")
    work_until_idle(page)
    error = scalar(page, "SELECT last_error FROM embedline.status")
    assert error.startswith('{"id": "5"}: ')
    assert "chunks: the model does not know" in error


def test_an_index_is_built_over_a_version_that_has_such_chunks(page: psycopg.Connection) -> None:
    create_pipeline(page, "page", "page", "body", "minilm", chunk_tokens=40)
    settle(page)
    page.execute(scalar(page, "SELECT embedline.index_statement('page')"))


def test_the_setting_turns_it_off(page: psycopg.Connection) -> None:
    create_pipeline(page, "page", "page", "body", "minilm", index_method="none", chunk_tokens=40)
    settle(page)
    page.execute("SELECT embedline.configure('unknown_token_share', 1)")
    assert scalar(page, "SELECT embedline.requeue('page', error_code => 'EL003')") == 3
    assert scalar(page, "SELECT embedline.requeue_version('page', 1)") > 0
    settle(page)
    assert page.execute(LETTERS).fetchall() == []
    assert scalar(page, "SELECT missing FROM embedline.versions") == 0
    assert data_count(page, "v1") == data_count(page, "chunk")


def test_a_version_of_another_model_says_what_it_cannot_read(page: psycopg.Connection) -> None:
    # static-256 reads the words, so that each becomes as many chunks as its length has room for.
    page.execute("UPDATE page SET body = left(body, 100000)")
    create_pipeline(page, "page", "page", "body", "static-256", index_method="none", chunk_tokens=200)
    settle(page)
    assert page.execute(LETTERS).fetchall() == []
    page.execute("SELECT embedline.add_embedding_version('page', 'minilm', index_method => 'none')")
    settle(page)
    assert {code for _, code, _ in page.execute(CHUNK_LETTERS, (2,))} <= {"EL003"}
    drain(page)


def test_a_short_text_in_a_known_script_is_not_touched(page: psycopg.Connection) -> None:
    page.execute("TRUNCATE page")
    for number, body in enumerate(("thank you 👍", "Grüße aus Köln", "a", "2024", "..."), 1):
        page.execute("INSERT INTO page VALUES (%s, %s)", (number, body))
    create_pipeline(page, "page", "page", "body", "minilm", index_method="none")
    settle(page)
    assert page.execute(LETTERS).fetchall() == []
