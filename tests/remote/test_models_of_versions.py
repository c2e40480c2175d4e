"""Remote workers and versions with other models: no version gets the vectors of another one's model."""

from __future__ import annotations

import threading

import numpy as np
import psycopg
import pytest

from embedline.remote import Worker
from generated_names import Generated
from stub_provider import StubProvider
from support import scalar, wait_until
from upgrading import add_version, cut_over, settle_versions
from working import create_stub_model, insert_rows, unit_vectors

_PREFIX = "read: "


def _add_version(page: psycopg.Connection, stub: StubProvider) -> int:
    """Add a version whose model has the same dimensions, and other vectors."""
    create_stub_model(page, stub, "other", document_prefix=_PREFIX)
    return add_version(page, "other", index_method="none")


def _right(page: psycopg.Connection, stub: StubProvider, number: int, prefix: str) -> int:
    """Return how many vectors a version has; fail if one of them is not its model's."""
    stored = page.execute(
        f"SELECT c.content, v.embedding_v{number}::real[] FROM {Generated('page')('chunk')} AS c"
        f" JOIN {Generated('page').version(number)} AS v USING (chunk_id)"
    ).fetchall()
    if stored:
        expected = unit_vectors([prefix + content for content, _ in stored], stub.dimensions)
        found = np.array([vector for _, vector in stored], dtype=np.float32)
        wrong = int((np.abs(found - expected).max(axis=1) > 1e-5).sum())
        assert not wrong, f"{wrong} of {len(stored)} vectors are another model's"
    return len(stored)


def test_a_worker_without_a_version_fills_none_of_another_model(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    number = _add_version(page, stub)
    Worker(remote_dsn, "page").run(until_empty=True)
    assert _right(page, stub, 1, "") == 25
    assert _right(page, stub, number, _PREFIX) == 0
    Worker(remote_dsn, "page", version=number).run(until_empty=True)
    assert _right(page, stub, number, _PREFIX) == 25


def test_a_worker_follows_a_cutover_to_another_model(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    number = _add_version(page, stub)
    Worker(remote_dsn, "page", version=1).run(until_empty=True)
    Worker(remote_dsn, "page", version=number).run(until_empty=True)
    page.execute("UPDATE embedline.remote_grant SET is_exclusive = false")
    settle_versions(page)
    page.execute("UPDATE embedline.remote_grant SET is_exclusive = true")
    worker = Worker(remote_dsn, "page")
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.worker WHERE login IS NOT NULL"), 20, "it works")
    cut_over(page, number)
    insert_rows(page, 26, 30)
    filled = f"SELECT count(*) FROM {Generated('page').version(number)}"
    wait_until(lambda: scalar(page, filled) == 30, 30, "the new rows have vectors")
    worker.stop()
    thread.join(30)
    assert worker.totals.connections == 2
    assert worker.totals.lost_requests == 0
    assert _right(page, stub, number, _PREFIX) == 30
    # The fill of the former version is for workers with its model.
    assert _right(page, stub, 1, "") == 25


def test_a_session_that_embeds_with_another_model_is_told(
    page: psycopg.Connection, remote_dsn: str, stub: StubProvider
) -> None:
    number = _add_version(page, stub)
    for version in (1, number):
        Worker(remote_dsn, "page", version=version).run(until_empty=True)
    page.execute("UPDATE embedline.remote_grant SET is_exclusive = false")
    settle_versions(page)
    claim = "SELECT state FROM embedline.claim_batch('page')"
    with psycopg.connect(remote_dsn, autocommit=True) as remote:
        remote.execute("SELECT embedline.remote_model('page')")
        cut_over(page, number)
        insert_rows(page, 26, 26)
        with pytest.raises(psycopg.Error, match="has another model than this session embeds with") as told:
            remote.execute(claim)
        assert told.value.sqlstate == "EL017"
        assert "remote_model('page')" in (told.value.diag.message_hint or "")
        remote.execute("SELECT embedline.release_batches()")
        remote.execute("SELECT embedline.remote_model('page')")
        assert scalar(remote, claim) == "claimed"
