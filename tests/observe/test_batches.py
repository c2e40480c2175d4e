"""What is kept of batches: a row for each, sums of older ones, and the tasks under way."""

from __future__ import annotations

import psycopg
import pytest

from conftest import Connect
from generated_names import PAGE
from stub_provider import StubProvider
from support import drain, scalar, wait_until
from working import create_stub_model, create_stub_pipeline, insert_rows, work_until_idle, working

_SUMS = "sum(batches), sum(rows), sum(embedded), sum(chunks), sum(requests), sum(tokens), sum(content_bytes)"


@pytest.fixture
def pages(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on the stub with 30 rows from before it."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=30)
    return stub_database


def _throughput(connection: psycopg.Connection) -> tuple[int, ...]:
    row = connection.execute(f"SELECT {_SUMS} FROM embedline.throughput").fetchone()
    assert row is not None
    return tuple(map(int, row))


def test_each_batch_is_kept_with_its_counts_and_times(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(latency=0.05)
    drain(pages)
    insert_rows(pages, 31, 35)
    drain(pages)
    found = pages.execute(
        "SELECT kind, rows, embedded, chunks, requests, tokens > 0, content_bytes > 0, embed >= 50, read > 0, write > 0,"
        " lag IS NOT NULL, worker_id FROM embedline.batch ORDER BY batch_id"
    ).fetchall()
    assert found == [
        ("backfill", 30, 30, 30, 1, True, True, True, True, True, False, None),
        ("change", 5, 5, 5, 1, True, True, True, True, True, True, None),
    ]


def test_a_workers_batches_bear_its_number(pages: psycopg.Connection) -> None:
    work_until_idle(pages)
    assert pages.execute("SELECT sum(rows), count(*) = count(worker_id) FROM embedline.batch").fetchone() == (30, True)


def test_failed_requests_are_counted_by_class(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(poison="page row 7 ")
    drain(pages)
    stub.behave(rules=[{"match": "", "status": 429, "times": 1}])
    insert_rows(pages, 31, 35)
    drain(pages)
    failures = dict(
        pages.execute(
            "SELECT f.key, sum(f.value::int)::int FROM embedline.batch, jsonb_each_text(failures) AS f GROUP BY 1"
        ).fetchall()
    )
    assert failures["rate_limited"] == 1
    # The search for the one row among 30 halves its batch: two requests a step, one of which fails.
    assert 2 <= failures["rejected"] <= 12
    assert scalar(pages, "SELECT sum(dead) FROM embedline.batch") == 1


def test_a_rolled_back_batch_leaves_no_row(pages: psycopg.Connection) -> None:
    with pytest.raises(ZeroDivisionError), pages.transaction():
        assert drain(pages) == 30
        raise ZeroDivisionError
    assert scalar(pages, "SELECT count(*) FROM embedline.batch") == 0


def test_old_batches_move_into_sums_and_nothing_is_counted_twice(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"match": "", "status": 429, "times": 1}])
    drain(pages)
    pages.execute("SELECT embedline.resume_model('stub')")
    stub.behave()
    drain(pages)
    insert_rows(pages, 31, 40)
    drain(pages)
    before = _throughput(pages)
    assert before[1] >= 40
    pages.execute("SELECT embedline.configure('batch_retention_hours', 0)")
    for _ in range(2):
        pages.execute("CALL embedline.run_nightly(repair => false)")
        assert scalar(pages, "SELECT count(*) FROM embedline.batch") == 0
        assert _throughput(pages) == before
    assert pages.execute("SELECT class, count FROM embedline.request_failure").fetchall() == [("rate_limited", 1)]
    assert scalar(pages, "SELECT sum(batch_count) FROM embedline.batch_total") == before[0]
    pages.execute("SELECT embedline.configure('batch_retention_hours')")


def test_a_worker_moves_old_batches_without_a_nightly_run(pages: psycopg.Connection) -> None:
    drain(pages)
    pages.execute("UPDATE embedline.finished_batch SET finished_at = finished_at - interval '2 days'")
    with working(pages):
        wait_until(lambda: not scalar(pages, "SELECT count(*) FROM embedline.batch"), 30, "the batches are moved")
    moved = pages.execute("SELECT sum(rows), max(hour) < now() - interval '1 day' FROM embedline.throughput").fetchone()
    assert moved == (30, True)


def test_progress_shows_the_backfill_and_changes_that_wait(pages: psycopg.Connection, connect: Connect) -> None:
    pages.execute("ANALYZE page")
    columns = "task, phase, done, total, unit, percent"
    assert pages.execute(f"SELECT {columns} FROM embedline.progress").fetchall() == [
        ("backfill", "no worker", 0, 30, "rows", 0)
    ]
    drain(pages)
    assert pages.execute("SELECT * FROM embedline.progress").fetchall() == []
    insert_rows(pages, 31, 33)
    assert pages.execute(f"SELECT {columns} FROM embedline.progress").fetchall() == [
        ("changes", "no worker", None, 3, "rows", None)
    ]
    pages.execute("SELECT embedline.pause_pipeline('page')")
    assert scalar(pages, "SELECT phase FROM embedline.progress") == "paused"


def test_progress_shows_the_fill_of_a_new_version_with_its_rate(pages: psycopg.Connection, stub: StubProvider) -> None:
    drain(pages)
    pages.execute(f"ANALYZE {PAGE('chunk')}")
    create_stub_model(pages, stub, "other", document_prefix="other: ", price_per_million_tokens=1)
    pages.execute("SELECT embedline.add_embedding_version('page', 'other')")
    shown = pages.execute("SELECT version, task, done, total, unit, percent FROM embedline.progress").fetchall()
    assert shown == [(2, "fill", 0, 30, "chunks", 0)]
    pages.execute("SELECT embedline.embed_pending(10)")
    shown = pages.execute("SELECT done, rate > 0, eta IS NOT NULL, money > 0 FROM embedline.progress").fetchall()
    assert shown == [(10, True, True, True)]
