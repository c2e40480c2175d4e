"""The keyword index: its ranking, its building, and who sees what."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from generated_names import PAGE, Generated
from support import create_pages, create_pipeline, data_count, drain, scalar, searching, settle, wait_until
from upgrading import add_version, cut_over, settle_versions
from working import working

TOPICS = ("rivers", "mountains", "databases", "violins", "bread", "rockets", "law")


@pytest.fixture
def page(database: psycopg.Connection) -> psycopg.Connection:
    """200 embedded rows with keywords."""
    create_pages(database, 200)
    create_pipeline(database, keyword="english", index_method="none")
    drain(database)
    return database


def _pack(connection: psycopg.Connection, pipeline: str = "page", least: int = 1) -> None:
    """Pack the entries of a pipeline, as a worker does once there are enough."""
    connection.execute(
        """
        CREATE OR REPLACE FUNCTION test_pack(name text, fewest integer) RETURNS void LANGUAGE plpython3u AS $python$
            from embedline.catalog.load import load_pipeline
            from embedline.keywords.segments import Packing
            from embedline.postgres.session import Session
            session = Session(plpy, GD)
            pipeline = load_pipeline(session, name)
            for chunk_set in (pipeline.chunk_set, *pipeline.other_sets):
                Packing(session, pipeline, chunk_set.number).pack(fewest)
        $python$
        """
    )
    connection.execute("SELECT test_pack(%s, %s)", (pipeline, least))


def _bm25(connection: psycopg.Connection, query: str, k: int) -> list[tuple[str, float]]:
    """Rank by the formula, from PostgreSQL's own words of the chunks."""
    rows = connection.execute(
        f"""
        SELECT c.key_id::text, u.lexeme, cardinality(u.positions)
        FROM {PAGE("chunk")} AS c CROSS JOIN unnest(to_tsvector('english', c.content)) AS u
        """
    ).fetchall()
    asked = dict(
        connection.execute(
            "SELECT lexeme, cardinality(positions) FROM unnest(to_tsvector('english', %s))", (query,)
        ).fetchall()
    )
    chunks: dict[str, Counter[str]] = {}
    for key, word, count in rows:
        chunks.setdefault(key, Counter())[word] += count
    mean = sum(sum(words.values()) for words in chunks.values()) / len(chunks)
    df = Counter(word for words in chunks.values() for word in words)
    scores = {}
    for key, words in chunks.items():
        saturation = 1.2 * (0.25 + 0.75 * sum(words.values()) / mean)
        scores[key] = sum(
            asked[word]
            * math.log(1 + (len(chunks) - df[word] + 0.5) / (df[word] + 0.5))
            * words[word]
            * 2.2
            / (words[word] + saturation)
            for word in asked
            if words[word]
        )
    ranked = sorted(((key, score) for key, score in scores.items() if score > 0), key=lambda pair: -pair[1])
    return ranked[:k]


@pytest.mark.parametrize("packed", [False, True], ids=["entries", "a segment"])
def test_keywords_rank_by_bm25(page: psycopg.Connection, packed: bool) -> None:
    page.execute("UPDATE page SET body = body || ' violins violins and more rivers' WHERE id IN (7, 9)")
    drain(page)
    if packed:
        _pack(page)
        assert data_count(page, "keyword_entry") == 0
    for query in ("violins", "number 17", "rivers and violins of title 9", "Databases databases"):
        found = searching(page, "page", query, 10, mode="keyword")
        expected = _bm25(page, query, 1000)
        assert len(found) == min(len(expected), 10)
        assert [row[2] for row in found] == pytest.approx([score for _, score in expected[:10]], abs=0.05)
        assert found[0][0] in {key for key, score in expected if score > expected[0][1] - 0.05}


def test_a_search_reads_segments_and_entries_together(page: psycopg.Connection) -> None:
    _pack(page)
    page.execute("INSERT INTO page (id, title, body) VALUES (900, 'New', 'zebras near rivers')")
    drain(page)
    assert (data_count(page, "keyword_segment"), data_count(page, "keyword_entry")) == (1, 1)
    assert [row[0] for row in searching(page, "page", "zebras", mode="keyword")] == ["900"]
    found = {row[0] for row in searching(page, "page", "rivers", 100, mode="keyword")}
    assert found == {row[0] for row in _bm25(page, "rivers", 100)}
    assert "900" in found


def test_a_change_is_seen_with_the_commit_of_its_chunks(page: psycopg.Connection, connect: Connect) -> None:
    other = connect()
    with page.transaction():
        page.execute("UPDATE page SET body = 'about zebras' WHERE id = 5")
        drain(page)
        assert [row[0] for row in searching(page, "page", "zebras", mode="keyword")] == ["5"]
        assert searching(other, "page", "zebras", mode="keyword") == []
    assert [row[0] for row in searching(other, "page", "zebras", mode="keyword")] == ["5"]
    page.execute("DELETE FROM page WHERE id = 5")
    assert searching(other, "page", "zebras", mode="keyword") == []


def test_what_a_packed_row_had_is_found_no_more(page: psycopg.Connection) -> None:
    _pack(page)
    before = {row[0] for row in searching(page, "page", "violins", 100, mode="keyword")}
    page.execute("UPDATE page SET body = 'nothing of that' WHERE id = 4")
    page.execute("DELETE FROM page WHERE id = 11")
    drain(page)
    found = {row[0] for row in searching(page, "page", "violins", 100, mode="keyword")}
    assert found == before - {"4", "11"}
    page.execute("TRUNCATE page")
    assert searching(page, "page", "violins", mode="keyword") == []


def test_hybrid_fuses_the_ranks_of_both_arms(page: psycopg.Connection) -> None:
    rows = page.execute(
        "SELECT key, score, semantic_rank, keyword_rank, chunk_start, chunk_end, chunk FROM"
        " embedline.search('page', 'violins number 25', 10, mode => 'hybrid', semantic_weight => 2, rrf_k => 10)"
    ).fetchall()
    vector = [row[0] for row in searching(page, "page", "violins number 25", 50)]
    keyword = [row[0] for row in searching(page, "page", "violins number 25", 50, mode="keyword")]
    assert rows
    for key, score, semantic, word, start, end, chunk in rows:
        assert semantic == (vector.index(key) + 1 if key in vector else None)
        assert word == (keyword.index(key) + 1 if key in keyword else None)
        expected = (2 / (10 + semantic) if semantic else 0) + (1 / (10 + word) if word else 0)
        assert score == pytest.approx(expected)
        assert end - start == len(chunk)
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)


@pytest.mark.parametrize("mode", ["vector", "keyword", "hybrid"])
def test_documents_are_grouped_after_the_ranking(database: psycopg.Connection, mode: str) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text)")
    database.execute(
        "INSERT INTO page SELECT g, repeat('The violin of row ' || g || ' is played. ', 40) FROM generate_series(1, 12) AS g"
    )
    create_pipeline(database, content="body", keyword="english", index_method="none", chunk_tokens=40)
    drain(database)
    assert data_count(database, "chunk") > 60
    found = searching(database, "page", "violin of row 3", 12, mode=mode, per_document=True)
    assert sorted(int(row[0]) for row in found) == list(range(1, 13))
    assert found[0][0] == "3" or mode == "vector"


def test_an_index_is_built_for_a_pipeline_that_exists(database: psycopg.Connection) -> None:
    create_pages(database, 600)
    create_pipeline(database, index_method="none")
    drain(database)
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="has no keyword index") as failed:
        searching(database, "page", "violins", mode="hybrid")
    assert "alter_pipeline('page', keyword => 'english')" in (failed.value.diag.message_hint or "")
    told: list[str] = []
    database.add_notice_handler(lambda notice: told.append(notice.message_primary or ""))
    database.execute("SELECT embedline.alter_pipeline('page', keyword => 'english')")
    assert told == []
    database.execute("UPDATE page SET body = 'about zebras' WHERE id = 5")
    drain(database)
    if scalar(database, "SELECT count(*) FROM embedline.progress WHERE task = 'keywords'"):
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="is not complete"):
            searching(database, "page", "violins", mode="keyword")
    with working(database):
        wait_until(
            lambda: scalar(database, "SELECT count(*) FROM embedline.keyword_build WHERE built_to < build_to") == 0
        )
    assert [row[0] for row in searching(database, "page", "zebras", mode="keyword")] == ["5"]
    found = {row[0] for row in searching(database, "page", "violins", 600, mode="keyword")}
    assert found == {row[0] for row in _bm25(database, "violins", 600)}
    assert scalar(database, "SELECT count(*) FROM embedline.verify('page') WHERE finding = 'missing_keywords'") == 0


def test_another_configuration_replaces_the_index_and_none_removes_it(page: psycopg.Connection) -> None:
    assert searching(page, "page", "violin", mode="keyword")
    page.execute("SELECT embedline.alter_pipeline('page', keyword => 'simple')")
    with working(page):
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.keyword_build WHERE built_to < build_to") == 0)
    assert searching(page, "page", "violin", mode="keyword") == []
    assert searching(page, "page", "violins", mode="keyword")
    page.execute("SELECT embedline.alter_pipeline('page', drop => '{keyword}')")
    assert (
        scalar(
            page,
            "SELECT count(*) FROM pg_class WHERE relname LIKE '%keyword%' AND relnamespace = 'embedline_data'::regnamespace",
        )
        == 0
    )
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        searching(page, "page", "violins", mode="keyword")


def test_a_configuration_must_exist_and_stays_while_it_is_used(database: psycopg.Connection) -> None:
    create_pages(database, 3)
    for name in ("klingon", "no.such.thing", "'; DROP TABLE page; --"):
        with pytest.raises(psycopg.Error, match=r"text search configuration|not a valid identifier"):
            create_pipeline(database, keyword=name)
    database.execute('CREATE TEXT SEARCH CONFIGURATION "My words" (COPY = english)')
    create_pipeline(database, keyword='"My words"')
    drain(database)
    with pytest.raises(errors.DependentObjectsStillExist):
        database.execute('DROP TEXT SEARCH CONFIGURATION "My words"')
    database.execute('ALTER TEXT SEARCH CONFIGURATION "My words" RENAME TO words')
    assert searching(database, "page", "titles", mode="keyword")
    drain(database)
    database.execute("INSERT INTO page (id, title, body) VALUES (9, 'Nine', 'zebras')")
    drain(database)
    assert [row[0] for row in searching(database, "page", "zebra", mode="keyword")] == ["9"]


@pytest.mark.parametrize("mode", ["vector", "keyword", "hybrid"])
def test_policies_hide_rows_in_every_mode(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole, mode: str
) -> None:
    reader = make_role("embedline_reader")
    page.execute(f"GRANT SELECT ON page TO {reader}")
    page.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    page.execute(f"CREATE POLICY mine ON page TO {reader} USING (id % 50 = 0)")
    for packed in (False, True):
        if packed:
            _pack(page)
        found = searching(connect(reader), "page", "Body number about violins", 10, mode=mode)
        assert {int(row[0]) for row in found} == {50, 100, 150, 200}


def test_a_chunk_that_is_too_large_for_a_tsvector_is_written(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, body text)")
    create_pipeline(database, content="body", keyword="english", chunking="none", index_method="none")
    words = " ".join(f"w{number:x}" for number in range(300_000))
    database.execute("INSERT INTO page VALUES (1, %s), (2, %s), (3, 'zebra')", (f"zebra {words}", "x" * 5000))
    drain(database)
    assert data_count(database, "chunk") == data_count(database, "keyword_entry")
    assert "3" in {row[0] for row in searching(database, "page", "zebra", mode="keyword")}


def test_a_composite_key_and_a_new_chunk_set_have_keywords(database: psycopg.Connection) -> None:
    database.execute("CREATE TABLE page (shelf integer, id text, body text, PRIMARY KEY (shelf, id))")
    database.execute(
        "INSERT INTO page SELECT g % 3, 'n,' || g, repeat('The zebra of row ' || g || '. ', 30) FROM generate_series(1, 20) AS g"
    )
    create_pipeline(database, content="body", keyword="english", index_method="none")
    drain(database)
    assert searching(database, "page", "zebra 7", 1, mode="keyword")[0][0] == '["1", "n,7"]'
    number = add_version(database, "static-256", chunk_tokens=30)
    settle_versions(database)
    assert data_count(database, "keyword_2_entry") == data_count(database, "chunk_2") > 20
    cut_over(database, number)
    assert searching(database, "page", "zebra 7", 1, mode="hybrid")[0][0] == '["1", "n,7"]'
    database.execute("SELECT embedline.drop_embedding_version('page', 1, rollback_window => '0')")
    tables = scalar(database, "SELECT count(*) FROM pg_class WHERE relname ~ '^page_keyword' AND relkind = 'r'")
    assert tables == 3
    database.execute("SELECT embedline.drop_pipeline('page')")
    assert scalar(database, "SELECT count(*) FROM pg_class WHERE relname ~ '^page_keyword'") == 0


def test_a_repeatable_read_transaction_embeds_beside_a_packing(page: psycopg.Connection, connect: Connect) -> None:
    other = connect()
    other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    assert scalar(other, "SELECT count(*) FROM page") == 200
    _pack(page)
    other.execute("INSERT INTO page (id, title, body) VALUES (901, 'New', 'zebras')")
    drain(other)
    other.execute("COMMIT")
    assert [row[0] for row in searching(page, "page", "zebras", mode="keyword")] == ["901"]


def test_no_writer_waits_for_a_packing(page: psycopg.Connection, connect: Connect) -> None:
    other = connect()
    other.execute("SET lock_timeout = '5s'")
    with page.transaction():
        _pack(page)
        other.execute("UPDATE page SET body = 'about zebras' WHERE id = 5")
        other.execute("INSERT INTO page (id, title, body) VALUES (903, 'New', 'zebras')")
        drain(other)
        assert {row[0] for row in searching(other, "page", "zebras", mode="keyword")} == {"5", "903"}
    assert {row[0] for row in searching(page, "page", "zebras", mode="keyword")} == {"5", "903"}
    assert "5" not in {row[0] for row in searching(page, "page", "bread", 100, mode="keyword")}


def test_a_new_owner_of_the_source_searches_by_keywords(
    page: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    owner = make_role()
    page.execute(f"GRANT USAGE ON SCHEMA embedline TO {owner}")
    page.execute(f"ALTER TABLE page OWNER TO {owner}")
    drain(page)
    page.execute("SELECT embedline.refresh_pipeline('page')")
    page.execute(f"GRANT embedline_reader TO {owner}")
    assert searching(connect(owner), "page", "violins", mode="hybrid")
    tables = scalar(
        page,
        "SELECT count(*) FROM pg_class WHERE relname ~ '^page_keyword_(entry|segment|page)$'"
        " AND has_table_privilege(%s, oid, 'SELECT')",
        (owner,),
    )
    assert tables == 3


def test_other_keywords_end_a_mode_that_was_set(page: psycopg.Connection) -> None:
    page.execute("SELECT embedline.use_mode('page', 'hybrid', override_reason => 'a trial')")
    page.execute("SELECT embedline.alter_pipeline('page', keyword => 'simple')")
    assert searching(page, "page", "violins") == searching(page, "page", "violins", mode="vector")


def test_verify_finds_and_mends_what_the_index_lacks(page: psycopg.Connection) -> None:
    _pack(page)
    page.execute("INSERT INTO page (id, title, body) VALUES (902, 'New', 'zebras')")
    drain(page)
    page.execute(f"DELETE FROM {PAGE('keyword_entry')}")
    assert searching(page, "page", "zebras", mode="keyword") == []
    query = "SELECT count, repaired FROM embedline.verify('page', repair => %s) WHERE finding = 'missing_keywords'"
    assert page.execute(query, (False,)).fetchall() == [(1, 0)]
    assert page.execute(query, (True,)).fetchall() == [(1, 1)]
    assert [row[0] for row in searching(page, "page", "zebras", mode="keyword")] == ["902"]
    assert page.execute(query, (False,)).fetchall() == []


def test_segments_whose_rows_are_gone_are_packed_again(page: psycopg.Connection) -> None:
    _pack(page)
    page.execute("DELETE FROM page WHERE id > 50")
    settle(page)
    wait_until(lambda: (drain(page), data_count(page, "chunk"))[1] == 50)
    page.execute("SELECT count(*) FROM embedline.verify('page', repair => true)")
    assert scalar(page, f"SELECT sum(chunk_count) FROM {PAGE('keyword_segment')}") == 50
    found = searching(page, "page", "violins", 100, mode="keyword")
    assert [row[2] for row in found] == pytest.approx([score for _, score in _bm25(page, "violins", 100)], abs=0.05)


def test_small_segments_are_merged(page: psycopg.Connection) -> None:
    for number in range(20):
        page.execute(
            "INSERT INTO page (id, title, body) SELECT g, 'More', 'zebra ' || g FROM generate_series(%s::int, %s) AS g",
            (1000 + number * 20, 1019 + number * 20),
        )
        drain(page)
        _pack(page)
        assert data_count(page, "keyword_segment") <= 8
    found = searching(page, "page", "zebra 1100", 500, mode="keyword")
    assert len(found) == 400
    assert found[0][0] == "1100"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fulltext"}, "mode"),
        ({"semantic_weight": -1.0}, "semantic_weight"),
        ({"semantic_weight": 0.0, "keyword_weight": 0.0}, "cannot both be 0"),
        ({"rrf_k": 0}, "rrf_k"),
        ({"window_size": 3}, "window_size"),
        ({"filter": "id = 1; DROP TABLE page"}, "semicolon"),
        ({"filter": "id = 1) OR (true"}, "parentheses"),
        ({"filter": "id = 1 -- "}, "comment"),
        ({"filter": ""}, "empty"),
    ],
)
def test_bad_parameters_are_refused(page: psycopg.Connection, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.InvalidParameterValue, match=message):
        searching(page, "page", "violins", 10, **options)


def test_words_of_no_chunk_and_stop_words_find_nothing(page: psycopg.Connection) -> None:
    for query in ("xyzzy", "the of and", "!?", "…"):
        assert searching(page, "page", query, mode="keyword") == []
    assert searching(page, "page", "the violins", mode="hybrid")


def test_the_mode_of_a_version_is_set_by_its_evaluation(page: psycopg.Connection) -> None:
    page.execute("CREATE TABLE canary (query text, key text)")
    page.execute("INSERT INTO canary SELECT 'number ' || id, id::text FROM page")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no passing evaluation"):
        page.execute("SELECT embedline.use_mode('page', 'keyword')")
    with pytest.raises(errors.InvalidParameterValue, match="labelled queries"):
        page.execute("SELECT embedline.evaluate('page', 1, mode => 'keyword')")
    query = "SELECT verdict FROM embedline.evaluate('page', 1, canaries => 'canary', mode => 'keyword') WHERE measure = 'verdict'"
    assert scalar(page, query) == "pass"
    page.execute("SELECT embedline.use_mode('page', 'keyword')")
    assert searching(page, "page", "number 77") == searching(page, "page", "number 77", mode="keyword")
    # The evidence is of that mode and of these keywords alone.
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        page.execute("SELECT embedline.use_mode('page', 'hybrid')")
    page.execute("SELECT embedline.use_mode('page', 'hybrid', override_reason => 'a trial')")
    page.execute("SELECT embedline.use_mode('page', 'vector')")
    assert searching(page, "page", "number 77") == searching(page, "page", "number 77", mode="vector")
    assert scalar(page, "SELECT count(*) FROM embedline._gate(1)") == 0


def test_dropping_a_pipeline_with_the_longest_name_leaves_nothing(database: psycopg.Connection) -> None:
    name = "a" * 40
    create_pages(database, 3)
    create_pipeline(database, name, keyword="english")
    drain(database)
    add_version(database, "static-256", name, chunk_tokens=30)
    settle_versions(database)
    assert searching(database, name, "title", mode="keyword")
    assert Generated(name)("keyword_2_segment")
    database.execute("SELECT embedline.drop_pipeline(%s)", (name,))
    assert scalar(database, "SELECT count(*) FROM pg_class WHERE relname ~ '^aaaa'") == 0
