"""Long texts spread over workers from the first batch on, before anything was measured."""

from __future__ import annotations

import contextlib
from collections import Counter

import psycopg
import pytest

from generated_names import PAGE
from stub_provider import StubProvider
from support import data_count, scalar, wait_until
from working import Worker, create_stub_model, create_stub_pipeline, dsn_of

WORKERS = 8
_IN_FLIGHT = f"""
    SELECT claimed_by, sum(n)::integer FROM (
        SELECT claimed_by, cardinality(key_id) AS n FROM {PAGE("claim")}
        UNION ALL SELECT claimed_by, 1 FROM {PAGE("outbox")} WHERE claimed_by IS NOT NULL
    ) AS c GROUP BY claimed_by
"""


@pytest.mark.parametrize(
    ("rows", "kilobytes", "analyze"), [(800, 8, True), (800, 8, False), (160, 100, True), (160, 100, False)]
)
def test_long_texts_spread_over_the_workers_that_are_there(
    stub_database: psycopg.Connection, stub: StubProvider, rows: int, kilobytes: int, analyze: bool
) -> None:
    create_stub_model(stub_database, stub, concurrency=2)
    create_stub_pipeline(stub_database, chunking="recursive", chunk_tokens=256)
    # Nothing of the first wave is answered before all was seen.
    stub.behave(latency=60)
    with contextlib.ExitStack() as stack:
        for _ in range(WORKERS):
            stack.enter_context(Worker(dsn_of(stub_database), seconds=120))
        count = "SELECT count(*) FROM embedline.worker"
        wait_until(lambda: scalar(stub_database, count) == WORKERS, 60, "all workers are there")
        stub_database.execute(
            "INSERT INTO page SELECT g, string_agg(md5(random()::text), ' ') FROM generate_series(1, %s * 31) AS word,"
            " generate_series(1, %s) AS g GROUP BY g",
            (kilobytes, rows),
        )
        if analyze:
            stub_database.execute("ANALYZE page")
        in_flight = Counter[int]()

        def all_have_some() -> bool:
            in_flight.clear()
            in_flight.update(dict(stub_database.execute(_IN_FLIGHT).fetchall()))
            return len(in_flight) == WORKERS

        wait_until(all_have_some, 60, "every worker has some of the rows")
        assert max(in_flight.values()) <= rows / 3, in_flight
    assert data_count(stub_database, "v1") == 0
