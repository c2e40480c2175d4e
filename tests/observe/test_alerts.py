"""A fault matrix: each fault raises its alert in embedline.alert and embedline.doctor(), and its remedy ends it."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from generated_names import PAGE
from stub_provider import StubProvider
from support import create_pages, create_pipeline, drain, scalar, settle, wait_until
from working import create_stub_model, create_stub_pipeline, dsn_of, insert_rows, work_until_idle, working

# An alert's name follows its severity, or stands in the CASE that tells findings of verify apart.
_NAMES = r"(?:END|'critical'|'warning'|'note'),\s*'([a-z_]+)'|(?<=THEN ')(?:model|vectors)_[a-z]+"
_ALERTS = "SELECT alert, severity, subject FROM embedline.alert WHERE alert <> 'old_pgvector'"


def _alerts(connection: psycopg.Connection) -> dict[str, tuple[str, str]]:
    """Return severity and subject of each alert, by its name."""
    found = connection.execute(_ALERTS).fetchall()
    assert {(name, subject) for name, _, subject in found} <= set(
        connection.execute("SELECT finding, subject FROM embedline.doctor()").fetchall()
    )
    return {name: (severity, subject) for name, severity, subject in found}


def _remedy(connection: psycopg.Connection, name: str) -> str:
    return str(scalar(connection, "SELECT remedy FROM embedline.alert WHERE alert = %s", (name,)))


@pytest.fixture
def pages(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on the stub whose 30 rows are embedded."""
    create_stub_model(stub_database, stub, price_per_million_tokens=1)
    create_stub_pipeline(stub_database, rows=30)
    drain(stub_database)
    assert _alerts(stub_database) == {}
    return stub_database


def test_a_provider_that_is_down(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"match": "", "status": 503}])
    insert_rows(pages, 31, 40)
    drain(pages)
    assert _alerts(pages) == {"circuit_open": ("critical", "stub")}
    stub.behave()
    pages.execute(_remedy(pages, "circuit_open").encode())
    work_until_idle(pages)
    assert _alerts(pages) == {}


def test_a_storm_of_429(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"match": "", "status": 429, "headers": {"Retry-After": "60"}}])
    insert_rows(pages, 31, 40)
    drain(pages)
    assert _alerts(pages) == {"circuit_open": ("critical", "stub"), "rate_limited": ("warning", "stub")}
    stub.behave()
    pages.execute("SELECT embedline.resume_model('stub')")
    work_until_idle(pages)
    assert _alerts(pages) == {}


def test_requests_that_fail_now_and_then(pages: psycopg.Connection, stub: StubProvider) -> None:
    for first in (31, 41, 51):
        stub.behave(rules=[{"match": "", "status": 500, "times": 1}])
        insert_rows(pages, first, first + 9)
        work_until_idle(pages)
    assert _alerts(pages) == {"provider_failing": ("warning", "stub")}
    pages.execute("UPDATE embedline.finished_batch SET finished_at = finished_at - interval '61 seconds'")
    assert _alerts(pages) == {}


def test_rows_that_wait_without_a_worker(pages: psycopg.Connection) -> None:
    insert_rows(pages, 31, 31)
    assert _alerts(pages) == {}
    pages.execute("SELECT embedline.configure('alert_lag_seconds', 1)")
    wait_until(lambda: set(_alerts(pages)) == {"no_worker", "search_stale"}, 10, "the row has waited for a second")
    since = (
        "SELECT min(since) < clock_timestamp() - interval '1 second' FROM embedline.alert WHERE alert = 'search_stale'"
    )
    assert scalar(pages, since)
    work_until_idle(pages)
    assert _alerts(pages) == {}
    pages.execute("SELECT embedline.configure('alert_lag_seconds')")


def test_a_queue_that_grows_becomes_critical(pages: psycopg.Connection) -> None:
    insert_rows(pages, 31, 60)
    pages.execute(f"UPDATE {PAGE('inbox')} SET enqueued_at = enqueued_at - interval '5 minutes'")
    assert _alerts(pages)["search_stale"] == ("warning", "page")
    pages.execute(f"UPDATE {PAGE('inbox')} SET enqueued_at = enqueued_at - interval '15 minutes'")
    assert _alerts(pages)["search_stale"] == ("critical", "page")
    drain(pages)
    assert _alerts(pages) == {}


def test_dead_letters(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(poison="page row 33 ")
    insert_rows(pages, 31, 35)
    drain(pages)
    assert _alerts(pages) == {"dead_letters": ("warning", "page")}
    assert "page row" not in str(scalar(pages, "SELECT message FROM embedline.alert WHERE alert = 'dead_letters'"))
    stub.behave()
    pages.execute(_remedy(pages, "dead_letters").encode())
    drain(pages)
    assert _alerts(pages) == {}


def test_a_budget_that_is_used_up(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_budget('day', model => 'stub', tokens => 1)")
    assert _alerts(pages)["budget_exhausted"] == ("critical", "model stub")
    pages.execute("SELECT embedline.drop_budget(model => 'stub')")
    assert _alerts(pages) == {}


def test_a_source_that_is_gone(pages: psycopg.Connection) -> None:
    pages.execute("ALTER TABLE page RENAME TO page_old; CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    assert _alerts(pages)["source_changed"] == ("critical", "page")
    pages.execute(_remedy(pages, "source_changed").encode())
    drain(pages)
    assert "source_changed" not in _alerts(pages)
    pages.execute("DROP TABLE page_old")


def test_an_invalid_index(database: psycopg.Connection) -> None:
    create_pages(database, 20)
    create_pipeline(database)
    settle(database)
    index = f"'{PAGE.index(1)}'::regclass"
    database.execute(str(scalar(database, "SELECT embedline.index_statement('page')")).encode())
    assert _alerts(database) == {}
    database.execute(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = {index}")
    assert _alerts(database) == {"index_invalid": ("critical", "page_v1_embedding_idx")}
    database.execute(f"UPDATE pg_index SET indisvalid = true WHERE indexrelid = {index}")
    assert _alerts(database) == {}


def test_a_model_that_was_changed_silently(pages: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(moved=1)
    pages.execute("SELECT count(*) FROM embedline.verify('page', sample => 20)")
    assert _alerts(pages) == {"model_changed": ("critical", "page")}
    pages.execute(_remedy(pages, "model_changed").encode())
    work_until_idle(pages)
    pages.execute("SELECT count(*) FROM embedline.verify('page', sample => 20)")
    assert _alerts(pages) == {}


def test_a_disk_that_is_nearly_full(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.configure('alert_disk_percent', 100)")
    assert _alerts(pages) == {"disk_low": ("critical", "server")}
    pages.execute("SELECT embedline.configure('alert_disk_percent')")
    assert _alerts(pages) == {}


def test_a_new_version_that_stands_still(pages: psycopg.Connection, stub: StubProvider) -> None:
    create_stub_model(pages, stub, "other", document_prefix="other: ")
    pages.execute("SELECT embedline.add_embedding_version('page', 'other')")
    assert _alerts(pages) == {}
    pages.execute("UPDATE embedline.version SET created_at = created_at - interval '11 minutes' WHERE number = 2")
    assert _alerts(pages) == {"upgrade_stalled": ("warning", "page version 2")}
    work_until_idle(pages)
    assert _alerts(pages) == {}


def test_workers_note_since_when_an_alert_stands(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_budget('day', model => 'stub', tokens => 1)")
    pages.execute("UPDATE embedline.alert_state SET since = since - interval '1 hour'")
    with working(pages):
        noted = "SELECT count(*) FROM embedline.alert_state WHERE alert = 'budget_exhausted'"
        wait_until(lambda: scalar(pages, noted) == 1, 20, "a worker has noted the alert")
    pages.execute("SELECT embedline.drop_budget(model => 'stub')")
    pages.execute("SELECT embedline._note_alerts()")
    assert scalar(pages, "SELECT count(*) FROM embedline.alert_state WHERE alert = 'budget_exhausted'") == 0


def test_a_killed_worker_whose_rows_wait(pages: psycopg.Connection, stub: StubProvider) -> None:
    pages.execute("SELECT embedline.configure('alert_lag_seconds', 1)")
    stub.behave(latency=30)
    with psycopg.connect(dsn_of(pages), autocommit=True):
        insert_rows(pages, 31, 40)
        with working(pages) as workers:
            wait_until(lambda: stub.in_flight() > 0, 20, "the worker has sent the rows")
            pages.execute("SELECT pg_terminate_backend(%s)", (workers[0].pid,))
            wait_until(lambda: "no_worker" in _alerts(pages), 30, "the alert is raised")
            workers[0].error = None
    stub.behave()
    pages.execute("SELECT embedline.configure('alert_lag_seconds')")
    work_until_idle(pages)
    assert _alerts(pages) == {}


def test_the_on_call_page_and_the_reference_name_each_alert() -> None:
    root = Path(__file__).resolve().parents[2]
    texts = [path.read_text(encoding="utf-8") for path in sorted((root / "sql" / "functions").glob("_*_alerts.sql"))]
    named = {found[1] or found[0] for text in texts for found in re.finditer(_NAMES, text)}
    assert len(named) > 15
    for page in ("docs/on-call.md", "docs/reference/monitoring.md"):
        text = (root / page).read_text(encoding="utf-8")
        assert {name for name in named if f"`{name}`" not in text} == set()
