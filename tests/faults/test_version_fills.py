"""The provider of a version beside the serving one fails: the serving version goes on, and the version says what it lacks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pytest
from psycopg import errors

from generated_names import PAGE
from stub_provider import StubProvider, stub_provider, vector_of
from support import assert_exact, data_count, queued, scalar, settle, wait_until
from upgrading import add_version, cut_over, settle_versions, versions
from working import (
    Worker,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    dsn_of,
    insert_rows,
    work_until_idle,
    working,
)

OTHER_DIMENSIONS = 16
ROWS = 20
# Fails in a way that says something about the texts, or about the provider.
PROVIDER_FAULTS: dict[str, dict[str, Any]] = {
    "500": {"status": 500},
    "429": {"status": 429, "headers": {"Retry-After": "0.2"}},
    "401": {"status": 401},
    "html": {"answer": "html"},
    "cut": {"answer": "cut"},
}
TEXT_FAULTS: dict[str, dict[str, Any]] = {
    "400": {"status": 400, "body": '{"error": {"message": "this input is refused"}}'},
    "nan": {"answer": "nan"},
    "zero": {"answer": "zero"},
}


@pytest.fixture(scope="module")
def other_running() -> Iterator[StubProvider]:
    """The provider of the version beside the serving one."""
    with stub_provider(OTHER_DIMENSIONS) as started:
        yield started


@pytest.fixture
def other(other_running: StubProvider) -> Iterator[StubProvider]:
    """The same, behaving well, with nothing counted yet."""
    other_running.behave(remember=True)
    other_running.forget()
    yield other_running
    other_running.behave()


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider, other: StubProvider) -> psycopg.Connection:
    """A pipeline whose version 1 is filled by one provider, and whose version 2 is filled by another."""
    create_stub_model(stub_database, stub)
    create_stub_pipeline(stub_database, rows=ROWS)
    settle(stub_database)
    create_stub_model(stub_database, other, "other", max_batch_items=10, concurrency=2)
    add_version(stub_database, "other")
    settle_versions(stub_database)
    other.forget()
    return stub_database


def _vectors(texts: Sequence[str], dimensions: int) -> npt.NDArray[np.float32]:
    return np.stack([vector_of(text, dimensions) for text in texts])


def _assert_exact(connection: psycopg.Connection, stub: StubProvider, other: StubProvider) -> int:
    """Assert that both versions are what the rows ask for; return the number of chunks."""
    for number, provider in ((1, stub), (2, other)):
        embed = functools.partial(_vectors, dimensions=provider.dimensions)
        found = assert_exact(connection, embed=embed, version=number)
    return found


def _letters(connection: psycopg.Connection) -> dict[int, tuple[str, str]]:
    """Return (stage, error code) of each dead letter of a version, by the id of the row."""
    found = connection.execute(
        "SELECT l.key, l.stage, l.error_code, c.key_id FROM embedline.version_dead_letter AS l"
        f" JOIN {PAGE('chunk')} AS c USING (chunk_id)"
    ).fetchall()
    assert all(key == {"id": str(key_id)} for key, _, _, key_id in found)
    return {int(key["id"]): (stage, code) for key, stage, code, _ in found}


def _assert_serving_is_unharmed(connection: psycopg.Connection, stub: StubProvider, rows: int) -> None:
    embed = functools.partial(_vectors, dimensions=stub.dimensions)
    assert assert_exact(connection, embed=embed, version=1) == rows
    assert dead_letters(connection) == {}
    assert scalar(connection, "SELECT last_error FROM embedline.status WHERE pipeline = 'page'") is None
    assert scalar(connection, "SELECT count(*) FROM page_embedding") == rows


@pytest.mark.parametrize("fault", PROVIDER_FAULTS)
def test_a_versions_provider_that_fails_is_none_of_the_serving_versions_trouble(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider, fault: str
) -> None:
    other.behave(remember=True, rules=[PROVIDER_FAULTS[fault]])
    with working(page, 1):
        insert_rows(page, ROWS + 1, 2 * ROWS)
        wait_until(lambda: data_count(page, "v1") == 2 * ROWS, 5, "the serving version goes on")
        wait_until(lambda: versions(page, "last_error")[2], 10, "the version says what is wrong")
        _assert_serving_is_unharmed(page, stub, 2 * ROWS)
        assert versions(page, "missing") == {1: 0, 2: ROWS}
        other.behave(remember=True)
        page.execute("DELETE FROM embedline.circuit")
        # The backoff is real; the test does not wait for it.
        page.execute("UPDATE embedline.version_queue SET not_before = now()")
        wait_until(lambda: versions(page, "missing")[2] == 0, 20, "the version has caught up")
    assert _assert_exact(page, stub, other) == 2 * ROWS
    assert _letters(page) == {}
    assert versions(page, "last_error") == {1: None, 2: None}


def test_a_versions_provider_that_is_away_is_left_alone(page: psycopg.Connection, stub: StubProvider) -> None:
    with stub_provider(32) as away:
        create_stub_model(page, away, "away")
    add_version(page, "away")
    with working(page, 1):
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.circuit") == 1, 20, "its circuit is open")
        insert_rows(page, ROWS + 1, 2 * ROWS)
        wait_until(lambda: versions(page, "missing") == {1: 0, 2: 0, 3: 2 * ROWS}, 20, "the others go on")
    _assert_serving_is_unharmed(page, stub, 2 * ROWS)
    assert scalar(page, "SELECT max(attempts) FROM embedline.version_queue") == 0, "no try is charged"
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="still being filled"):
        cut_over(page, 3)
    page.execute("SELECT embedline.drop_embedding_version('page', 3)")
    assert scalar(page, "SELECT count(*) FROM embedline.version_queue") == 0


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_a_text_that_a_version_cannot_embed_stands_alone_with_its_key(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider, fault: str
) -> None:
    other.behave(remember=True, rules=[{"match": "row 27 of", **TEXT_FAULTS[fault]}])
    insert_rows(page, ROWS + 1, 2 * ROWS)
    work_until_idle(page)
    _assert_serving_is_unharmed(page, stub, 2 * ROWS)
    code = "EL012" if fault == "400" else "EL014"
    assert _letters(page) == {27: ("embed", code)}
    assert versions(page, "missing") == {1: 0, 2: 1}
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="could not embed 1 chunks") as refused:
        cut_over(page, 2)
    assert '"27"' in (refused.value.diag.message_detail or "")
    assert scalar(page, "SELECT embedline.accept_dead_letters('page', 2)") == 1
    cut_over(page, 2)
    assert scalar(page, "SELECT array_agg(id) FROM page WHERE id NOT IN (SELECT id FROM page_embedding)") == [27]
    page.execute("UPDATE page SET body = 'harmless' WHERE id = 27")
    settle(page)
    assert _letters(page) == {}
    assert _assert_exact(page, stub, other) == 2 * ROWS


@pytest.mark.parametrize("mending", ["an edit", "a delete", "a truncate"])
def test_a_dead_letter_of_a_chunk_that_is_gone_holds_nothing_up(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider, mending: str
) -> None:
    other.behave(rules=[{"match": "row 27 of", "status": 400}])
    insert_rows(page, ROWS + 1, 2 * ROWS)
    work_until_idle(page)
    assert list(_letters(page)) == [27]
    page.execute(
        {
            "an edit": "UPDATE page SET body = 'harmless' WHERE id = 27",
            "a delete": "DELETE FROM page WHERE id = 27",
        }.get(mending, "TRUNCATE page")
    )
    if mending == "an edit":
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="could not embed"):
            cut_over(page, 2)
    settle(page)
    cut_over(page, 2)
    work_until_idle(page)
    assert versions(page, "dead_letters")[2] == 0
    if mending != "a truncate":
        _assert_exact(page, stub, other)


def test_dead_letters_of_a_version_can_be_tried_again(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider
) -> None:
    other.behave(rules=[{"match": "row 2", "status": 400}])
    insert_rows(page, ROWS + 1, ROWS + 9)
    work_until_idle(page)
    assert sorted(_letters(page)) == list(range(ROWS + 1, ROWS + 10))
    other.behave()
    assert scalar(page, "SELECT embedline.requeue_version('page', 2)") == 9
    work_until_idle(page)
    assert _letters(page) == {}
    assert _assert_exact(page, stub, other) == ROWS + 9


@pytest.mark.parametrize("rule", [{"status": 400, "match": "row"}, {"answer": "narrow", "match": "row"}])
def test_a_version_with_everything_quarantined_is_never_accepted(
    page: psycopg.Connection, stub: StubProvider, rule: dict[str, Any]
) -> None:
    with stub_provider(32) as third:
        create_stub_model(page, third, "third")
        third.behave(rules=[rule])
        add_version(page, "third")
        work_until_idle(page)
    assert len(_letters(page)) == ROWS
    assert versions(page, "state")[3] == "complete"
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no vector at all"):
        page.execute("SELECT embedline.accept_dead_letters('page', 3)")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="could not embed"):
        cut_over(page, 3)
    page.execute("UPDATE embedline.version_dead_letter SET accepted_by = 'somebody'")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="no vector at all"):
        cut_over(page, 3)
    _assert_serving_is_unharmed(page, stub, ROWS)


def test_five_failures_of_a_versions_chunk_make_a_dead_letter(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider
) -> None:
    other.behave(rules=[{"match": "row 21 of", "status": 500}])
    insert_rows(page, ROWS + 1, ROWS + 1)

    def is_dead() -> bool:
        # The backoff is real; the test does not wait for it.
        page.execute("UPDATE embedline.version_queue SET not_before = now() WHERE claimed_by IS NULL")
        settle(page)
        return bool(_letters(page))

    wait_until(is_dead, 20, "the chunk is given up")
    assert _letters(page) == {21: ("embed", "EL011")}
    assert scalar(page, "SELECT attempts FROM embedline.version_dead_letter") == 5
    _assert_serving_is_unharmed(page, stub, ROWS + 1)


def test_a_chunk_is_paid_for_once_with_workers_and_a_cutover_side_by_side(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider
) -> None:
    other.behave(remember=True, latency=0.1)
    with working(page, 2):
        for first in range(ROWS + 1, 7 * ROWS, ROWS):
            insert_rows(page, first, first + ROWS - 1)
        wait_until(lambda: data_count(page, "v1") == 7 * ROWS, 10, "the serving version has all")
        wait_until(lambda: other.in_flight() > 0, 10, "the other version is behind, and in work")
        cut_over(page, 2)
        assert versions(page, "missing")[2] == 0
    assert set(other.texts_seen().values()) == {1}
    assert set(stub.texts_seen().values()) == {1}
    assert _assert_exact(page, stub, other) == 7 * ROWS


def test_writes_between_a_cutover_and_a_rollback_are_there_after_it_whatever_the_old_models_pace(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider
) -> None:
    with working(page, 2):
        cut_over(page, 2)
        stub.behave(latency=0.3)
        insert_rows(page, ROWS + 1, 3 * ROWS)
        page.execute("UPDATE page SET body = 'changed since: ' || body WHERE id <= 5")
        page.execute("DELETE FROM page WHERE id = 6")
        wait_until(lambda: queued(page) == 0 and versions(page, "missing")[2] == 0, 10, "the new version has all")
        page.execute("SELECT embedline.rollback('page')")
        wait_until(lambda: versions(page, "missing") == {1: 0, 2: 0}, 10, "the old one has all")
        assert scalar(page, "SELECT count(*) FROM page_embedding") == 3 * ROWS - 1
    assert versions(page, "serving") == {1: True, 2: False}
    assert _assert_exact(page, stub, other) == 3 * ROWS - 1


@pytest.mark.parametrize("fault", [{"answer": "silence"}, {"status": 500}])
def test_a_rollback_waits_for_no_provider_that_does_not_answer(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider, fault: dict[str, Any]
) -> None:
    cut_over(page, 2)
    stub.behave(rules=[fault])
    page.execute("UPDATE page SET body = 'changed since: ' || body WHERE id <= 5")
    # Cancelled: one that is told to end waits for what it has asked.
    with Worker(dsn_of(page)):
        wait_until(lambda: versions(page, "missing") == {1: 5, 2: 0}, 10, "only the old version is behind")
    page.execute("UPDATE embedline.version_queue SET not_before = now()")
    # The provider is silent for 30 s.
    page.execute("SET statement_timeout = '20s'")
    page.execute("SELECT embedline.rollback('page')")
    page.execute("RESET statement_timeout")
    assert scalar(page, "SELECT count(*) FROM page_embedding") == ROWS - 5
    stub.behave()
    page.execute("DELETE FROM embedline.circuit")
    page.execute("UPDATE embedline.version_queue SET not_before = now()")
    work_until_idle(page)
    assert _assert_exact(page, stub, other) == ROWS


def test_a_chunk_that_ends_its_worker_three_times_is_quarantined_alone(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider
) -> None:
    """The provider keeps the worker waiting for one text; whenever it does, the worker is ended."""
    other.behave(remember=True, rules=[{"match": "row 77 of", "latency": 20}])
    insert_rows(page, ROWS + 1, 5 * ROWS)
    ended = 0
    while not _letters(page):
        other.forget()
        with Worker(dsn_of(page), until_idle=True) as worker:
            is_stuck = _stuck(other)
            wait_until(lambda: not worker.is_running or is_stuck(), 20, "the worker is stuck or through")  # noqa: B023
            if worker.is_running:
                ended += 1
                page.execute("SELECT pg_terminate_backend(%s)", (worker.pid,))
            worker.join(20)
    assert ended == 3
    assert _letters(page) == {77: ("claim", "EL020")}
    work_until_idle(page)
    assert versions(page, "missing") == {1: 0, 2: 1}
    _assert_serving_is_unharmed(page, stub, 5 * ROWS)


def _stuck(provider: StubProvider) -> Callable[[], bool]:
    """Return what says whether requests have been in flight at every look for longer than others take."""
    free_at = time.monotonic()

    def look() -> bool:
        nonlocal free_at
        if not provider.in_flight():
            free_at = time.monotonic()
        return time.monotonic() - free_at > 0.5

    return look


@pytest.mark.parametrize("serving", [False, True])
def test_a_version_that_is_dropped_in_flight_leaves_nothing_and_stops_nobody(
    page: psycopg.Connection, stub: StubProvider, other: StubProvider, serving: bool
) -> None:
    if serving:
        cut_over(page, 2)
    slow, doomed = (stub, 1) if serving else (other, 2)
    slow.behave(latency=0.5)
    with working(page, 1) as (worker,):
        insert_rows(page, ROWS + 1, 2 * ROWS)
        wait_until(lambda: slow.in_flight() > 0 and data_count(page, "chunk") == 2 * ROWS, 10, "in flight")
        page.execute("SELECT embedline.drop_embedding_version('page', %s, rollback_window => '0')", (doomed,))
        insert_rows(page, 2 * ROWS + 1, 3 * ROWS)
        wait_until(lambda: scalar(page, "SELECT count(*) FROM page_embedding") == 3 * ROWS, 10, "the other goes on")
        assert worker.is_running
    provider = other if serving else stub
    embed = functools.partial(_vectors, dimensions=provider.dimensions)
    assert assert_exact(page, embed=embed) == 3 * ROWS
    assert scalar(page, "SELECT count(*) FROM embedline.version_queue") == 0
    assert scalar(page, "SELECT last_error FROM embedline.status") is None
