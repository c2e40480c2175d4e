"""Texts longer than their model reads, where its tokenizer is not known: estimated by script, else cut and never given up."""

from __future__ import annotations

import psycopg
import pytest

from embedline.core.text import repair_text
from embedline.models.health_check import PROBE_TEXT
from generated_names import PAGE
from stub_provider import StubProvider
from support import scalar, settle
from working import create_stub_model, create_stub_pipeline, dead_letters, insert_rows, work_until_idle

# One token a character, as vocabularies of Chinese have it; a server that reads 512 tokens refuses what is longer.
CHINESE = "数据库把数据写入磁盘，然后读取它们。查询优化器选择最好的执行计划；索引加快搜索的速度。"
TOO_LONG = '{"error": {"message": "This model\'s maximum context length is 512 tokens. Please reduce the length of the input."}}'
PLAIN = '{"error": {"message": "invalid request"}}'


def refusing(status: int, longest: int, words: str = TOO_LONG) -> dict[str, object]:
    """A rule that refuses each request with a text of more characters."""
    return {"longer": longest, "status": status, "body": words}


def chunks_of(connection: psycopg.Connection, key: int) -> list[tuple[int, int, int, str]]:
    """Return (seq, start, end, content) of a row's chunks; all of them have a vector."""
    found = connection.execute(
        f"SELECT seq, start_offset, end_offset, content FROM {PAGE('chunk')}"
        f" JOIN {PAGE.version(1)} USING (chunk_id) WHERE key_id = %s ORDER BY seq",
        (key,),
    ).fetchall()
    assert len(found) == scalar(connection, f"SELECT count(*) FROM {PAGE('chunk')} WHERE key_id = %s", (key,))
    return found


def assert_whole(connection: psycopg.Connection, key: int) -> int:
    """Assert that a row's chunks are its text, in order; return their number."""
    body = repair_text(scalar(connection, "SELECT body FROM page WHERE id = %s", (key,)))
    found = chunks_of(connection, key)
    assert [seq for seq, _, _, _ in found] == list(range(len(found)))
    assert [body[start:end] for _, start, end, _ in found] == [content for _, _, _, content in found]
    assert "".join(content for _, _, _, content in found) == body
    return len(found)


def test_chinese_in_default_chunks_fits_a_server_of_512_tokens(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    stub.behave(rules=[refusing(400, 512)], remember=True)
    stub_database.execute("INSERT INTO page SELECT g, repeat(%s, 10 * g) FROM generate_series(1, 6) AS g", (CHINESE,))
    work_until_idle(stub_database)
    assert dead_letters(stub_database) == {}
    assert all(assert_whole(stub_database, key) > 0 for key in range(1, 7))
    assert stub.counts().get("rules", 0) == 0, "nothing was refused"


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_chunk_that_is_refused_for_its_length_is_embedded_in_pieces(
    stub_database: psycopg.Connection, stub: StubProvider, status: int
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, chunk_tokens=2000)
    settle(stub_database)
    stub.behave(rules=[refusing(status, 512)], remember=True)
    stub_database.execute(
        "INSERT INTO page SELECT g, repeat(%s, 30) || g || repeat('. Words of another script.', 300)"
        " FROM generate_series(1, 3) AS g",
        (CHINESE,),
    )
    insert_rows(stub_database, 4, 50)
    work_until_idle(stub_database)
    assert dead_letters(stub_database) == {}
    for key in (1, 2, 3):
        assert assert_whole(stub_database, key) > 5
        assert max(len(content) for _, _, _, content in chunks_of(stub_database, key)) <= 512
    assert stub.texts_seen().keys() - {PROBE_TEXT}
    # Read again as it is: nothing to do, and no chunk is missing.
    assert scalar(stub_database, "SELECT coalesce(sum(count), 0) FROM embedline.verify('page', sample => 0)") == 0
    stub.behave(rules=[refusing(status, 512)], remember=True)
    stub.forget()
    before = {content for key in (1, 2, 3) for _, _, _, content in chunks_of(stub_database, key)}
    stub_database.execute("UPDATE page SET body = body || ' An end.' WHERE id <= 3")
    work_until_idle(stub_database)
    assert all(assert_whole(stub_database, key) > 5 for key in (1, 2, 3))
    counts, seen = stub.counts(), stub.texts_seen()
    seen.pop(PROBE_TEXT, None)
    assert counts.get("rules", 0) == 0, "what was refused once is asked for no more"
    assert not {text.strip() for text in before} & seen.keys(), "a piece was paid for twice"


def test_pieces_are_paid_for_once_if_the_provider_does_not_say_why_it_refuses(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, chunking="none")
    settle(stub_database)
    stub.behave(rules=[refusing(400, 512, PLAIN)], remember=True)
    body = "".join(f"Sentence number {n} of a long row. " for n in range(60))
    stub_database.execute("INSERT INTO page VALUES (1, %s)", (body,))
    work_until_idle(stub_database)
    assert assert_whole(stub_database, 1) >= 4
    stub_database.execute("UPDATE page SET body = body WHERE id = 1")
    scalar(stub_database, "SELECT embedline.requeue('page', '{\"id\": 1}')")
    work_until_idle(stub_database)
    seen = stub.texts_seen()
    seen.pop(PROBE_TEXT, None)
    assert set(seen.values()) == {1}
    assert scalar(stub_database, "SELECT text_size_refused FROM embedline.model WHERE name = 'stub'") is None


def test_a_long_text_among_few_others_changes_no_size_of_requests(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, chunking="none")
    settle(stub_database)
    stub.behave(rules=[refusing(400, 512)])
    stub_database.execute(
        "INSERT INTO page VALUES (1, repeat('a long row ', 60)), (2, 'a short row'), (3, 'another short row')"
    )
    work_until_idle(stub_database)
    assert dead_letters(stub_database) == {}
    assert scalar(stub_database, "SELECT request_items FROM embedline.status WHERE pipeline = 'page'") == 2048


def test_a_text_that_is_refused_down_to_the_floor_is_given_up_with_its_reason(
    stub_database: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database)
    settle(stub_database)
    stub.behave(rules=[{"match": "POISON", "status": 400, "body": PLAIN}], remember=True)
    stub_database.execute("INSERT INTO page SELECT g, repeat('a harmless word ', 40) FROM generate_series(1, 9) AS g")
    stub_database.execute(
        "INSERT INTO page VALUES (10, repeat('a harmless word ', 20) || 'POISON' || repeat(' and more', 20))"
    )
    work_until_idle(stub_database)
    letters = dead_letters(stub_database)
    assert list(letters) == [10]
    assert "invalid request" in letters[10][2]
    assert scalar(stub_database, f"SELECT count(*) FROM {PAGE('chunk')} WHERE key_id = 10") == 0
    # By halves of the batch, and of the text: a piece, its neighbour and the harmless text at each.
    assert stub.counts()["requests"] <= 30
