"""Our COPY BINARY data against pgvector's own binary form."""

from __future__ import annotations

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from embedline.core.vectors import HALF_MAX, copy_binary, vectors_from_send

_MATRICES = nps.arrays(
    np.float32,
    nps.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.floats(-HALF_MAX, HALF_MAX, width=32),
)


@pytest.mark.parametrize("column_type", ["vector", "halfvec"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(matrix=_MATRICES)
def test_pgvector_reads_what_we_write_and_we_read_what_it_sends(
    database: psycopg.Connection, column_type: str, matrix: np.ndarray
) -> None:
    count, dimensions = matrix.shape
    database.execute("DROP TABLE IF EXISTS stored")
    database.execute(f"CREATE TABLE stored (chunk_id bigint, embedding {column_type}({dimensions}))")
    with database.cursor().copy("COPY stored FROM STDIN WITH (FORMAT binary)") as copy:
        copy.write(copy_binary(np.arange(count, dtype=np.int64), matrix, column_type))
    rows = database.execute(
        f"SELECT {column_type}_send(embedding), embedding::vector::real[] FROM stored ORDER BY chunk_id"
    ).fetchall()
    exact = matrix if column_type == "vector" else matrix.astype(np.float16).astype(np.float32)
    assert np.array_equal(np.array([row[1] for row in rows], dtype=np.float32), exact)
    assert np.array_equal(vectors_from_send([row[0] for row in rows], column_type), exact)
