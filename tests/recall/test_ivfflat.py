"""IVFFlat as a version's index: its lists, its probes, and what searches find."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from embedline.client.build_index import PsycopgClient, build
from generated_names import PAGE
from support import AS_THE_PLANNER_LIKES, TO_THE_INDEX, create_pages, create_pipeline, drain, scalar, wait_until
from working import dsn_of

Connect = Callable[..., psycopg.Connection]
MakeRole = Callable[..., str]
ROWS, LISTS = 3_000, 40
SUBJECT = """
    index table row vacuum lock transaction query planner buffer page cache log replica slot checkpoint commit
    rollback trigger function schema role grant column type array json key constraint view sequence partition
    tablespace backup restore archive stream worker process memory disk sort hash join scan filter aggregate
"""
_RANK = """
    CREATE FUNCTION test_rank(query text, k integer, how text) RETURNS SETOF text LANGUAGE plpython3u SET jit = off AS $python$
        from embedline.catalog.load import load_pipeline
        from embedline.postgres.session import Session
        from embedline.search.ranking import Ranker
        session = Session(plpy, GD)
        vector = session.scalar("SELECT embedline.embed_query('page', $1)", ["text"], query)
        return [row["key"] for row in Ranker(session, load_pipeline(session, "page")).nearest(vector, k, how=how)]
    $python$
"""


@pytest.fixture(scope="module")
def listed(module_database: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A pipeline with a measured IVFFlat index.

    The planner is kept from ranking so few rows exactly.
    """
    connection = module_database
    connection.execute("CREATE TABLE page (id integer PRIMARY KEY, body text, lang text)")
    chosen, words = random.Random(5), SUBJECT.split()
    with connection.cursor().copy("COPY page (id, body, lang) FROM STDIN") as copy:
        for number in range(ROWS):
            copy.write_row((number, " ".join(chosen.sample(words, 7)), "de" if number % 4 else "en"))
    create_pipeline(connection, content="body", index_method="ivfflat", index_options=json.dumps({"lists": LISTS}))
    drain(connection)
    statement = build(PsycopgClient(connection), "page")
    assert statement is not None
    assert " USING ivfflat " in statement
    assert statement.endswith(f"WITH (lists = {LISTS})")
    connection.execute(f"ANALYZE page, {PAGE('chunk')}, {PAGE.version(1)}")
    connection.execute("SELECT count(*) FROM embedline.verify('page', true, 0)")
    connection.execute(_RANK)
    connection.execute(TO_THE_INDEX)
    yield connection
    connection.execute(AS_THE_PLANNER_LIKES)


def _asked(connection: psycopg.Connection, query: str, k: int = 10) -> list[str]:
    return [row[0] for row in connection.execute("SELECT key FROM embedline.search('page', %s, %s)", (query, k))]


def _exactly(connection: psycopg.Connection, query: str, k: int = 10) -> list[str]:
    return [row[0] for row in connection.execute("SELECT test_rank(%s, %s, 'exact')", (query, k))]


def _queries(count: int) -> list[str]:
    chosen, words = random.Random(8), SUBJECT.split()
    return [" ".join(chosen.sample(words, 5)) for _ in range(count)]


def test_probes_are_measured_and_shown(listed: psycopg.Connection) -> None:
    found = listed.execute("SELECT probes, ef_search, index_recall, index_state FROM embedline.status").fetchone()
    assert found is not None
    probes, ef_search, recall, state = found
    assert 1 <= probes <= LISTS
    assert ef_search is None
    assert recall >= 0.98
    assert state == "valid"
    measured = scalar(listed, "SELECT measures FROM embedline.index_reach")
    assert set(measured) == {"stored", "off_centre"}
    assert all(1 <= kind["probes"] <= LISTS for kind in measured.values())


def test_a_search_probes_as_measured_and_finds_what_exact_ranking_finds(listed: psycopg.Connection) -> None:
    lines = listed.execute("SELECT chunk FROM embedline.search('page', 'vacuum the table', explain => true)").fetchall()
    plan = " ".join(line for (line,) in lines)
    assert "page_v1_embedding_idx" in plan
    hits = sum(len(set(_asked(listed, query)) & set(_exactly(listed, query))) for query in _queries(40))
    assert hits >= 0.97 * 400
    # pgvector's own setting, a single list, finds far fewer: the measured probes are what searches use.
    listed.execute("UPDATE embedline.index_reach SET probes = 1, wide_probes = 1")
    fewer = sum(len(set(_asked(listed, query)) & set(_exactly(listed, query))) for query in _queries(40))
    listed.execute("SELECT count(*) FROM embedline.verify('page', true, 0)")
    assert fewer < 0.9 * hits


def test_a_search_leaves_the_session_s_settings_as_they_were(listed: psycopg.Connection) -> None:
    with listed.transaction():
        listed.execute("SET LOCAL ivfflat.probes = 3")
        _asked(listed, "vacuum")
        assert scalar(listed, "SELECT current_setting('ivfflat.probes')") == "3"
        assert scalar(listed, "SELECT current_setting('ivfflat.iterative_scan')") == "off"
    with listed.transaction():
        listed.execute("SELECT embedline.embed_query('page', 'vacuum')")
        probes = scalar(listed, "SELECT probes FROM embedline.status")
        assert scalar(listed, "SELECT current_setting('ivfflat.probes')::integer") == probes
        assert scalar(listed, "SELECT current_setting('ivfflat.iterative_scan')") == "relaxed_order"


def test_ef_search_has_no_meaning_for_lists(listed: psycopg.Connection) -> None:
    query = "SELECT key FROM embedline.search('page', 'vacuum the table', ef_search => 1)"
    assert [row[0] for row in listed.execute(query)] == _asked(listed, "vacuum the table")


def test_policies_that_hide_rows_do_not_shorten_the_result(
    listed: psycopg.Connection, connect: Connect, make_role: MakeRole
) -> None:
    reader = make_role("embedline_reader")
    listed.execute(sql.SQL("GRANT SELECT ON page, page_embedding TO {}").format(sql.Identifier(reader)))
    listed.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY; CREATE POLICY chosen ON page USING (id % 50 = 0)")
    try:
        with psycopg.connect(dsn_of(listed), autocommit=True) as other:
            other.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(reader)))
            other.execute(TO_THE_INDEX)
            found = _asked(other, "vacuum the table")
            assert len(found) == 10
            assert all(int(key) % 50 == 0 for key in found)
    finally:
        listed.execute("DROP POLICY chosen ON page; ALTER TABLE page DISABLE ROW LEVEL SECURITY")
        listed.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(reader)))


def test_a_new_row_is_found_at_once(listed: psycopg.Connection) -> None:
    listed.execute("INSERT INTO page VALUES (900001, 'Penguins breed on the ice of Antarctica.', 'en')")
    drain(listed)
    assert _asked(listed, "birds of the Antarctic ice", 3)[0] == "900001"
    listed.execute("DELETE FROM page WHERE id = 900001")
    drain(listed)


def test_the_gate_measures_lists_with_the_probes_that_serve(listed: psycopg.Connection) -> None:
    listed.execute("UPDATE embedline.index_reach SET probes = 1, wide_probes = 1")
    with pytest.raises(psycopg.Error, match="probes of 40 lists have"):
        _fidelity(listed)
    listed.execute("SELECT count(*) FROM embedline.verify('page', true, 0)")
    assert _fidelity(listed) == "pass"


def _fidelity(connection: psycopg.Connection) -> str:
    """Return the verdict on the index; one that is no pass is raised with its detail."""
    connection.execute(
        """
        CREATE OR REPLACE FUNCTION test_fidelity() RETURNS text LANGUAGE plpython3u SET jit = off AS $python$
            from embedline.catalog.load import load_pipeline
            from embedline.gate import index_fidelity
            from embedline.postgres.session import Session
            from embedline.search.exact_rows import sample_vectors
            from embedline.search.query_batches import QueryVectors
            import numpy
            session = Session(plpy, GD)
            pipeline = load_pipeline(session, "page")
            vectors = sample_vectors(session, pipeline, 60)
            queries = vectors + numpy.roll(vectors, 1, axis=0)
            asked = QueryVectors(queries, numpy.ones(len(queries), bool))
            measured = index_fidelity.measure(session, pipeline, asked, 10, 0.97, 1)
            if measured.verdict != "pass":
                plpy.error(measured.detail)
            return measured.verdict
        $python$
        """
    )
    return str(scalar(connection, "SELECT test_fidelity()"))


def test_lists_follow_from_the_rows_when_the_index_is_built(database: psycopg.Connection) -> None:
    create_pages(database, 2)
    create_pipeline(database, content="body", index_method="ivfflat")
    statement = "SELECT embedline.index_statement('page')"
    assert scalar(database, statement).endswith("WITH (lists = 1)")
    drain(database)
    database.execute(
        f"INSERT INTO {PAGE('chunk')} (key_id, seq, content, start_offset, end_offset, content_hash)"
        " SELECT 1, 1 + n, '', 0, 0, gen_random_uuid() FROM generate_series(1, 3000) AS n;"
        f"INSERT INTO {PAGE.version(1)} SELECT c.chunk_id, v.embedding_v1 FROM {PAGE('chunk')} AS c"
        f" CROSS JOIN (SELECT embedding_v1 FROM {PAGE.version(1)} LIMIT 1) AS v WHERE c.content = ''"
    )
    assert scalar(database, statement).endswith("WITH (lists = 3)")


def test_options_of_another_method_are_not_inherited(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database, index_options='{"m": 24}')
    wait_until(lambda: _completed(database), 20, "the version is complete")
    add = "SELECT embedline.add_embedding_version('page', 'static-256', column_type => 'halfvec', index_method => 'ivfflat')"
    assert scalar(database, add) == 2
    chosen = "SELECT index_method, index_options FROM embedline.version WHERE number = 2"
    assert database.execute(chosen).fetchone() == ("ivfflat", {})
    wait_until(lambda: _completed(database), 20, "both versions are complete")
    assert build(PsycopgClient(database), "page", 2) is not None


def _completed(connection: psycopg.Connection) -> bool:
    connection.execute("SELECT embed_pending(1000)")
    return bool(scalar(connection, "SELECT bool_and(state = 'complete' AND missing = 0) FROM embedline.versions"))


def test_drifted_lists_raise_an_alert_with_the_statements_that_build_them_again(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database, index_method="ivfflat")
    wait_until(lambda: _completed(database), 20, "the version is complete")
    assert build(PsycopgClient(database), "page") is not None
    database.execute("SELECT embed_pending(1)")
    assert scalar(database, "SELECT built_rows FROM embedline.index_reach") >= 5
    alert = "SELECT message, remedy FROM embedline.alert WHERE alert = 'lists_drifted'"
    assert database.execute(alert).fetchone() is None
    database.execute(
        "UPDATE embedline.index_reach SET probes = 4, built_probes = 4, built_recall = 0.99, kept_recall = 0.9"
    )
    found = database.execute(alert).fetchone()
    assert found is not None
    message, remedy = found
    assert message == "recall@10 with 4 probes was 0.990 when the lists were built, and is 0.900"
    for statement in remedy.split("; "):
        database.execute(statement)
    database.execute("SELECT embed_pending(1)")
    assert database.execute(alert).fetchone() is None
    assert scalar(database, "SELECT probes IS NULL AND built_recall IS NULL FROM embedline.index_reach")
