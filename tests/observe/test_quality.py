"""Quality over time: canaries, reach, drift, lag, and sampled queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest

from conftest import MakeRole
from embedline.client.build_index import PsycopgClient, build
from embedline.observe.quality_series import has_fallen, interval_beside
from generated_names import PAGE
from stub_provider import StubProvider
from support import AS_THE_PLANNER_LIKES, TO_THE_INDEX, drain, scalar, wait_until
from working import create_stub_model, create_stub_pipeline, dsn_of, insert_rows, work_until_idle, working

ROWS = 90
_ALERTS = "SELECT alert, severity, subject FROM embedline.alert WHERE alert <> 'old_pgvector'"
_CHECK = "SELECT kind, value, baseline, verdict FROM embedline.check_quality('page')"


@pytest.fixture
def pages(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """A pipeline on the stub with a canary for each row: its own text."""
    create_stub_model(stub_database, stub, price_per_million_tokens=1)
    create_stub_pipeline(stub_database, rows=ROWS)
    drain(stub_database)
    stub_database.execute("DROP TABLE IF EXISTS canary; CREATE TABLE canary (query text, key text)")
    stub_database.execute("INSERT INTO canary SELECT body, id::text FROM page")
    return stub_database


def _alerts(connection: psycopg.Connection) -> dict[str, tuple[str, str]]:
    return {name: (severity, subject) for name, severity, subject in connection.execute(_ALERTS).fetchall()}


def _check(connection: psycopg.Connection) -> dict[str, tuple[Any, ...]]:
    """Measure now; return value, baseline and verdict by kind."""
    return {kind: tuple(row) for kind, *row in connection.execute(_CHECK).fetchall()}


def test_a_third_of_the_canaries_rows_deleted_raises_an_alert_that_their_return_ends(pages: psycopg.Connection) -> None:
    assert scalar(pages, "SELECT embedline.set_canaries('page', 'canary')") == ROWS
    assert _check(pages)["canary"] == (1, 1, "good")
    assert _alerts(pages) == {}
    pages.execute("CREATE TABLE kept AS SELECT * FROM page WHERE id % 3 = 0; DELETE FROM page WHERE id % 3 = 0")
    value, baseline, verdict = _check(pages)["canary"]
    assert (value, baseline, verdict) == (0.6667, 1, "poor")
    assert _alerts(pages) == {"quality_fell": ("warning", "page")}
    pages.execute("INSERT INTO page SELECT * FROM kept; DROP TABLE kept")
    drain(pages)
    assert _check(pages)["canary"] == (1, 1, "good")
    assert _alerts(pages) == {}


def test_accept_quality_makes_the_last_measurement_the_baseline(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_canaries('page', 'canary')")
    _check(pages)
    pages.execute("DELETE FROM page WHERE id % 3 = 0")
    _check(pages)
    assert set(_alerts(pages)) == {"quality_fell"}
    pages.execute("SELECT embedline.accept_quality('page')")
    assert _alerts(pages) == {}
    value, baseline, verdict = _check(pages)["canary"]
    assert (value, baseline, verdict) == (0.6667, 0.6667, "good")
    assert scalar(pages, "SELECT accepted_by = session_user FROM embedline.quality_baseline WHERE kind = 'canary'")


def test_new_canaries_have_a_new_baseline_and_none_end_the_checks(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_canaries('page', 'canary')")
    _check(pages)
    pages.execute("DELETE FROM page WHERE id % 3 = 0")
    _check(pages)
    pages.execute("DELETE FROM canary WHERE key::int % 3 = 0")
    assert scalar(pages, "SELECT embedline.set_canaries('page', 'canary')") == ROWS * 2 // 3
    assert _alerts(pages) == {}
    assert _check(pages)["canary"] == (1, 1, "good")
    pages.execute("SELECT embedline.set_canaries('page', NULL)")
    assert "canary" not in _check(pages)


def test_an_interval_is_that_of_the_paired_differences() -> None:
    # By hand: 98 queries and the two made-up ones, of which 30 fall from 1 to 0. The mean difference is -30 / 100, its
    # variance (30 + 2) / 100 - 0.3^2 = 0.23, so the interval is -0.3 -+ 1.96 * sqrt(0.23 / 100) = -0.394 to -0.206.
    before, now = np.ones(98), np.concatenate([np.zeros(30), np.ones(68)])
    assert interval_beside(before, now) == pytest.approx((0.606, 0.794), abs=0.01)
    assert has_fallen(float(now.mean()), interval_beside(before, now), 1.0)
    # 48 queries, of which 2 fall: -2 / 50 -+ 1.96 * sqrt((4 / 50 - 0.04^2) / 50) = -0.118 to 0.038 decides nothing.
    before, now = np.ones(48), np.concatenate([np.zeros(2), np.ones(46)])
    assert interval_beside(before, now) == pytest.approx((0.882, 1.0), abs=0.02)
    assert not has_fallen(float(now.mean()), interval_beside(before, now), 1.0)


def test_a_fall_of_less_than_two_points_is_none() -> None:
    assert not has_fallen(0.97, (0.95, 0.98), 0.989)
    assert has_fallen(0.97, (0.95, 0.98), 0.99)


def test_a_silently_changed_model_is_found_by_the_probes(pages: psycopg.Connection, stub: StubProvider) -> None:
    assert _check(pages)["drift"] == (1, None, "good")
    assert _check(pages)["drift"][0] == 1
    stub.behave(moved=1)
    assert _check(pages)["drift"][2] == "poor"
    assert _alerts(pages) == {"model_changed": ("critical", "page")}
    pages.execute(str(scalar(pages, "SELECT remedy FROM embedline.alert")).encode())
    work_until_idle(pages)
    assert _alerts(pages) == {}
    assert _check(pages)["drift"][2] == "good"


def test_the_model_as_it_was_ends_the_alert_and_so_does_accept_quality(
    pages: psycopg.Connection, stub: StubProvider
) -> None:
    _check(pages)
    stub.behave(moved=1)
    _check(pages)
    assert set(_alerts(pages)) == {"model_changed"}
    stub.behave()
    _check(pages)
    assert _alerts(pages) == {}
    stub.behave(moved=1)
    _check(pages)
    pages.execute("SELECT embedline.accept_quality('page')")
    assert _alerts(pages) == {}
    assert _check(pages)["drift"][2] == "good"


def test_probes_are_in_the_ledger_and_a_budget_stops_them(pages: psycopg.Connection) -> None:
    spent = "SELECT coalesce(sum(tokens), 0) FROM embedline.usage"
    before = scalar(pages, spent)
    _check(pages)
    assert scalar(pages, spent) > before
    pages.execute("SELECT embedline.set_budget('day', model => 'stub', tokens => 1)")
    assert _check(pages)["drift"] == (None, None, "not measured")
    error = scalar(pages, "SELECT error FROM embedline.quality WHERE kind = 'drift' LIMIT 1")
    assert "budget" in error
    pages.execute("SELECT embedline.drop_budget(model => 'stub')")


def test_a_provider_that_is_down_leaves_a_gap_and_the_other_kinds_go_on(
    pages: psycopg.Connection, stub: StubProvider
) -> None:
    stub.behave(rules=[{"match": "", "status": 503}])
    found = _check(pages)
    assert (found["drift"][2], found["lag"][2]) == ("not measured", "good")
    assert _alerts(pages) == {}


def test_rows_that_waited_raise_the_alert_of_the_lag(pages: psycopg.Connection) -> None:
    insert_rows(pages, ROWS + 1, ROWS + 5)
    pages.execute(f"UPDATE {PAGE('inbox')} SET enqueued_at = enqueued_at - interval '5 minutes'")
    drain(pages)
    value, _, verdict = _check(pages)["lag"]
    assert (value > 300, verdict) == (True, "poor")
    assert _alerts(pages) == {"indexing_lag": ("warning", "page")}
    insert_rows(pages, ROWS + 6, ROWS + 6)
    drain(pages)
    assert _check(pages)["lag"][2] == "good"
    assert _alerts(pages) == {}


def _search(connection: psycopg.Connection, text: str) -> None:
    assert connection.execute("SELECT key FROM embedline.search('page', %s, 3)", (text,)).fetchall()


def _sampled(connection: psycopg.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT query FROM embedline.query_sample ORDER BY query").fetchall()]


def test_no_query_is_noted_before_sampling_is_switched_on_nor_after(pages: psycopg.Connection) -> None:
    pipeline = scalar(pages, "SELECT pipeline_id FROM embedline.pipeline")
    _search(pages, "before")
    pages.execute("SELECT embedline._note_query(%s, 'by hand')", (pipeline,))
    assert _sampled(pages) == []
    pages.execute("SELECT embedline.sample_queries('page', 1)")
    _search(pages, "one")
    _search(pages, "two")
    assert _sampled(pages) == ["one", "two"]
    pages.execute("SELECT embedline.sample_queries('page', 0)")
    assert _sampled(pages) == []
    _search(pages, "after")
    assert _sampled(pages) == []


def test_a_dropped_pipeline_leaves_no_noted_query(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.sample_queries('page', 1)")
    _search(pages, "one")
    pages.execute("SELECT embedline.drop_pipeline('page'); DROP TABLE page")
    assert _sampled(pages) == []


def test_noted_queries_go_after_their_retention(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.sample_queries('page', 1, '1 hour')")
    _search(pages, "old")
    pages.execute("UPDATE embedline.query_sample SET asked_at = asked_at - interval '61 minutes'")
    _search(pages, "new")
    assert _sampled(pages) == ["new"]
    pages.execute("UPDATE embedline.query_sample SET asked_at = asked_at - interval '61 minutes'")
    pages.execute("CALL embedline.run_nightly(repair => false)")
    assert _sampled(pages) == []


def test_a_role_that_searches_has_its_query_noted_but_not_in_a_read_only_transaction(
    pages: psycopg.Connection, make_role: MakeRole
) -> None:
    reader = make_role("embedline_reader")
    pages.execute(f"GRANT SELECT ON page TO {reader}; SELECT embedline.sample_queries('page', 1); SET ROLE {reader}")
    with pages.transaction():
        pages.execute("SET TRANSACTION READ ONLY")
        _search(pages, "read only")
    with pages.transaction():
        pages.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        _search(pages, "serializable")
    _search(pages, "noted")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        _sampled(pages)
    assert scalar(pages, "SELECT count(*) FROM embedline.quality") == 0
    pages.execute(f"RESET ROLE; DROP OWNED BY {reader}")
    assert _sampled(pages) == ["noted"]


def test_a_search_does_not_wait_for_a_lock_on_the_noted_queries(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.sample_queries('page', 1)")
    with psycopg.connect(dsn_of(pages)) as other:
        other.execute("LOCK TABLE embedline.query_sample")
        _search(pages, "locked out")
    assert _sampled(pages) == []


def test_a_worker_checks_what_is_due_and_again_after_many_deletions(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_canaries('page', 'canary')")
    count = "SELECT count(*) FROM embedline.quality WHERE kind = 'canary'"

    def check_due() -> int:
        pages.execute("SELECT embedline._quality_step(NULL, true)")
        while scalar(pages, "SELECT embedline._quality_step(NULL, false)") != "idle":
            pass
        return int(scalar(pages, count))

    assert check_due() == 1
    assert check_due() == 1
    later = "UPDATE embedline.quality_check SET measured_at = measured_at - interval '2 minutes', seconds = 0.1"
    pages.execute(later)
    assert check_due() == 1
    pages.execute("DELETE FROM page WHERE id % 3 = 0")
    drain(pages)
    assert check_due() == 2
    assert set(_alerts(pages)) == {"quality_fell"}
    # After a poor one the next is due soon. Of many poor ones the first and the last of an hour are kept.
    for _ in range(3):
        pages.execute(later)
        assert check_due() == 3
    pages.execute(later)
    pages.execute("SELECT embedline.configure('quality_check_hours', 0); DELETE FROM embedline.quality_check")
    assert check_due() == 0
    pages.execute("SELECT embedline.configure('quality_check_hours')")


def test_a_resident_worker_checks_what_is_due(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_canaries('page', 'canary')")
    with working(pages):
        checked = "SELECT count(*) FROM embedline.quality WHERE kind = 'canary' AND verdict = 'good'"
        wait_until(lambda: scalar(pages, checked) == 1, 30, "a worker has checked")
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1164802353"
    assert scalar(pages, held) == 0


def test_a_nightly_run_does_the_checks_that_are_due(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.set_canaries('page', 'canary')")
    pages.execute("CALL embedline.run_nightly(repair => false)")
    assert pages.execute("SELECT kind, verdict FROM embedline.quality").fetchall() == [("canary", "good")]
    pages.execute("CALL embedline.run_nightly(repair => false)")
    assert scalar(pages, "SELECT count(*) FROM embedline.quality") == 1


def test_a_paused_pipeline_is_refused(pages: psycopg.Connection) -> None:
    pages.execute("SELECT embedline.pause_pipeline('page')")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="is paused"):
        _check(pages)
    assert pages.execute("SELECT * FROM embedline.check_quality()").fetchall() == []


def test_a_damaged_graph_raises_the_alerts_of_reach(stub_database: psycopg.Connection, stub: StubProvider) -> None:
    connection = stub_database
    create_stub_model(connection, stub)
    create_stub_pipeline(connection, rows=1000, index_method="hnsw")
    drain(connection)
    assert build(PsycopgClient(connection), "page") is not None
    connection.execute(f"ANALYZE page, {PAGE('chunk')}, {PAGE.version(1)}")
    connection.execute(TO_THE_INDEX)
    connection.execute("SELECT embedline.sample_queries('page', 1)")
    for number in range(20):
        _search(connection, f"question {number}")
    good = _check(connection)
    assert (good["reach"][2], good["fidelity"][2]) == ("good", "good")
    assert _alerts(connection) == {}
    index = PAGE.index(1)
    connection.execute(f"ALTER INDEX {index} SET (m = 2, ef_construction = 4); REINDEX INDEX {index}")
    assert _check(connection)["reach"][2] == "poor"
    assert set(_alerts(connection)) == {"quality_fell", "recall_low"}
    connection.execute(f"ALTER INDEX {index} SET (m = 16, ef_construction = 64); REINDEX INDEX {index}")
    _check(connection)
    assert _alerts(connection) == {}
    connection.execute(AS_THE_PLANNER_LIKES)
