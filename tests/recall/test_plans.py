"""The three plans of the routing view (design decision 2), and how much of the exact result HNSW finds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import psycopg
import pytest
from psycopg import sql

from embedline.core.retrieval_metrics import recall_at_k
from embedline.core.vectors import copy_binary, normalise
from generated_names import PAGE
from support import create_pipeline, scalar, settle

ROWS = 20_000
DIMENSIONS = 256
QUERIES = 20


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Clustered unit vectors: HNSW on uniform noise says nothing about text."""
    random = np.random.default_rng(7)
    centres = random.normal(size=(200, DIMENSIONS))
    members = centres[random.integers(0, 200, ROWS)] + 0.6 * random.normal(size=(ROWS, DIMENSIONS))
    return normalise(members.astype(np.float32))


@pytest.fixture(scope="module")
def filled(module_database: psycopg.Connection, vectors: np.ndarray) -> Iterator[psycopg.Connection]:
    """A pipeline whose chunks and vectors were put in directly; category has 4 values, rare marks 21 rows."""
    connection = module_database
    connection.execute("CREATE TABLE page (id integer PRIMARY KEY, body text, category integer, rare boolean)")
    create_pipeline(connection, content="body")
    settle(connection)
    connection.execute("ALTER TABLE page DISABLE TRIGGER USER")
    connection.execute(
        "INSERT INTO page SELECT n, 'body ' || n, n %% 4, n %% 950 = 0 FROM generate_series(0, %s) AS n", (ROWS - 1,)
    )
    connection.execute("CREATE INDEX ON page (rare) WHERE rare")
    connection.execute(
        f"INSERT INTO {PAGE('chunk')} (chunk_id, key_id, seq, start_offset, end_offset, content_hash, content)"
        " SELECT id, id, 0, 0, length(body), md5(body)::uuid, body FROM page"
    )
    with connection.cursor().copy(f"COPY {PAGE.version(1)} FROM STDIN WITH (FORMAT binary)") as copy:
        copy.write(copy_binary(np.arange(ROWS, dtype=np.int64), vectors, "vector"))
    connection.execute(scalar(connection, "SELECT embedline.index_statement('page')"))
    assert scalar(connection, "SELECT embedline.index_statement('page')") is None
    connection.execute(f"ANALYZE page, {PAGE('chunk')}, {PAGE.version(1)}")
    yield connection


def _query(where: str) -> sql.Composed:
    return sql.SQL("SELECT id FROM page_embedding WHERE {} ORDER BY embedding <=> %s::vector LIMIT 10").format(
        sql.SQL(where)
    )


def _plan(connection: psycopg.Connection, where: str, vector: np.ndarray) -> str:
    with connection.transaction():
        connection.execute("SET LOCAL hnsw.iterative_scan = strict_order")
        statement = sql.SQL("EXPLAIN (FORMAT json) ") + _query(where)
        return json.dumps(scalar(connection, statement, (str(vector.tolist()),)))


def test_the_ten_nearest_of_all_use_the_index_and_nested_loops(filled: psycopg.Connection, vectors: np.ndarray) -> None:
    plan = _plan(filled, "true", vectors[0])
    assert "page_v1_embedding_idx" in plan
    assert "Nested Loop" in plan
    assert "Hash Join" not in plan
    assert '"Sort"' not in plan


def test_a_selective_filter_is_searched_exactly(filled: psycopg.Connection, vectors: np.ndarray) -> None:
    plan = _plan(filled, "rare", vectors[0])
    assert "page_v1_embedding_idx" not in plan
    assert '"Sort"' in plan


def test_a_filter_that_keeps_a_quarter_uses_the_iterative_scan(filled: psycopg.Connection, vectors: np.ndarray) -> None:
    plan = _plan(filled, "category = 1", vectors[0])
    assert "page_v1_embedding_idx" in plan
    assert "Nested Loop" in plan


@pytest.mark.parametrize("where", ["true", "rare", "category = 1"])
def test_hnsw_finds_what_exact_search_finds(filled: psycopg.Connection, vectors: np.ndarray, where: str) -> None:
    random = np.random.default_rng(11)
    chosen = vectors[random.integers(0, ROWS, QUERIES)] + 0.02 * random.normal(size=(QUERIES, DIMENSIONS))
    recalls = []
    for query in chosen:
        with filled.transaction():
            filled.execute("SET LOCAL hnsw.iterative_scan = strict_order; SET LOCAL hnsw.ef_search = 100")
            found = [row[0] for row in filled.execute(_query(where), (str(query.tolist()),))]
        keep = np.arange(ROWS)
        keep = keep[(keep % 950 == 0) if where == "rare" else (keep % 4 == 1) if where != "true" else keep >= 0]
        exact = keep[np.argsort(-(vectors[keep] @ query), kind="stable")[:10]]
        assert len(found) == 10
        recalls.append(recall_at_k(found, exact.tolist(), 10))
    assert np.mean(recalls) >= 0.95
