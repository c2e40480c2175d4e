"""Chunkings are compared on rows of a pipeline, by queries whose answers are known."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from psycopg import errors

from conftest import MakeRole
from stub_fixtures import running_stub, stub
from stub_provider import StubProvider
from support import create_pipeline, drain, scalar
from working import create_stub_model

__all__ = ["running_stub", "stub"]

_SPECS = [{"chunking": "none"}, {"chunking": "sentences", "chunk_tokens": 32}]
_TOPICS = {
    "bread": "Knead the dough for ten minutes and bake the loaf in a hot oven.",
    "bicycle": "Oil the chain of the bicycle and pump up both tyres before the ride.",
    "violin": "Rub the bow of the violin with rosin so that the strings sound.",
    "rocket": "The rocket burns its fuel in minutes and then coasts into orbit.",
}
_FILLER = "The committee met in the afternoon, and after a long discussion the report was put off until spring. " * 6


@pytest.fixture
def page(database: psycopg.Connection) -> psycopg.Connection:
    """Rows in which one sentence of many has a subject, and queries for these sentences."""
    database.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    database.execute("CREATE TABLE canary (query text NOT NULL, key text NOT NULL, answer text)")
    for number, (topic, sentence) in enumerate(_TOPICS.items(), 1):
        # The whole row is about the committee, whichever subject its sentence has.
        database.execute("INSERT INTO page VALUES (%s, %s)", (number, f"{_FILLER}\n\n{sentence}\n\n{_FILLER}"))
        database.execute("INSERT INTO canary VALUES (%s, %s, %s)", (f"what about the {topic}?", str(number), sentence))
    database.execute("INSERT INTO page SELECT n, %s FROM generate_series(5, 30) AS n", (_FILLER * 3,))
    return database


def _compared(connection: psycopg.Connection, specs: Any = _SPECS, **options: Any) -> dict[str, dict[str, Any]]:
    named = "".join(f", {option} => %s" for option in options)
    cursor = connection.execute(
        f"SELECT * FROM embedline.compare_chunkings('page', %s, 'canary'{named})",
        (json.dumps(specs), *options.values()),
    )
    assert cursor.description is not None
    names = [column.name for column in cursor.description]
    return {row[0]: dict(zip(names, row, strict=True)) for row in cursor}


def test_the_chunking_that_keeps_answers_whole_wins(page: psycopg.Connection) -> None:
    create_pipeline(page, content="body", chunk_tokens=8, index_method="none", chunk_overlap=2)
    drain(page)
    page.execute("SELECT embedline.set_price('static-256', 1)")
    stored = scalar(page, "SELECT array_agg(chunk ORDER BY chunk_id) FROM page_embedding")
    found = _compared(page, k=1)
    assert list(found) == ["recursive 8, overlap 2", "none", "sentences 32, overlap 2"]
    own, whole, sentences = found.values()
    assert 0.2 < own["recall"] < sentences["recall"] == 1
    assert sentences["difference"] == pytest.approx(1 - own["recall"])
    assert sentences["low"] < sentences["difference"] < sentences["high"]
    assert own["difference"] is None
    assert own["chunks"] > sentences["chunks"] > whole["chunks"] == 30
    assert own["mean_tokens"] <= 8 < sentences["mean_tokens"] <= 32 < whole["mean_tokens"]
    assert own["mean_characters"] < sentences["mean_characters"]
    assert own["tokens"] > whole["tokens"]  # the overlap is paid twice
    assert float(own["money"]) == pytest.approx(own["tokens"] / 1e6)
    assert own["detail"] == "30 rows; 4 queries, 4 with an answer's place"
    assert scalar(page, "SELECT array_agg(chunk ORDER BY chunk_id) FROM page_embedding") == stored


def test_an_answer_without_a_place_is_its_row(page: psycopg.Connection) -> None:
    create_pipeline(page, content="body", chunk_tokens=64, index_method="none")
    drain(page)
    page.execute(
        "UPDATE canary SET answer = 'written nowhere' WHERE key = '2'; UPDATE canary SET answer = NULL WHERE key = '1'"
    )
    semantic = {"chunking": "semantic", "chunk_tokens": 64}
    own, cut = _compared(page, [semantic], sample_rows=10).values()
    assert own["detail"] == (
        "10 rows; 3 queries, 2 with an answer's place; 1 answers are not in their rows and left out"
    )
    assert 0 < cut["recall"] <= 1
    # Each sentence is embedded to find the cuts, and again with its chunk.
    assert cut["tokens"] > 1.8 * own["tokens"]


def test_nothing_is_sent_beyond_a_budget_or_for_an_estimate(page: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(page, stub)
    create_pipeline(page, content="body", model="stub", chunk_tokens=64, index_method="none")
    drain(page)
    stub.forget()
    estimated = _compared(page, estimate_only=True)
    assert [row["recall"] for row in estimated.values()] == [None] * 3
    assert stub.counts().get("requests", 0) == 0
    page.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 3000)")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="comparing 3 chunkings takes about"):
        _compared(page)
    assert stub.counts().get("requests", 0) == 0
    page.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => 1000000)")
    before = scalar(page, "SELECT coalesce(sum(tokens), 0) FROM embedline.usage")
    measured = _compared(page)
    assert stub.counts()["requests"] > 0
    assert scalar(page, "SELECT sum(tokens) FROM embedline.usage") > before
    for name, row in measured.items():
        assert (row["chunks"], row["tokens"]) == (estimated[name]["chunks"], estimated[name]["tokens"])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "specs must be a JSON array of 1 to 20 chunkings"),
        ({"chunking": "none"}, "specs must be a JSON array"),
        ([{"method": "none"}], 'chunking 1 of specs has no key "method"'),
        ([{"chunking": "none"}, 7], "chunking 2 of specs is no object"),
        ([{"chunking": "guess"}], 'chunking "guess" is not known'),
        ([{"chunk_tokens": "many"}], "chunking 1 of specs has another type of chunk_tokens"),
    ],
)
def test_a_chunking_that_cannot_be_is_refused(page: psycopg.Connection, specs: Any, message: str) -> None:
    create_pipeline(page, content="body", index_method="none")
    with pytest.raises(errors.InvalidParameterValue, match=message):
        _compared(page, specs)


def test_only_a_role_that_controls_the_pipeline_compares(page: psycopg.Connection, make_role: MakeRole) -> None:
    create_pipeline(page, content="body", index_method="none")
    drain(page)
    role = make_role("embedline_admin")
    page.execute(f"GRANT SELECT ON page, canary TO {role}; SET ROLE {role}".encode())
    for call in (
        "compare_chunkings('page', '[{\"chunking\": \"none\"}]', 'canary')",
        "_embed_chunkings('page', '[{\"chunking\": \"none\"}]', '{1}', '{text}', true)",
    ):
        with pytest.raises(errors.InsufficientPrivilege):
            page.execute(f"SELECT * FROM embedline.{call}".encode())
    page.execute("RESET ROLE")
