"""The arithmetic of sizes against real tables, real indexes, and the memory that pgvector says it ran out of."""

from __future__ import annotations

import re

import psycopg
import pytest
from psycopg import errors

from embedline.core import ivfflat, storage_size
from support import scalar

_SHAPES = [
    (12_000, 8, "vector", 16),
    (3_000, 256, "vector", 8),
    (1_000, 768, "vector", 16),
    (1_000, 1024, "halfvec", 32),
    (400, 1536, "vector", 16),
    (300, 2000, "vector", 16),
    (300, 3072, "halfvec", 16),
]


@pytest.fixture(scope="module")
def vectors(module_database: psycopg.Connection) -> psycopg.Connection:
    """A connection that builds small indexes alone."""
    module_database.execute("SET max_parallel_maintenance_workers = 0")
    return module_database


def _fill(connection: psycopg.Connection, count: int, dimensions: int, column_type: str) -> None:
    connection.execute("DROP TABLE IF EXISTS stored")
    connection.execute(
        f"CREATE TABLE stored (chunk_id bigint PRIMARY KEY, embedding {column_type}({dimensions}) NOT NULL);"
        " ALTER TABLE stored ALTER embedding SET STORAGE EXTERNAL"
    )
    connection.execute(
        f"INSERT INTO stored SELECT n, ARRAY(SELECT random() - 0.5 + n * 0 FROM generate_series(1, {dimensions}))"
        f"::real[]::{column_type}({dimensions}) FROM generate_series(1, {count}) AS n"
    )


@pytest.mark.parametrize(("count", "dimensions", "column_type", "m"), _SHAPES)
def test_tables_and_indexes_are_as_large_as_estimated(
    vectors: psycopg.Connection, count: int, dimensions: int, column_type: str, m: int
) -> None:
    _fill(vectors, count, dimensions, column_type)
    # Without the maps of free space and visibility, which are a few pages in any size.
    table = scalar(
        vectors,
        "SELECT pg_relation_size(c.oid) + pg_relation_size(i.indexrelid) + pg_relation_size(nullif(c.reltoastrelid, 0))"
        " + coalesce(pg_indexes_size(nullif(c.reltoastrelid, 0)), 0) FROM pg_class AS c"
        " JOIN pg_index AS i ON i.indrelid = c.oid WHERE c.relname = 'stored'",
    )
    assert storage_size.table_bytes(count, dimensions, column_type) == pytest.approx(table, rel=0.03)
    vectors.execute(
        f"CREATE INDEX graph ON stored USING hnsw (embedding {column_type}_l2_ops) WITH (m = {m}, ef_construction = 64)"
    )
    index = scalar(vectors, "SELECT pg_relation_size('graph')")
    assert storage_size.hnsw_bytes(count, dimensions, column_type, m) == pytest.approx(index, rel=0.03)


@pytest.mark.parametrize(
    ("megabytes", "dimensions", "column_type", "m", "within"),
    [
        (16, 768, "vector", 16, 0.002),
        (16, 2000, "vector", 16, 0.002),
        # In small graphs the drawing of levels shows: its standard deviation is 0.13 %.
        (4, 8, "vector", 16, 0.006),
        (4, 300, "halfvec", 32, 0.006),
    ],
)
def test_the_build_takes_the_memory_that_is_estimated(
    vectors: psycopg.Connection, megabytes: int, dimensions: int, column_type: str, m: int, within: float
) -> None:
    memory = megabytes * 1024 * 1024
    shape = (dimensions, column_type, m, vectors.info.server_version)
    # A few more than fit: what does not is inserted on disk, which takes long.
    _fill(vectors, round(1.02 * memory / storage_size.hnsw_build_memory(1, *shape)), dimensions, column_type)
    messages: list[str] = []
    vectors.add_notice_handler(lambda notice: messages.append(notice.message_primary or ""))
    vectors.execute(f"SET maintenance_work_mem = '{megabytes}MB'")
    vectors.execute(
        f"CREATE INDEX ON stored USING hnsw (embedding {column_type}_l2_ops) WITH (m = {m}, ef_construction = {2 * m})"
    )
    vectors.execute("RESET maintenance_work_mem")
    found = re.search(r"after (\d+) tuples", " ".join(messages))
    assert found is not None, messages
    assert storage_size.hnsw_build_memory(int(found.group(1)), *shape) == pytest.approx(memory, rel=within)


@pytest.mark.parametrize(
    ("count", "dimensions", "column_type", "lists"),
    [(12_000, 8, "vector", 12), (3_000, 256, "vector", 30), (1_000, 1024, "halfvec", 100), (400, 1536, "vector", 4)],
)
def test_lists_are_as_large_and_need_as_much_memory_as_estimated(
    vectors: psycopg.Connection, count: int, dimensions: int, column_type: str, lists: int
) -> None:
    _fill(vectors, count, dimensions, column_type)
    needed = ivfflat.build_memory(count, dimensions, column_type, lists)
    create = f"CREATE INDEX lists ON stored USING ivfflat (embedding {column_type}_l2_ops) WITH (lists = {lists})"
    vectors.execute("SET maintenance_work_mem = '1MB'")
    if needed > 2**20:
        with pytest.raises(errors.ProgramLimitExceeded, match=f"memory required is {int(needed / 2**20) + 1} MB"):
            vectors.execute(create)
    vectors.execute("RESET maintenance_work_mem")
    vectors.execute(create)
    index = scalar(vectors, "SELECT pg_relation_size('lists')")
    assert ivfflat.index_bytes(count, dimensions, column_type, lists) == pytest.approx(index, rel=0.06)
