"""What `embedline build-index` costs against a plain CREATE INDEX CONCURRENTLY with the same settings, on the same vectors.

Ours is all that the command does: counting the version, the preflight, the settings, the build watched from a second session
as its progress bar does, the check of what came of it. Both sides are built in turn, parallel and serially.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import psycopg
from harness import Bench, Figure, scalar, timed

from embedline.client import build_index
from embedline.core.vectors import copy_binary, normalise
from generated_names import BENCH

ROWS, DIMENSIONS = 20_000, 384
CENTRES, SPREAD = 100, 0.6
SEED = 4
LIMIT = 1.05
PARALLEL, SERIAL = 2, 0
NAME = BENCH.index(1)
# Watches the build, as the command does.
_LISTENER = build_index.Listener(lambda phase, percent: None)

SETUP = (
    "CREATE TABLE bench_source (id bigint PRIMARY KEY, body text NOT NULL)",
    "SELECT embedline.create_pipeline('bench', 'bench_source', 'body', 'minilm')",
    "SELECT embed_pending(1)",
    f"INSERT INTO {BENCH('chunk')} (chunk_id, key_id, seq, start_offset, end_offset, content_hash, content)"
    f" SELECT g, g, 0, 0, 32, md5(g::text)::uuid, md5(g::text) FROM generate_series(1, {ROWS}) AS g",
)


def run(bench: Bench) -> None:
    """Build the index on each side in turn."""
    with bench.connect() as connection:
        for statement in SETUP:
            connection.execute(statement)
        with connection.cursor().copy(f"COPY {BENCH.version(1)} FROM STDIN WITH (FORMAT binary)") as copy:
            copy.write(copy_binary(np.arange(1, ROWS + 1, dtype=np.int64), _vectors(), "vector"))
        connection.execute(f"VACUUM ANALYZE {BENCH('chunk')}, {BENCH.version(1)}")
        _besides(bench, connection)
        means = {workers: _compare(bench, connection, workers) for workers in (PARALLEL, SERIAL)}
        size = scalar(connection, f"SELECT pg_relation_size('{NAME}')") / 2**20
    detail = f"what a serial build before pgvector 0.8.2 would give away; the index has {size:.0f} MB"
    bench.add(Figure("serial build against parallel", means[SERIAL] / means[PARALLEL], "×", detail=detail))


def _vectors() -> Any:
    """Return clustered unit vectors: of uniform noise the graph takes another time than of text."""
    random = np.random.default_rng(SEED)
    centres = random.normal(size=(CENTRES, DIMENSIONS))
    members = centres[random.integers(0, CENTRES, ROWS)] + SPREAD * random.normal(size=(ROWS, DIMENSIONS))
    return normalise(members.astype(np.float32))


def _compare(bench: Bench, connection: psycopg.Connection[Any], workers: int) -> float:
    """Add the ratio of both sides with so many parallel workers; return the seconds of ours."""
    connection.execute(f"DROP INDEX IF EXISTS {NAME}")
    label = f"{workers} parallel workers" if workers else "serial"
    plan = json.loads(scalar(connection, "SELECT embedline._index_plan('bench', NULL, NULL, %s)::text", (workers,)))
    ours, plain = [], []
    # A graph's levels are drawn by chance: builds of the same vectors differ by a tenth and more, on both sides. So it takes
    # many, and their mean, which of such figures is nearer to the truth than the median.
    turns = 2 * bench.rounds
    task = bench.progress.add_task(f"Building the index, {label}", total=2 * turns)
    for turn in range(turns):
        sides = [(ours, lambda: _ours(connection, workers)), (plain, lambda: _plain(connection, plan))]
        for seconds, build in sides if turn % 2 else reversed(sides):
            connection.execute(f"DROP INDEX IF EXISTS {NAME}")
            connection.execute("CHECKPOINT")
            seconds.append(timed(build))
            if not scalar(connection, f"SELECT indisvalid FROM pg_index WHERE indexrelid = '{NAME}'::regclass"):
                raise SystemExit("the index is not valid")
            bench.progress.update(task, advance=1)
    bench.compare(f"build of {ROWS:,} × {DIMENSIONS}, {label}", ours, plain, LIMIT, statistics.fmean)
    return statistics.fmean(ours)


def _besides(bench: Bench, connection: psycopg.Connection[Any]) -> None:
    """Add how long all takes that is not the statement itself: of one build each, so no other build's luck is in it."""
    shares, seconds = [], []
    for _ in range(3):
        connection.execute(f"DROP INDEX IF EXISTS {NAME}")
        client = _Clocked(connection)
        whole = timed(lambda c=client: build_index.build(c, "bench", listener=_LISTENER))
        seconds.append(whole - client.seconds[0])
        shares.append(whole / client.seconds[0])
    detail = f"{statistics.median(seconds) * 1000:.0f} ms: counts, preflight, settings, observer, check"
    bench.add(Figure("build-index against its own CREATE INDEX", statistics.median(shares), "×", LIMIT, detail))


class _Clocked(build_index.PsycopgClient):
    """A session that knows how long its CREATE INDEX took."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        super().__init__(connection)
        object.__setattr__(self, "seconds", [])

    def execute(self, statement: str) -> build_index.Rows:
        start = time.perf_counter()
        rows = super().execute(statement)
        if statement.startswith("CREATE INDEX"):
            self.seconds.append(time.perf_counter() - start)
        return rows


def _ours(connection: psycopg.Connection[Any], workers: int) -> None:
    client = build_index.PsycopgClient(connection)
    if build_index.build(client, "bench", parallel_workers=workers, listener=_LISTENER) is None:
        raise SystemExit("there was nothing to build")


def _plain(connection: psycopg.Connection[Any], plan: dict[str, Any]) -> None:
    connection.execute(f"SET maintenance_work_mem = '{plan['maintenance_work_mem_kb']}kB'")
    connection.execute(f"SET max_parallel_maintenance_workers = {plan['parallel_workers']}")
    connection.execute(plan["statement"])
    connection.execute("RESET maintenance_work_mem")
    connection.execute("RESET max_parallel_maintenance_workers")
