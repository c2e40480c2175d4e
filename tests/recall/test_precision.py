"""Each precision index is used through a version's view and through the routing view, and finds what exact search finds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import psycopg
import pytest

from embedline.client import build_index
from embedline.core.retrieval_metrics import recall_at_k
from embedline.core.vectors import copy_binary, normalise
from generated_names import PAGE
from support import create_pipeline, scalar, settle

ROWS, DIMENSIONS, QUERIES, K = 8_000, 256, 20, 10
# (kind, dimensions, oversampling): (name, what recall@10 must not fall below); random directions are hard on signs and prefixes.
SHAPES = {
    ("halfvec", None, 2): ("halfvec", 0.95),
    ("binary", None, 20): ("binary", 0.85),
    ("prefix", 128, 20): ("prefix_128", 0.85),
}
# As embedline.search runs it, with the plan and the rows.
RANKING = """
    CREATE FUNCTION test_ranking(number integer, precision_name text, of_routing_view boolean, alone boolean)
    RETURNS TABLE (statement text, ef integer, bytes bigint)
    LANGUAGE plpython3u AS $python$
        from embedline.catalog import load as catalog
        from embedline.indexes import precision
        from embedline.indexes import definitions as vector_index
        from embedline.postgres.session import Session
        session = Session(plpy, GD)
        pipeline = catalog.load_version(session, "page", number)
        index = vector_index.find_index(session, pipeline, precision_name)
        oid = pipeline.view_oid if of_routing_view else pipeline.version.view_oid
        view = session.scalar("SELECT $1::oid::regclass::text", ["bigint"], oid)
        relation, embedding = (pipeline.vectors, pipeline.version.column) if alone else (view, "embedding")
        shown = {"key": "e.chunk_id::text", "chunk": "NULL::text"}
        rows = precision.RankedRelation(f"{relation} AS e", f"e.{embedding}", shown)
        ranked = precision.ranked_rows(session, pipeline, index, rows, 10)
        statement = f"SELECT key, chunk, 1 - distance AS score FROM ({ranked}) AS n ORDER BY distance"
        size = {c.name: c.bytes for c in precision.candidates(session, pipeline)}[precision_name]
        return [(statement, precision.ef_search(index, 10), size)]
    $python$
"""


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Clustered unit vectors whose first dimensions carry the most, as those of a Matryoshka model do."""
    random = np.random.default_rng(7)
    weight = np.linspace(1.5, 0.5, DIMENSIONS)
    centres = random.normal(size=(100, DIMENSIONS)) * weight
    members = centres[random.integers(0, 100, ROWS)] + 0.6 * random.normal(size=(ROWS, DIMENSIONS)) * weight
    return normalise(members.astype(np.float32))


@pytest.fixture(scope="module", params=["vector", "halfvec"])
def filled(module_database: psycopg.Connection, vectors: np.ndarray, request: pytest.FixtureRequest) -> Iterator[str]:
    """A pipeline of this column type with all precision indexes that it can have; its distance is the cosine."""
    connection, column_type = module_database, str(request.param)
    connection.prepare_threshold = None
    connection.execute("DROP TABLE IF EXISTS page; CREATE TABLE page (id integer PRIMARY KEY, body text)")
    create_pipeline(connection, content="body", column_type=column_type)
    settle(connection)
    connection.execute("ALTER TABLE page DISABLE TRIGGER USER")
    connection.execute("INSERT INTO page SELECT n, 'body ' || n FROM generate_series(0, %s) AS n", (ROWS - 1,))
    connection.execute(
        f"INSERT INTO {PAGE('chunk')} (chunk_id, key_id, seq, start_offset, end_offset, content_hash, content)"
        " SELECT id, id, 0, 0, length(body), md5(body)::uuid, body FROM page"
    )
    with connection.cursor().copy(f"COPY {PAGE.version(1)} FROM STDIN WITH (FORMAT binary)") as copy:
        copy.write(copy_binary(np.arange(ROWS, dtype=np.int64), vectors, column_type))
    client = build_index.PsycopgClient(connection)
    assert build_index.build(client, "page") is not None
    for (kind, dimensions, oversampling), (name, _) in SHAPES.items():
        if kind == column_type:
            continue
        add = "SELECT embedline.add_precision_index('page', 1, %s, %s, %s)"
        assert scalar(connection, add, (kind, dimensions, oversampling)) == name
        assert build_index.build(client, "page", 1, name) is not None
    connection.execute(f"ANALYZE page, {PAGE('chunk')}, {PAGE.version(1)}")
    connection.execute(RANKING)
    yield column_type
    connection.execute("DROP FUNCTION test_ranking; SELECT embedline.drop_pipeline('page')")


def _prepare(connection: psycopg.Connection, name: str | None, view: str, column_type: str) -> int:
    """Prepare statement `ranking`, set what search sets, return the index's size."""
    call = "SELECT statement, ef, bytes FROM test_ranking(1, %s, %s, %s)"
    row = connection.execute(call, (name, view == "routing view", view == "table")).fetchone()
    assert row is not None
    connection.execute(f"SET hnsw.ef_search = {row[1]}; SET hnsw.iterative_scan = strict_order")
    connection.execute("DEALLOCATE PREPARE ALL")
    connection.execute(f"PREPARE ranking ({column_type}) AS {row[0]}")
    return int(row[2])


@pytest.mark.parametrize("view", ["version's view", "routing view", "table"])
@pytest.mark.parametrize("name", [None, "halfvec", "binary", "prefix_128"])
def test_the_plan_uses_the_index(
    module_database: psycopg.Connection, filled: str, vectors: np.ndarray, name: str | None, view: str
) -> None:
    if name == filled:
        pytest.skip("the column is of that type itself")
    _prepare(module_database, name, view, filled)
    # From the sixth execution on the planner may take a generic plan.
    for _ in range(7):
        plan = json.dumps(scalar(module_database, f"EXPLAIN (FORMAT json) EXECUTE ranking ('{vectors[0].tolist()}')"))
        assert f"page_v1_{name or 'embedding'}_idx" in plan
        assert "Seq Scan" not in plan
        assert "Hash Join" not in plan


@pytest.mark.parametrize("name", ["halfvec", "binary", "prefix_128"])
def test_a_precision_index_is_smaller_and_finds_nearly_as_much(
    module_database: psycopg.Connection, filled: str, vectors: np.ndarray, name: str
) -> None:
    if name == filled:
        pytest.skip("the column is of that type itself")
    own = _prepare(module_database, None, "version's view", filled)
    assert _prepare(module_database, name, "version's view", filled) < (0.75 if name != "binary" else 0.5) * own
    random = np.random.default_rng(11)
    chosen = vectors[random.integers(0, ROWS, QUERIES)] + 0.02 * random.normal(size=(QUERIES, DIMENSIONS))
    recalls = []
    for query in normalise(chosen.astype(np.float32)):
        rows = module_database.execute(f"EXECUTE ranking ('{query.tolist()}')").fetchall()
        scores = [score for _, _, score in rows]
        assert scores == sorted(scores, reverse=True)
        similarity = vectors @ query
        # Ranked by the whole vectors: the score is that of exact search.
        assert np.allclose(scores, similarity[[int(key) for key, _, _ in rows]], atol=2e-3)
        exact = np.argsort(-similarity, kind="stable")[:K]
        recalls.append(recall_at_k([int(key) for key, _, _ in rows], exact.tolist(), K))
    assert np.mean(recalls) >= dict(SHAPES.values())[name], np.mean(recalls)
