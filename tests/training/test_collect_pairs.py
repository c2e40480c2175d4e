"""Pairs from the searches of users."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from fruit import create_fruit
from support import MODELS, scalar

_COLLECT = "SELECT outcome, queries FROM embedline.collect_pairs('fruit', 'found')"


@pytest.fixture
def noted(database: psycopg.Connection) -> psycopg.Connection:
    """Searches that were noted, and an empty table for pairs."""
    create_fruit(database)
    database.execute("CREATE TABLE found (query text, key text, grade numeric, source text, at timestamptz)")
    database.execute("SELECT embedline.sample_queries('fruit', 1)")
    for query in ("red apple", "Red apple!", "blue plum", "a black cherry", "zab osta"):
        database.execute("SELECT * FROM embedline.search('fruit', %s, 1)", (query,))
    return database


def test_queries_whose_answer_words_and_vectors_agree_on_become_pairs(noted: psycopg.Connection) -> None:
    outcomes = dict(noted.execute(_COLLECT).fetchall())
    assert outcomes == {"collected": 3, "no sure answer": 1, "there already": 1, "canary": 0}
    rows = noted.execute("SELECT key, grade, source, at IS NOT NULL FROM found ORDER BY key").fetchall()
    assert rows == [("0-0", 1, "captured", True), ("2-2", 1, "captured", True), ("4-3", 1, "captured", True)]
    # Its own searches were not noted, and a second call finds nothing new.
    assert scalar(noted, "SELECT count(*) FROM embedline.query_sample") == 5
    assert dict(noted.execute(_COLLECT).fetchall())["collected"] == 0


def test_canaries_are_not_collected(noted: psycopg.Connection) -> None:
    noted.execute("CREATE TABLE canary AS SELECT 'RED apple' AS query, '0-0' AS key")
    noted.execute("SELECT embedline.set_canaries('fruit', 'canary')")
    outcomes = dict(noted.execute(_COLLECT).fetchall())
    assert (outcomes["collected"], outcomes["canary"]) == (2, 2)


def test_a_reranker_decides_where_there_is_one(noted: psycopg.Connection) -> None:
    noted.execute(
        "SELECT embedline.create_model('judge', 'sentence-transformers', %s, task => 'rerank')",
        (str(MODELS / "reranker"),),
    )
    found = noted.execute("SELECT outcome, queries FROM embedline.collect_pairs('fruit', 'found', reranker => 'judge')")
    assert dict(found.fetchall())["no sure answer"] == 0
    assert scalar(noted, "SELECT key FROM found WHERE query = 'blue plum'") == "2-2"
    assert scalar(noted, "SELECT DISTINCT source FROM found") == "captured, judge"


def test_what_it_lacks_is_told(noted: psycopg.Connection, connect: Connect, make_role: MakeRole) -> None:
    noted.execute("CREATE TABLE bare (key text)")
    with pytest.raises(errors.InvalidParameterValue, match="bare has no column query of type text"):
        noted.execute("SELECT embedline.collect_pairs('fruit', 'bare')")
    role = make_role("embedline_admin")
    with pytest.raises(errors.InsufficientPrivilege, match="must be owner of the source"):
        connect(role).execute("SELECT embedline.collect_pairs('fruit', 'found')")
    noted.execute("SELECT embedline.sample_queries('fruit', 0)")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no search of pipeline") as caught:
        noted.execute(_COLLECT)
    assert "sample_queries('fruit', 0.1)" in (caught.value.diag.message_hint or "")
    noted.execute("SELECT embedline.alter_pipeline('fruit', drop => '{keyword}')")
    with pytest.raises(errors.InvalidParameterValue, match="has no keyword index"):
        noted.execute(_COLLECT)
