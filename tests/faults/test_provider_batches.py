"""Backfills and version fills through the provider's batch endpoint: what is paid, what is resumed, and how it fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psycopg
import pytest

from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from killing import kill_backend, reconnect
from stub_provider import StubProvider
from support import scalar, wait_until
from upgrading import add_version
from working import (
    Worker,
    assert_all_settled,
    create_stub_model,
    create_stub_pipeline,
    dead_letters,
    dsn_of,
    insert_rows,
    remove_all,
    work_until_idle,
    working,
)

_ROWS = 30
_OPEN = "SELECT count(*) FROM embedline.provider_batch WHERE state <> 'done'"
_USAGE = "SELECT tokens, reserved_tokens, money * 1000000 FROM embedline.usage WHERE pipeline = 'page'"
_FAILED = "SELECT count(*) FROM embedline.provider_batch WHERE outcome = 'failed'"
# No pause is waited for: those between two questions, and those after a batch that was refused.
_HURRY = """
    UPDATE embedline.provider_batch SET next_at = now(), ended_at = ended_at - interval '2 hours'
    WHERE CASE state WHEN 'done' THEN outcome = 'failed' ELSE next_at > now() END
"""


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> Iterator[psycopg.Connection]:
    """A pipeline of thirty rows whose backfill goes through the batch endpoint, which keeps its batches open."""
    stub.batch_api(is_open=True)
    create_stub_model(stub_database, stub, options='{"batch_api": true}', price_per_million_tokens=1)
    create_stub_pipeline(stub_database, rows=_ROWS)
    yield stub_database
    stub_database.execute(
        "TRUNCATE embedline.provider_batch, embedline.provider_batch_hold, embedline.provider_batch_text"
    )


def _send(page: psycopg.Connection) -> None:
    """Work until nothing is left but what waits for a batch."""
    work_until_idle(page, seconds=30)


def _settle(page: psycopg.Connection) -> None:
    """Work until no row waits, without the pauses between two questions to the provider."""

    def is_through() -> bool:
        page.execute(_HURRY)
        return bool(scalar(page, "SELECT pending = 0 AND backfill_complete FROM embedline.status"))

    with working(page):
        wait_until(is_through, 40, "no row waits")


def _paid(stub: StubProvider) -> dict[str, int]:
    """Return how often each text was paid for, without those that are asked for to find out whose fault a failure is."""
    return {text: count for text, count in stub.texts_seen().items() if text.startswith(("page", "edited", "read: "))}


def _assert_paid_once(page: psycopg.Connection, stub: StubProvider) -> None:
    assert assert_all_settled(page, stub.dimensions) == _ROWS
    assert set(_paid(stub).values()) == {1}
    assert scalar(page, "SELECT count(*) FROM embedline.provider_batch_text") == 0
    assert scalar(page, "SELECT count(*) FROM embedline.provider_batch_hold") == 0
    assert scalar(page, "SELECT last_error IS NULL FROM embedline.status")


def test_a_backfill_goes_through_one_batch_at_half_the_price(page: psycopg.Connection, stub: StubProvider) -> None:
    _send(page)
    (batch,) = stub.batches()
    assert len(set(batch["texts"])) == _ROWS
    assert scalar(page, "SELECT in_batches FROM embedline.status") == _ROWS
    assert scalar(page, "SELECT oldest_pending_age IS NULL FROM embedline.status")
    assert not page.execute("SELECT alert FROM embedline.alert WHERE severity <> 'note'").fetchall()
    page.execute("SELECT embedline._roll_up_usage()")
    figures = dict(page.execute("SELECT figure, value FROM embedline.estimate('page')").fetchall())
    assert figures["money in batches"] == figures["money"] / 2 > 0
    stub.end_batches()
    _settle(page)
    _assert_paid_once(page, stub)
    assert stub.counts().get("requests", 0) == 0, "the ordinary endpoint was asked"
    tokens = sum(len(text) // 4 + 1 for text in batch["texts"])
    usage = page.execute(_USAGE).fetchall()
    assert usage == [(tokens, 0, tokens / 2)]
    assert stub.batch_calls().count("DELETE /v1/files/ID") == 2


def test_a_batch_whose_answer_was_lost_is_found_and_not_created_again(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    stub.batch_api(is_open=True, swallow={"POST /v1/batches": 1}, status={"POST /v1/files": [500, 1]})
    _send(page)
    assert "batch endpoint" in scalar(page, "SELECT last_error FROM embedline.status")
    stub.end_batches()
    _settle(page)
    _assert_paid_once(page, stub)
    assert stub.batch_calls().count("POST /v1/batches") == 1
    assert "GET /v1/batches" in stub.batch_calls()


def test_a_batch_is_sent_to_the_address_that_its_model_has_now(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.batch_api(status={"POST /v1/files": [500, 1]})
    _send(page)
    page.execute("""UPDATE embedline.provider_batch SET config = config || '{"base_url": "http://127.0.0.1:1/v1"}'""")
    _settle(page)
    _assert_paid_once(page, stub)


def test_a_batch_outlives_its_worker_and_a_restart_of_its_answers(page: psycopg.Connection, stub: StubProvider) -> None:
    with working(page) as (worker,):
        wait_until(lambda: scalar(page, "SELECT count(*) FROM embedline.provider_batch WHERE state = 'waiting'"), 30)
        page.execute("SELECT pg_terminate_backend(%s)", (worker.pid,))
        wait_until(lambda: not worker.is_running, 10, "the worker is gone")
        worker.error = None
    # Some answers were kept when the next worker died.
    page.execute("UPDATE embedline.provider_batch_text SET state = 'refused' WHERE text_id <= 1")
    page.execute("UPDATE embedline.provider_batch_text SET state = 'pending'")
    stub.end_batches(status={"GET /v1/files/ID/content": [500, 1]})
    _settle(page)
    _assert_paid_once(page, stub)
    assert len(stub.batches()) == 1


def test_a_batch_outlives_a_crash_of_the_server_while_it_is_sent(own_cluster: Cluster, stub: StubProvider) -> None:
    # The provider has created the batch, and its answer is lost with the server.
    stub.batch_api(is_open=True, swallow={"POST /v1/batches": 1})
    with contextlib.closing(reconnect(own_cluster)) as page:
        remove_all(page)
        create_stub_model(page, stub, options='{"batch_api": true}')
        create_stub_pipeline(page, rows=_ROWS)
        with Worker(dsn_of(page), seconds=60) as worker:
            wait_until(lambda: "POST /v1/batches" in stub.batch_calls(), 30, "the batch is created")
            kill_backend(worker.pid, page)
    with contextlib.closing(reconnect(own_cluster)) as page:
        assert scalar(page, "SELECT state FROM embedline.provider_batch") == "sending"
        stub.end_batches()
        _settle(page)
        _assert_paid_once(page, stub)
    assert len(stub.batches()) == 1


def test_edits_go_at_once_and_win(page: psycopg.Connection, stub: StubProvider) -> None:
    _send(page)
    page.execute("UPDATE page SET body = 'edited ' || id WHERE id IN (1, 2)")
    page.execute("DELETE FROM page WHERE id = 3")
    insert_rows(page, 31, 32)
    # A text that is in the batch already is not paid for at once as well.
    page.execute("INSERT INTO page SELECT 40, body FROM page WHERE id = 4")
    _send(page)
    assert sorted(_paid(stub)) == sorted(
        row[0] for row in page.execute("SELECT body FROM page WHERE id IN (1, 2, 31, 32)").fetchall()
    )
    assert scalar(page, "SELECT embedline.embed_pending(100)") == 0
    stub.end_batches()
    _settle(page)
    assert assert_all_settled(page, stub.dimensions) == _ROWS + 2
    assert set(_paid(stub).values()) == {1}
    assert stub.counts()["requests"] <= 2


def test_texts_without_a_usable_answer_are_asked_for_again(page: psycopg.Connection, stub: StubProvider) -> None:
    faults = ("refused", "nan", "narrow", "twice", "trouble", "missing", "garbage")
    stub.batch_api(lines={f"page row {number} ": fault for number, fault in enumerate(faults, 1)})
    stub.behave(remember=True, rules=[{"match": "page row 1 ", "status": 400, "body": "no"}])
    _settle(page)
    assert list(dead_letters(page)) == [1]
    assert assert_all_settled(page, stub.dimensions) == _ROWS - 1
    # What was not answered is in three batches, before it goes to the ordinary endpoint; what was refused is in one.
    assert [len(batch["texts"]) for batch in stub.batches()] == [30, 3, 3]
    assert set(_paid(stub).values()) == {1}


def test_what_a_batch_has_not_answered_goes_into_another_one(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.batch_api(outcomes=["expired", "cancelled"], answered=0.4)
    _settle(page)
    _assert_paid_once(page, stub)
    assert [len(batch["texts"]) for batch in stub.batches()] == [30, 18, 11]
    assert stub.counts().get("requests", 0) == 0


def test_a_refused_batch_is_sent_again_later_and_smaller(page: psycopg.Connection, stub: StubProvider) -> None:
    reason = ["token_limit_exceeded", "Enqueued token limit reached", None]
    stub.batch_api(outcomes=["failed"], reason=reason)
    with working(page):
        wait_until(lambda: scalar(page, _FAILED), 30, "it fails")
    assert "Enqueued token limit" in scalar(page, "SELECT last_error FROM embedline.status")
    assert scalar(page, "SELECT sum(tokens) FROM embedline.usage WHERE pipeline = 'page'") == 0
    _settle(page)
    _assert_paid_once(page, stub)
    assert [len(batch["texts"]) for batch in stub.batches()] == [30, 15, 15]


def test_the_line_for_which_a_batch_is_refused_is_left_out(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.batch_api(outcomes=["failed"], reason=["invalid_request", "line 3 is no good", 3])
    _settle(page)
    _assert_paid_once(page, stub)
    assert [len(batch["texts"]) for batch in stub.batches()] == [30, 29]
    assert stub.counts()["requests"] == 1


def test_a_lost_batch_is_sent_again(page: psycopg.Connection, stub: StubProvider) -> None:
    _send(page)
    stub.batch_api()
    _settle(page)
    _assert_paid_once(page, stub)
    assert scalar(page, "SELECT array_agg(outcome ORDER BY batch_id) FROM embedline.provider_batch") == [
        "lost",
        "completed",
    ]


def test_rows_of_a_batch_that_was_deleted_are_not_lost(page: psycopg.Connection, stub: StubProvider) -> None:
    _send(page)
    page.execute("DELETE FROM embedline.provider_batch")
    page.execute(f"UPDATE {PAGE('outbox')} SET not_before = now()")
    page.execute("INSERT INTO embedline.signal (pipeline) VALUES ('page')")
    stub.batch_api()
    _settle(page)
    assert assert_all_settled(page, stub.dimensions) == _ROWS
    assert len(stub.batches()) == 1


def test_a_budget_sends_part_of_a_batch_and_the_rest_later(page: psycopg.Connection, stub: StubProvider) -> None:
    tokens = 17  # of one text, as it is reserved
    page.execute("SELECT embedline.set_budget('day', pipeline => 'page', tokens => %s)", (10 * tokens + 5,))
    _send(page)
    assert [len(batch["texts"]) for batch in stub.batches()] == [10]
    page.execute("SELECT embedline.drop_budget(pipeline => 'page')")
    stub.end_batches()
    _settle(page)
    _assert_paid_once(page, stub)
    assert sorted(len(batch["texts"]) for batch in stub.batches()) == [10, 20]


def _cancel(page: psycopg.Connection, stub: StubProvider) -> None:
    page.execute(_HURRY)
    with working(page):
        wait_until(lambda: scalar(page, _OPEN) == 0, 20, "the batch is cancelled")
    assert [batch["status"] for batch in stub.batches()] == ["cancelled"]


def test_dropping_a_pipeline_and_its_model_cancels_their_batch(page: psycopg.Connection, stub: StubProvider) -> None:
    _send(page)
    page.execute("SELECT embedline.drop_pipeline('page')")
    page.execute("SELECT embedline.drop_model('stub')")
    page.execute("DROP TABLE page")
    _cancel(page, stub)


def test_a_version_is_filled_through_a_batch_which_its_end_cancels(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    stub.end_batches()
    _settle(page)
    create_stub_model(page, stub, "other", options='{"batch_api": true}', document_prefix="read: ")
    stub.batch_api(is_open=True)
    number = add_version(page, "other", index_method="none")
    _send(page)
    (batch,) = stub.batches()
    assert all(text.startswith("read: ") for text in batch["texts"])
    assert scalar(page, "SELECT in_batches FROM embedline.versions WHERE version = %s", (number,)) == _ROWS
    page.execute("SELECT embedline.drop_embedding_version('page', %s)", (number,))
    _cancel(page, stub)
    stub.batch_api()
    number = add_version(page, "other", index_method="none")

    def is_filled() -> bool:
        page.execute(_HURRY)
        return bool(scalar(page, "SELECT state = 'complete' FROM embedline.versions WHERE version = %s", (number,)))

    with working(page):
        wait_until(is_filled, 30, "the version is complete")
    assert scalar(page, "SELECT vectors FROM embedline.versions WHERE version = %s", (number,)) == _ROWS
    assert stub.counts().get("requests", 0) == 0
    assert set(_paid(stub).values()) == {1}
    assert scalar(page, "SELECT count(*) FROM embedline.provider_batch_text") == 0


def test_nothing_is_sent_while_paused_and_nothing_waits_without_the_option(
    page: psycopg.Connection, stub: StubProvider
) -> None:
    stub.batch_api(status={"POST /v1/files": [500, 100]})
    with working(page):
        wait_until(lambda: "POST /v1/files" in stub.batch_calls(), 20, "a batch is tried")
    page.execute("UPDATE embedline.provider_batch SET state = 'collecting', last_error = NULL, next_at = now()")
    page.execute("SELECT embedline.pause_pipeline('page')")
    stub.batch_api()
    _send(page)
    assert not stub.batch_calls()
    page.execute("SELECT embedline.resume_pipeline('page')")
    page.execute("SELECT embedline.alter_model('stub', options => '{\"batch_api\": null}')")
    _settle(page)
    _assert_paid_once(page, stub)
    assert not stub.batch_calls()


@pytest.mark.parametrize("status", [404, 401])
def test_rows_leave_a_batch_that_could_not_be_sent_when_the_option_goes(
    page: psycopg.Connection, stub: StubProvider, status: int
) -> None:
    # Without an endpoint for batches even the search for one is refused.
    listed = {"GET /v1/batches": [404, 100]} if status == 404 else {}
    stub.batch_api(status={"POST /v1/files": [status, 100], **listed})
    _send(page)
    assert scalar(page, "SELECT state FROM embedline.provider_batch") == "sending"
    page.execute("SELECT embedline.alter_model('stub', options => '{\"batch_api\": null}')")
    _settle(page)
    _assert_paid_once(page, stub)
    assert scalar(page, "SELECT outcome FROM embedline.provider_batch") == "dissolved"


@pytest.mark.parametrize("word", ["half", "nul", "long number"])
def test_an_odd_line_holds_up_no_other_answer(page: psycopg.Connection, stub: StubProvider, word: str) -> None:
    stub.batch_api(lines={"page row 1 ": word})
    stub.behave(remember=True, rules=[{"match": "page row 1 ", "status": 400, "body": "no"}])
    _settle(page)
    assert list(dead_letters(page)) == [1]
    assert assert_all_settled(page, stub.dimensions) == _ROWS - 1


def test_an_odd_reason_for_a_refusal_ends_the_batch(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.batch_api(outcomes=["failed"], reason=["bad", "cut in \ud83d", None])
    _settle(page)
    _assert_paid_once(page, stub)


def test_the_file_of_a_batch_that_is_refused_is_deleted(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.batch_api(status={"POST /v1/batches": [400, 1]})
    _settle(page)
    _assert_paid_once(page, stub)
    calls = stub.batch_calls()
    assert calls.count("POST /v1/files") == 2
    assert calls[2] == "DELETE /v1/files/ID"
    assert calls.count("DELETE /v1/files/ID") == 3


def test_a_large_change_waits_and_a_single_edit_goes_at_once(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.end_batches()
    _settle(page)
    stub.batch_api(is_open=True)
    stub.forget()
    page.execute("SELECT embedline.configure_bulk('page', bulk_rows => 10)")
    insert_rows(page, 101, 112)
    page.execute("UPDATE page SET body = body || ' again' WHERE id <= 20")
    # Ten rows are not more than ten.
    insert_rows(page, 201, 210)
    page.execute("UPDATE page SET body = 'edited 101' WHERE id = 101")
    _send(page)
    (batch,) = stub.batches()
    assert sorted(batch["texts"]) == sorted(
        row[0] for row in page.execute("SELECT body FROM page WHERE id <= 20 OR id BETWEEN 102 AND 112").fetchall()
    )
    assert len(_paid(stub)) == 11
    stub.end_batches()
    _settle(page)
    assert assert_all_settled(page, stub.dimensions) == _ROWS + 22
    page.execute("SELECT embedline.configure_bulk('page')")
    stub.batch_api(is_open=True)
    insert_rows(page, 301, 320)
    _send(page)
    assert not stub.batches()


def test_two_rules_that_are_set_at_the_same_time_follow_each_other(page: psycopg.Connection) -> None:
    errors: list[Exception] = []

    def set_rule() -> None:
        try:
            with psycopg.connect(dsn_of(page), autocommit=True) as other:
                other.execute("SELECT embedline.configure_bulk('page', bulk_rows => 20)")
        except Exception as error:
            errors.append(error)

    with psycopg.connect(dsn_of(page)) as first:
        first.execute("SELECT embedline.configure_bulk('page', bulk_rows => 10)")
        second = threading.Thread(target=set_rule, daemon=True)
        second.start()
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%configure_bulk%'"
        wait_until(lambda: scalar(page, waits) == 1, 20, "the second call waits")
    second.join(20)
    assert errors == []
    assert scalar(page, "SELECT bulk_rows FROM embedline.bulk_rule") == 20


def test_changes_of_a_window_of_the_day_wait(page: psycopg.Connection, stub: StubProvider) -> None:
    stub.end_batches()
    _settle(page)
    stub.batch_api(is_open=True)
    hour = scalar(page, "SELECT date_trunc('hour', now() AT TIME ZONE 'UTC')::time::text")
    around = (
        "SELECT embedline.configure_bulk('page', NULL, %s::time - interval '1 hour', %s::time + interval '2 hours')"
    )
    apart = "SELECT embedline.configure_bulk('page', NULL, %s::time + interval '2 hours', %s::time - interval '1 hour')"
    page.execute(apart, (hour, hour))
    page.execute("UPDATE page SET body = 'edited 1' WHERE id = 1")
    _send(page)
    assert not stub.batches()
    page.execute(around, (hour, hour))
    page.execute("UPDATE page SET body = 'edited 2' WHERE id = 2")
    _send(page)
    assert [batch["texts"] for batch in stub.batches()] == [["edited 2"]]
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="needs two different times"):
        page.execute("SELECT embedline.configure_bulk('page', NULL, '22:00')")
