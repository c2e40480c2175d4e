"""Every committed row is found, whatever the graph of the index reaches.

The index here is as poor as pgvector builds one (m 2, ef_construction 4): it misses many rows, on every version of PostgreSQL.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import psycopg
import pytest

from embedline.client.build_index import PsycopgClient, build
from generated_names import PAGE
from support import AS_THE_PLANNER_LIKES, TO_THE_INDEX, create_pipeline, drain, scalar
from working import dsn_of

ROWS = 3_000
SUBJECT = """
    index table row vacuum lock transaction query planner buffer page cache log replica slot checkpoint commit
    rollback trigger function schema role grant column type array json key constraint view sequence partition
    tablespace backup restore archive stream worker process memory disk sort hash join scan filter aggregate
    window
"""
# Sentences on other subjects, each with a question about it in other words.
OFF_TOPIC = {
    900_001: ("Simmer the onions in butter before you add the tomatoes.", "cooking vegetables in butter"),
    900_002: ("The violinist played a sonata by Brahms.", "which music did the violinist play"),
    900_003: ("Tulips and daffodils bloom in the garden in April.", "spring flowers of the garden"),
    900_004: ("The striker scored twice in the football final.", "who scored in the football match"),
    900_005: ("Penguins breed on the ice of Antarctica.", "birds of the Antarctic ice"),
    900_006: ("The knight rode to the castle of the king.", "a medieval knight and his king"),
    900_007: ("Knit two rows of wool for the scarf.", "knitting a wool scarf"),
    900_008: ("The sailors hoisted the mainsail in the storm.", "sailing through a storm"),
}


@pytest.fixture(scope="module")
def poor_index(module_database: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A pipeline over short texts with a poor index; the planner is kept from ranking so few rows exactly."""
    connection = module_database
    connection.execute("CREATE TABLE page (id integer PRIMARY KEY, body text, lang text)")
    chosen, words = random.Random(5), SUBJECT.split()
    texts = [" ".join(chosen.sample(words, 7)) for _ in range(ROWS)]
    with connection.cursor().copy("COPY page (id, body, lang) FROM STDIN") as copy:
        for number, text in enumerate(texts):
            copy.write_row((number, text, "en" if number % 4 else "de"))
    create_pipeline(connection, content="body", index_options='{"m": 2, "ef_construction": 4}')
    drain(connection)
    assert build(PsycopgClient(connection), "page") is not None
    connection.execute(f"ANALYZE page, {PAGE('chunk')}, {PAGE.version(1)}")
    connection.execute(TO_THE_INDEX)
    yield connection
    connection.execute(AS_THE_PLANNER_LIKES)


@pytest.fixture
def off_topic(poor_index: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """The sentences, embedded and not checked yet."""
    poor_index.execute(f"DELETE FROM {PAGE.version(1, 'exact')}; DELETE FROM embedline.index_reach")
    for key, (sentence, _) in OFF_TOPIC.items():
        poor_index.execute("INSERT INTO page VALUES (%s, %s, 'en')", (key, sentence))
    # As the worker's own write does, and no more: the check is a step of its own.
    while scalar(poor_index, "SELECT count(*) FROM page_embedding WHERE id > 900000") < len(OFF_TOPIC):
        poor_index.execute("SELECT embed_pending(1000)")
    poor_index.execute(f"DELETE FROM {PAGE.version(1, 'exact')}; DELETE FROM embedline.index_reach")
    yield poor_index
    poor_index.execute("DELETE FROM page WHERE id > 900000")


def _found(connection: psycopg.Connection) -> list[int]:
    """Return the sentences that a question about each finds among the first three."""
    search = "SELECT key::integer FROM embedline.search('page', %s, 3)"
    return [
        key
        for key, (_, question) in OFF_TOPIC.items()
        if key in [row[0] for row in connection.execute(search, (question,))]
    ]


def _found_by_index_alone(connection: psycopg.Connection) -> list[int]:
    """Return the same for a plain statement over the table of the vectors, at pgvector's own settings."""
    statement = f"""
        SELECT c.key_id FROM {PAGE("chunk")} AS c JOIN (
            SELECT chunk_id FROM {PAGE.version(1)} ORDER BY embedding_v1 <=> %s::vector LIMIT 3) AS v USING (chunk_id)
    """
    found = []
    for key, (_, question) in OFF_TOPIC.items():
        vector = scalar(connection, "SELECT embedline.embed_query('page', %s)::text", (question,))
        if key in [row[0] for row in connection.execute(statement, (vector,))]:
            found.append(key)
    return found


def _check_all(connection: psycopg.Connection) -> None:
    """Let embed_pending look at the new rows, as it does after each of its runs."""
    for _ in range(50):
        connection.execute("SELECT embed_pending(1000)")
        reach = f"SELECT checked_to >= (SELECT max(chunk_id) FROM {PAGE.version(1)}) FROM embedline.index_reach"
        if scalar(connection, reach):
            return
    raise AssertionError("the check does not come to an end")


def test_the_index_alone_misses_what_it_should_miss_here(off_topic: psycopg.Connection) -> None:
    assert len(_found_by_index_alone(off_topic)) < len(OFF_TOPIC)


def test_a_new_row_is_found_at_once_whatever_the_index_reaches(off_topic: psycopg.Connection) -> None:
    assert _found(off_topic) == list(OFF_TOPIC)


def test_rows_far_from_all_others_are_found_after_the_check(off_topic: psycopg.Connection) -> None:
    _check_all(off_topic)
    kept = f"SELECT count(*) FROM {PAGE.version(1, 'exact')} AS e JOIN {PAGE('chunk')} AS c USING (chunk_id)"
    assert scalar(off_topic, f"{kept} WHERE c.key_id > 900000") == len(OFF_TOPIC)
    # A share of the rows, not all of them.
    assert scalar(off_topic, kept) < 0.15 * ROWS
    assert _found(off_topic) == list(OFF_TOPIC)


def test_a_deleted_row_leaves_the_rows_ranked_exactly(off_topic: psycopg.Connection) -> None:
    _check_all(off_topic)
    off_topic.execute("DELETE FROM page WHERE id > 900000")
    assert _found(off_topic) == []
    off_topic.execute("SELECT embed_pending(1)")
    gone = f"NOT EXISTS (SELECT FROM {PAGE.version(1)} AS v WHERE v.chunk_id = e.chunk_id)"
    assert scalar(off_topic, f"SELECT count(*) FROM {PAGE.version(1, 'exact')} AS e WHERE {gone}") == 0


def test_a_writer_that_is_under_way_holds_up_the_check(off_topic: psycopg.Connection) -> None:
    with psycopg.connect(dsn_of(off_topic)) as writer:
        writer.execute(f"LOCK TABLE {PAGE.version(1)} IN ROW EXCLUSIVE MODE")
        for _ in range(5):
            off_topic.execute("SELECT embed_pending(1)")
        assert scalar(off_topic, "SELECT checked_to FROM embedline.index_reach") == 0
        assert _found(off_topic) == list(OFF_TOPIC)
    _check_all(off_topic)


def test_a_check_goes_on_in_a_later_transaction(off_topic: psycopg.Connection) -> None:
    with off_topic.transaction():
        for _ in range(4):
            off_topic.execute("SELECT embed_pending(1)")
        assert scalar(off_topic, "SELECT pending_to > 0 AND checked_to = 0 FROM embedline.index_reach")
    _check_all(off_topic)


def test_a_vector_that_is_written_behind_the_check_is_ranked_exactly(off_topic: psycopg.Connection) -> None:
    _check_all(off_topic)
    off_topic.execute(f"DELETE FROM {PAGE.version(1, 'exact')}")
    off_topic.execute(
        """
        CREATE OR REPLACE FUNCTION test_keep_late(chunk_ids bigint[]) RETURNS void LANGUAGE plpython3u AS $python$
            from embedline.catalog import load as catalog
            from embedline.search import exact_rows
            from embedline.postgres.session import Session
            session = Session(plpy, GD)
            exact_rows.keep_late(session, catalog.load_pipeline(session, "page"), chunk_ids)
        $python$
        """
    )
    late = f"SELECT array_agg(chunk_id) FROM {PAGE('chunk')} WHERE key_id > 900000 OR key_id < 20"
    off_topic.execute(f"SELECT test_keep_late(({late}))")
    waiting = f"SELECT count(*) FROM {PAGE.version(1, 'exact')} WHERE similarity IS NULL"
    assert scalar(off_topic, waiting) == len(OFF_TOPIC) + 20
    assert _found(off_topic) == list(OFF_TOPIC)
    _check_all(off_topic)
    off_topic.execute("SELECT embed_pending(1)")
    assert scalar(off_topic, waiting) == 0
    # Only those stay that are far from the others.
    assert len(OFF_TOPIC) <= scalar(off_topic, f"SELECT count(*) FROM {PAGE.version(1, 'exact')}") < len(OFF_TOPIC) + 20
    assert _found(off_topic) == list(OFF_TOPIC)


def test_verify_finds_rows_that_search_does_not_reach(off_topic: psycopg.Connection) -> None:
    _check_all(off_topic)
    off_topic.execute(f"DELETE FROM {PAGE.version(1, 'exact')}")
    verify = "SELECT count, repaired FROM embedline.verify('page', %s, 0) WHERE finding = 'unreachable'"
    reported = off_topic.execute(verify, (False,)).fetchone()
    assert reported is not None
    assert reported[0] > 0
    assert reported[1] == 0
    assert scalar(off_topic, f"SELECT count(*) FROM {PAGE.version(1, 'exact')}") == 0
    repaired = off_topic.execute(verify, (True,)).fetchone()
    assert repaired is not None
    assert repaired[0] == repaired[1] > 0
    unreached = f"SELECT count(*) FROM {PAGE.version(1, 'exact')} WHERE similarity = '-Infinity'"
    assert scalar(off_topic, unreached) == repaired[0]


def test_doctor_names_rows_that_search_does_not_reach(off_topic: psycopg.Connection) -> None:
    _check_all(off_topic)
    off_topic.execute(f"DELETE FROM {PAGE.version(1, 'exact')}")
    off_topic.execute("SELECT count(*) FROM embedline.verify('page', false, 0)")
    with psycopg.connect(dsn_of(off_topic), autocommit=True) as connection:
        doctor = "SELECT severity, remedy FROM embedline.doctor() WHERE finding = 'vectors_unreachable'"
        alert = "SELECT severity, remedy FROM embedline.alert WHERE alert = 'vectors_unreachable'"
        remedy = "SELECT * FROM embedline.verify('page', repair => true);"
        assert connection.execute(doctor).fetchall() == connection.execute(alert).fetchall() == [("warning", remedy)]
        connection.execute(remedy)
        assert connection.execute(doctor).fetchall() == connection.execute(alert).fetchall() == []


def test_measuring_chooses_an_ef_search_and_shows_it(poor_index: psycopg.Connection) -> None:
    poor_index.execute("SELECT count(*) FROM embedline.verify('page', true, 0)")
    measured = poor_index.execute(
        "SELECT ef_search, recall, measures FROM embedline.index_reach WHERE measured_at IS NOT NULL"
    ).fetchone()
    assert measured is not None
    assert 40 <= measured[0] <= 1000
    assert set(measured[2]) == {"stored", "off_centre"}
    assert sum(kind["queries"] for kind in measured[2].values()) >= 200
    shown = poor_index.execute(
        "SELECT ef_search, index_recall FROM embedline.versions WHERE pipeline = 'page'"
    ).fetchone()
    assert shown == (measured[0], measured[1])


@pytest.mark.parametrize(
    ("where", "limit", "offset"),
    [("true", 100, 0), ("true", 20, 150), ("lang = 'de'", 20, 0), ("lang = 'de'", 100, 50)],
)
def test_the_routing_view_gives_as_many_rows_as_asked_for(
    poor_index: psycopg.Connection, where: str, limit: int, offset: int
) -> None:
    view = (
        f"SELECT id FROM page_embedding WHERE {where} ORDER BY embedding <=> (SELECT embedline.embed_query('page', %s))"
    )
    rows = poor_index.execute(f"{view} LIMIT {limit} OFFSET {offset}", ("lock of a row",)).fetchall()
    assert len(rows) == limit
    # Not beyond the statement.
    assert scalar(poor_index, "SELECT current_setting('hnsw.iterative_scan')") == "off"


def test_settings_of_the_session_stay(poor_index: psycopg.Connection) -> None:
    with poor_index.transaction():
        poor_index.execute("SET LOCAL hnsw.ef_search = 7; SET LOCAL hnsw.iterative_scan = relaxed_order")
        poor_index.execute("SELECT embedline.embed_query('page', 'lock')")
        assert scalar(poor_index, "SELECT current_setting('hnsw.ef_search')") == "7"
        assert scalar(poor_index, "SELECT current_setting('hnsw.iterative_scan')") == "relaxed_order"


def test_rows_that_score_alike_come_in_the_order_of_their_keys(poor_index: psycopg.Connection) -> None:
    poor_index.execute(
        "INSERT INTO page SELECT n, 'seven grey geese', 'en' FROM generate_series(800008, 800001, -1) AS n"
    )
    try:
        drain(poor_index)
        search = "SELECT key::integer FROM embedline.search('page', 'seven grey geese', 5)"
        assert [row[0] for row in poor_index.execute(search)] == [800_001, 800_002, 800_003, 800_004, 800_005]
    finally:
        poor_index.execute("DELETE FROM page WHERE id > 800000")
