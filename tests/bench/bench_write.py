"""What it costs to write vectors from inside the server, against a client's COPY BINARY of the same rows.

Ours is `embedline.documents.copy.copy_vectors` itself, called in the backend on a real pipeline's version table. The baseline
is psycopg in its plain form, `set_types` and `write_row` of numpy arrays, into a table with the same constraints and
storage. A third side sends a file of bytes made beforehand: what the server alone costs, without any client's work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
from harness import Bench, scalar, timed
from pgvector.psycopg import register_vector

from generated_names import BENCH

ROWS, DIMENSIONS, BATCH = 20_000, 384, 1_000
SEED = 20_000
OURS, TWIN = BENCH.version(1), BENCH("twin")

SETUP = (
    "CREATE TABLE bench_source (id bigint PRIMARY KEY, body text NOT NULL)",
    "SELECT embedline.create_pipeline('bench', 'bench_source', 'body', 'minilm', index_method => 'none')",
    f"INSERT INTO {BENCH('chunk')} (chunk_id, key_id, seq, start_offset, end_offset, content_hash, content)"
    f" SELECT g, g, 0, 0, 32, md5(g::text)::uuid, md5(g::text) FROM generate_series(1, {ROWS}) AS g",
    f"CREATE TABLE {TWIN} (LIKE {OURS} INCLUDING STORAGE INCLUDING INDEXES, FOREIGN KEY (chunk_id)"
    f" REFERENCES {BENCH('chunk')} ON DELETE CASCADE)",
    f"ANALYZE {BENCH('chunk')}",
    # The same numbers on both sides: made from one seed, before the clock starts.
    f"""
    CREATE FUNCTION bench_prepare() RETURNS integer LANGUAGE plpython3u AS $python$
        import numpy as np
        from embedline.catalog import load as catalog
        from embedline.core import vectors
        from embedline.postgres.session import Session
        matrix = np.random.default_rng({SEED}).standard_normal(({ROWS}, {DIMENSIONS}), dtype=np.float32)
        GD["bench"] = np.arange(1, {ROWS} + 1, dtype=np.int64), vectors.normalise(matrix)
        return len(GD["bench"][0])
    $python$""",
    """
    CREATE FUNCTION bench_write(batch integer) RETURNS integer LANGUAGE plpython3u AS $python$
        from embedline.catalog import load as catalog
        from embedline.documents.copy import copy_vectors
        from embedline.postgres.session import Session
        session = Session(plpy, GD)
        pipeline = catalog.load_pipeline(session, "bench")
        ids, matrix = GD["bench"]
        for first in range(0, len(ids), batch):
            copy_vectors(session, pipeline, ids[first : first + batch], matrix[first : first + batch])
        return len(ids)
    $python$""",
)
COPY = f"COPY {TWIN} (chunk_id, embedding_v1) FROM STDIN WITH (FORMAT binary)"


def run(bench: Bench) -> None:
    """Write the rows on each side in turn; commit is in the time."""
    ids = np.arange(1, ROWS + 1, dtype=np.int64)
    matrix = _normalised(np.random.default_rng(SEED).standard_normal((ROWS, DIMENSIONS), dtype=np.float32))
    with bench.connect() as connection:
        for statement in SETUP:
            connection.execute(statement)
        register_vector(connection)
        scalar(connection, "SELECT bench_prepare()")
        data = _file(ids, matrix)
        sides = {
            "ours": (OURS, lambda: connection.execute("SELECT bench_write(%s)", (ROWS,))),
            "rows": (TWIN, lambda: _copy_rows(connection, ids, matrix)),
            "batches": (OURS, lambda: connection.execute("SELECT bench_write(%s)", (BATCH,))),
            "file": (TWIN, lambda: _copy_file(connection, data)),
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        task = bench.progress.add_task("Writing", total=(bench.rounds + 1) * len(sides))
        for number in range(bench.rounds + 1):
            for side, (table, action) in list(sides.items())[:: 1 if number % 2 else -1]:
                connection.execute(f"TRUNCATE {table}")
                connection.execute("CHECKPOINT")
                elapsed = timed(action)
                if number > 0:
                    seconds[side].append(elapsed)
                bench.progress.update(task, advance=1)
        _check_equal(connection)
    bench.compare("20,000 × 384-d, ours against COPY BINARY", seconds["ours"], seconds["rows"], 1.5)
    bench.compare("ours in batches of 1,000 against the same", seconds["batches"], seconds["rows"], 1.5)
    bench.compare("ours against a ready-made binary file", seconds["ours"], seconds["file"])


def _normalised(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    wide = matrix.astype(np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)


def _copy_rows(
    connection: psycopg.Connection[Any], ids: npt.NDArray[np.int64], matrix: npt.NDArray[np.float32]
) -> None:
    with connection.cursor().copy(COPY) as copy:
        copy.set_types(["int8", "vector"])
        for chunk_id, vector in zip(ids.tolist(), matrix, strict=True):
            copy.write_row((chunk_id, vector))


def _copy_file(connection: psycopg.Connection[Any], data: bytes) -> None:
    with connection.cursor().copy(COPY) as copy:
        copy.write(data)


def _file(ids: npt.NDArray[np.int64], matrix: npt.NDArray[np.float32]) -> bytes:
    from embedline.core import vectors

    return vectors.copy_binary(ids, matrix, "vector")


def _check_equal(connection: psycopg.Connection[Any]) -> None:
    """Both tables were written last by a round's last side: their rows must be the same, bit for bit."""
    different = scalar(
        connection,
        f"SELECT count(*) FROM {OURS} AS a FULL JOIN {TWIN} AS b USING (chunk_id)"
        " WHERE vector_send(a.embedding_v1) IS DISTINCT FROM vector_send(b.embedding_v1)",
    )
    if different or scalar(connection, f"SELECT count(*) FROM {OURS}") != ROWS:
        raise SystemExit(f"{different} rows differ between the two sides")
