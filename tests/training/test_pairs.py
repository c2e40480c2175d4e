"""Pairs of a training: each fault of a table has a sentence and a next step."""

from __future__ import annotations

import re

import psycopg
import pytest

from conftest import Connect, MakeRole
from embedline.client.training.pairs import read_pairs, require_no_canaries
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import EmbedlineError, InvalidParameter, NotFound, NotPermitted
from fruit import create_fruit
from support import scalar

_GOOD = "INSERT INTO pair (query, key) SELECT 'query ' || n, n::text FROM generate_series(1, 50) AS n"


@pytest.fixture
def pairs(database: psycopg.Connection) -> psycopg.Connection:
    """A table of 50 good pairs."""
    database.execute("CREATE TABLE pair (query text, key text, grade numeric DEFAULT 1, source text, at timestamptz)")
    database.execute(_GOOD)
    return database


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("TRUNCATE pair", "pair is empty"),
        ("UPDATE pair SET query = NULL WHERE key = '1'", "1 rows of pair have no query, no key or no grade"),
        ("UPDATE pair SET key = NULL WHERE key IN ('1', '2')", "2 rows of pair have no query, no key or no grade"),
        ("UPDATE pair SET grade = 'NaN' WHERE key = '1'", "a grade in pair is not finite"),
        ("UPDATE pair SET query = E' \\t' WHERE key < '2'", "11 rows of pair have a query without text"),
        ("UPDATE pair SET query = U&'\\200B' WHERE key = '1'", "1 rows of pair have a query without text"),
        ("UPDATE pair SET grade = 0", "no grade in pair is above 0, so no pair says what is right"),
        ("UPDATE pair SET key = '7'", "all pairs in pair name one row, '7': there is nothing to tell apart"),
        ("DELETE FROM pair WHERE key::int > 3", "pair has 3 different queries with an answer, and a training needs 40"),
        ("UPDATE pair SET query = 'Query, 1!' WHERE key::int < 20", "pair has 32 different queries with an answer"),
        ("ALTER TABLE pair DROP COLUMN key", "pair has no column key"),
        ("ALTER TABLE pair ALTER query TYPE bytea USING query::bytea", "column query of pair is of type bytea"),
        ("ALTER TABLE pair ALTER grade DROP DEFAULT, ALTER grade TYPE text", "column grade of pair is of type text"),
    ],
)
def test_each_fault_of_a_table_is_told_with_a_next_step(pairs: psycopg.Connection, change: str, told: str) -> None:
    pairs.execute(change.encode())
    with pytest.raises(InvalidParameter, match=re.escape(told)) as caught:
        read_pairs(pairs, "pair")
    assert caught.value.hint


@pytest.mark.parametrize("name", ["nothing", "nowhere.nothing", "pair; DROP TABLE pair", "a.b.c.d", '"', ""])
def test_a_name_that_is_no_table_is_told_and_not_run(pairs: psycopg.Connection, name: str) -> None:
    with pytest.raises(NotFound, match="there is no table of pairs") as caught:
        read_pairs(pairs, name)
    assert "CREATE TABLE pair" in (caught.value.hint or "")
    assert scalar(pairs, "SELECT count(*) FROM pair") == 50


def test_hostile_names_and_texts_are_read_as_they_are(pairs: psycopg.Connection) -> None:
    quoted = quote_ident("""pair"; DROP TABLE pair; -- 'x' %s {}""")
    pairs.execute(f"CREATE TABLE {quoted} AS TABLE pair".encode())
    hostile = """'; DROP TABLE pair; -- {0} %(x)s \\ " $$ <b>"""
    pairs.execute(
        f"INSERT INTO {quoted} (query, key, grade) VALUES ({quote_literal(hostile)}, {quote_literal(hostile)}, 1)".encode()
    )
    found = read_pairs(pairs, quoted)
    assert (hostile, hostile) in {(pair.query, pair.key) for pair in found.pairs}
    assert scalar(pairs, "SELECT count(*) FROM pair") == 50


def test_repeated_pairs_count_once_whatever_their_spelling(pairs: psycopg.Connection) -> None:
    before = read_pairs(pairs, "pair")
    pairs.execute("INSERT INTO pair (query, key) SELECT upper(query) || ' ?', key FROM pair")
    found = read_pairs(pairs, "pair")
    assert len(found.pairs) == 50
    assert found.notes == ["50 pairs that repeat another are left out"]
    assert found.queries == before.queries


def test_unknown_keys_are_left_out_and_told(pairs: psycopg.Connection) -> None:
    found = read_pairs(pairs, "pair")
    kept = found.only([str(n) for n in range(1, 46)])
    assert len(kept.pairs) == 45
    assert kept.notes == ["5 keys of rows that are not embedded are left out"]
    with pytest.raises(InvalidParameter, match="no key in pair is that of an embedded row"):
        found.only(["a", "b"])


def test_a_table_that_may_not_be_read_is_told(pairs: psycopg.Connection, connect: Connect, make_role: MakeRole) -> None:
    role = make_role("embedline_admin")
    with pytest.raises(NotPermitted, match="pair cannot be read: permission denied") as caught:
        read_pairs(connect(role), "pair")
    assert caught.value.hint == "GRANT SELECT ON pair TO CURRENT_USER;"


def test_row_level_security_that_hides_all_pairs_is_told(
    pairs: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    role = make_role("embedline_admin")
    pairs.execute(f"ALTER TABLE pair ENABLE ROW LEVEL SECURITY; GRANT SELECT ON pair TO {role}".encode())
    with pytest.raises(InvalidParameter, match="row-level security shows none of its rows"):
        read_pairs(connect(role), "pair")
    pairs.execute("CREATE POLICY later ON pair USING (key::int > 5)")
    assert len(read_pairs(connect(role), "pair").pairs) == 45


def test_canaries_among_the_pairs_are_refused_and_the_hint_removes_them(database: psycopg.Connection) -> None:
    create_fruit(database)
    database.execute("CREATE TABLE canary AS SELECT initcap(query) || '.' AS query, key FROM pair LIMIT 10")
    database.execute("SELECT embedline.set_canaries('fruit', 'canary')")
    with pytest.raises(EmbedlineError, match='10 queries in pair are canaries of pipeline "fruit"') as caught:
        require_no_canaries(database, "fruit", read_pairs(database, "pair"))
    assert database.execute((caught.value.hint or "").encode()).rowcount == 10
    require_no_canaries(database, "fruit", read_pairs(database, "pair"))
