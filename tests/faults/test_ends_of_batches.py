"""Rows that are read in the moment in which a provider's batch ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from stub_provider import StubProvider
from support import scalar, wait_until
from working import create_stub_model, create_stub_pipeline, dsn_of, work_until_idle, working

_ROWS = 30
# A step of a worker, up to its commit.
_END_BATCH = """
    DO LANGUAGE plpython3u $python$
        from embedline.catalog.load import load_pipeline
        from embedline.postgres.session import Session
        from embedline.queue import open_batches
        session = Session(plpy, GD)
        number = session.scalar("SELECT batch_id FROM embedline.provider_batch")
        held = open_batches.end(session, number, "failed", None, is_charged=False)
        open_batches.wake(session, load_pipeline(session, "page"), held)
    $python$
"""
_WAITS = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A pipeline of thirty rows in an open batch, and one more row with a text of the batch, which is due."""
    stub.batch_api(is_open=True)
    create_stub_model(stub_database, stub, options='{"batch_api": true}')
    create_stub_pipeline(stub_database, rows=_ROWS)
    work_until_idle(stub_database, seconds=30)
    stub_database.execute("INSERT INTO page SELECT 40, body FROM page WHERE id = 4")
    yield stub_database
    stub_database.execute(
        "TRUNCATE embedline.provider_batch, embedline.provider_batch_hold, embedline.provider_batch_text"
    )


def _embed_pending(session: psycopg.Connection) -> int:
    return int(scalar(session, "SELECT embedline.embed_pending(1)"))


@pytest.mark.parametrize("is_stored", [True, False])
def test_an_answer_that_comes_while_a_row_is_read_is_used(
    page: psycopg.Connection, stub: StubProvider, is_stored: bool
) -> None:
    stored = f"SELECT count(*) = {_ROWS} FROM page_embedding"
    kept = f"SELECT count(*) = {_ROWS} FROM embedline.provider_batch_text WHERE state = 'answered'"

    def is_answered() -> bool:
        page.execute("UPDATE embedline.provider_batch SET next_at = now() WHERE state = 'waiting' AND next_at > now()")
        return bool(scalar(page, stored if is_stored else kept))

    with psycopg.connect(dsn_of(page)) as locking, psycopg.connect(dsn_of(page), autocommit=True) as reading:
        # It is read after the answers of batches.
        locking.execute("LOCK TABLE embedline.loan")
        with ThreadPoolExecutor(1) as pool:
            embedding = pool.submit(_embed_pending, reading)
            wait_until(lambda: scalar(page, _WAITS, (reading.info.backend_pid,)), 20, "the row's worker waits")
            if not is_stored:
                # Then workers read the answers, and no row.
                page.execute("SELECT embedline.pause_pipeline('page')")
            stub.end_batches()
            with working(page):
                wait_until(is_answered, 30, "the texts are answered")
            locking.commit()
            assert embedding.result(30) == 1
    assert scalar(page, "SELECT count(*) FROM page_embedding WHERE id = 40") == 1
    assert stub.counts().get("requests", 0) == 0, "the ordinary endpoint was asked, too"


def test_a_row_does_not_wait_for_a_batch_that_ended_meanwhile(page: psycopg.Connection) -> None:
    with psycopg.connect(dsn_of(page)) as ending, psycopg.connect(dsn_of(page), autocommit=True) as reading:
        ending.execute(_END_BATCH)
        with ThreadPoolExecutor(1) as pool:
            embedding = pool.submit(_embed_pending, reading)
            wait_until(lambda: scalar(page, _WAITS, (reading.info.backend_pid,)), 20, "the row's worker waits")
            ending.commit()
            embedding.result(30)
    assert scalar(page, "SELECT count(*) FROM embedline.provider_batch_hold") == 0
    while _embed_pending(page):
        pass
    assert scalar(page, "SELECT count(*) FROM page_embedding WHERE id = 40") == 1
