"""Filling a new version's own table, against filling a second column of the rows whose first one has an HNSW index.

Ours is what a worker does once it has the vectors (embedline.work.VersionWork.write: lock the chunks, look, COPY BINARY), in
transactions of 1,000 chunks. The baseline is one UPDATE for each 1,000 rows out of a table that holds the vectors already, so
it pays for no client. Both tables have the same first version: 20,000 × 384 dimensions, indexed with the same settings. The
whole backfill through a worker, with its queue and its reading, stands beside it; there the vectors are lent by the first
version, so no model takes part.
"""

from __future__ import annotations

import numpy as np
from harness import Bench, Figure, scalar, timed
from workers import Session, drain, spread

from generated_names import BENCH

ROWS, DIMENSIONS, BATCH, ROUNDS = 20_000, 384, 1_000, 3
SEED = 384
LEAST = 50

SETUP = (
    "CREATE TABLE bench_source (id bigint PRIMARY KEY, body text NOT NULL)",
    "SELECT embedline.create_pipeline('bench', 'bench_source', 'body', 'minilm', chunking => 'none')",
    f"INSERT INTO {BENCH('chunk')} (chunk_id, key_id, seq, start_offset, end_offset, content_hash, content)"
    f" SELECT g, g, 0, 0, 32, md5(g::text)::uuid, md5(g::text) FROM generate_series(1, {ROWS}) AS g",
    f"""
    CREATE FUNCTION bench_fill(number integer, batch_from integer, batch_to integer) RETURNS integer
    LANGUAGE plpython3u AS $python$
        import numpy as np
        from embedline.catalog import load as catalog
        from embedline.core import vectors
        from embedline.chunking import Chunk
        from embedline.postgres.session import Session
        from embedline.documents.values import Document
        from embedline.queue.outbox import ClaimedRow
        from embedline.queue.claim import Claim
        from embedline.postgres.claims import CALLERS_TRANSACTION
        from embedline.worker.version_chunks import VersionChunks
        if "bench" not in GD:
            matrix = np.random.default_rng({SEED}).standard_normal(({ROWS}, {DIMENSIONS}), dtype=np.float32)
            GD["bench"] = vectors.normalise(matrix)
        session = Session(plpy, GD)
        source = VersionChunks(session, CALLERS_TRANSACTION, catalog.load_version(session, "bench", number))
        ids = range(batch_from, batch_to)
        digests = [i.to_bytes(16, "big") for i in ids]
        sound = [Document(ClaimedRow((str(i),)), chunks=[Chunk(0, 0, 1, "x", d)]) for i, d in zip(ids, digests)]
        known = {{d: GD["bench"][i - 1] for i, d in zip(ids, digests)}}
        return len(source.write(Claim([]), sound, known))
    $python$""",
    "CREATE TABLE bench_wide (chunk_id bigint PRIMARY KEY, embedding_v1 vector(384), embedding_v2 vector(384))",
    "ALTER TABLE bench_wide ALTER embedding_v1 SET STORAGE EXTERNAL, ALTER embedding_v2 SET STORAGE EXTERNAL",
)
INDEX = "CREATE INDEX bench_wide_idx ON bench_wide USING hnsw (embedding_v1 vector_cosine_ops)"
UPDATE = (
    f"UPDATE bench_wide AS w SET embedding_v2 = v.embedding_v1 FROM {BENCH.version(1)} AS v"
    " WHERE v.chunk_id = w.chunk_id AND w.chunk_id >= %s AND w.chunk_id < %s"
)


def run(bench: Bench) -> None:
    """Fill both in turn; each statement is a transaction of its own."""
    task = bench.progress.add_task("Filling", total=2 * ROUNDS + 1)
    with bench.connect() as session:
        for statement in SETUP:
            session.execute(statement)
        session.execute("SET maintenance_work_mem = '256MB'")
        _fill(session, 1)
        session.execute("UPDATE embedline.version SET state = 'complete'")
        session.execute(scalar(session, "SELECT embedline.index_statement('bench')"))
        session.execute(
            "SELECT embedline.add_embedding_version('bench', 'minilm', distance => 'inner_product',"
            " index_method => 'none')"
        )
        ours, theirs = list[float](), list[float]()
        for _ in range(ROUNDS):
            session.execute(f"TRUNCATE {BENCH.version(2)}")
            # Both sides begin after one: what is written to disk of the other's pages is not their own time.
            session.execute("CHECKPOINT")
            ours.append(timed(lambda: _fill(session, 2)))
            bench.progress.update(task, advance=1)
            _make_wide(session)
            theirs.append(timed(lambda: _update(session)))
            bench.progress.update(task, advance=1)
        _check_equal(session)
        session.execute(f"TRUNCATE {BENCH.version(2)}")
        backfill = drain(session)
        if scalar(session, f"SELECT count(*) FROM {BENCH.version(2)}") != ROWS:
            raise SystemExit("the backfill is not complete")
        bench.progress.update(task, advance=1)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    detail = f"{np.median(theirs):.1f} s against {np.median(ours) * 1000:.0f} ms; {spread(ratios, '.0f')}"
    bench.add(
        Figure(
            "own table, times faster than a second column", float(np.median(ratios)), "×", LEAST, detail, at_least=True
        )
    )
    detail = f"{ROWS:,} chunks in {backfill:.1f} s, lent by the first version"
    bench.add(Figure("whole backfill by a worker, the same", float(np.median(theirs)) / backfill, "×", detail=detail))


def _batches() -> list[tuple[int, int]]:
    return [(first, first + BATCH) for first in range(1, ROWS + 1, BATCH)]


def _fill(session: Session, number: int) -> None:
    for first, end in _batches():
        session.execute("SELECT bench_fill(%s, %s, %s)", (number, first, end))


def _make_wide(session: Session) -> None:
    session.execute("TRUNCATE bench_wide")
    session.execute("DROP INDEX IF EXISTS bench_wide_idx")
    session.execute(f"INSERT INTO bench_wide SELECT chunk_id, embedding_v1 FROM {BENCH.version(1)}")
    session.execute(INDEX)
    session.execute("VACUUM ANALYZE bench_wide")
    session.execute("CHECKPOINT")


def _update(session: Session) -> None:
    for first, end in _batches():
        session.execute(UPDATE, (first, end))


def _check_equal(session: Session) -> None:
    """Both sides must hold the same vectors, bit for bit."""
    same = scalar(
        session,
        f"SELECT count(*) FROM bench_wide AS w JOIN {BENCH.version(2)} AS v USING (chunk_id)"
        " WHERE vector_send(w.embedding_v2) = vector_send(v.embedding_v2)",
    )
    if same != ROWS:
        raise SystemExit(f"{ROWS - same} vectors differ between the two sides")
