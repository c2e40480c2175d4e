"""The ledger, budgets and rate limits: what may be sent, what stops, and what goes on."""

from __future__ import annotations

import itertools
import time
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import errors

from conftest import Connect, MakeRole
from ledger import age, blocked_until, install_ledger_functions, reserve, settle, tokens_left
from support import create_pages, create_pipeline, scalar

DAY = 86_400


@pytest.fixture
def ledger(database: psycopg.Connection) -> psycopg.Connection:
    """Pipelines page and second, both of model static-256."""
    create_pages(database, 3)
    create_pipeline(database)
    create_pipeline(database, "second", chunking="none")
    install_ledger_functions(database)
    return database


def set_budget(connection: psycopg.Connection, period: str = "day", **options: Any) -> None:
    """Call embedline.set_budget."""
    named = ", ".join(f"{name} => %s" for name in options)
    connection.execute(f"SELECT embedline.set_budget(%s, {named})", (period, *options.values()))


def budget(connection: psycopg.Connection, *columns: str) -> list[tuple[Any, ...]]:
    """Return columns of embedline.budget."""
    return connection.execute(
        f"SELECT {', '.join(columns)} FROM embedline.budget ORDER BY scope, name, unit"
    ).fetchall()


def test_a_local_model_without_limits_has_no_ledger(ledger: psycopg.Connection) -> None:
    assert blocked_until(ledger) is None
    grant = reserve(ledger, [100, 200])
    assert (grant.count, grant.reservation_id, grant.wait_seconds) == (2, None, None)
    assert scalar(ledger, "SELECT count(*) FROM embedline.usage") == 0


def test_a_price_makes_the_ledger_count(ledger: psycopg.Connection) -> None:
    assert blocked_until(ledger) is None
    ledger.execute("SELECT embedline.set_price('static-256', 0.5)")
    assert blocked_until(ledger) is None
    grant = reserve(ledger, [400_000, 600_000])
    settle(ledger, grant.reservation_id, 2_000_000)
    shown = ledger.execute("SELECT model, pipeline, requests, tokens, reserved_tokens, money FROM embedline.usage")
    assert shown.fetchall() == [("static-256", "page", 2, 2_000_000, 0, Decimal(1))]


def test_a_changed_price_counts_from_then_on(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 2)")
    reserve(ledger, [1_000_000])
    ledger.execute("SELECT embedline.set_price('static-256', 3)")
    reserve(ledger, [1_000_000])
    assert scalar(ledger, "SELECT sum(money) FROM embedline.usage") == 5


def test_the_budget_stops_within_one_batch_and_says_until_when(ledger: psycopg.Connection) -> None:
    set_budget(ledger, pipeline="page", tokens=1000)
    grant = reserve(ledger, [400, 400, 400, 100])
    # In order: the last one would fit, but what comes before it does not.
    assert grant.count == 2
    assert grant.wait_seconds is not None
    assert 0 < grant.wait_seconds <= DAY
    assert 'budget of pipeline "page" of 1000 tokens a day leaves 200 tokens until' in str(grant.reason)
    assert str(grant.reason).endswith("the next request needs 400")
    assert budget(ledger, "spent", "reserved", "remaining", "state") == [(0, 800, 200, "exhausted")]
    assert blocked_until(ledger) == pytest.approx(grant.wait_seconds, abs=5)
    assert reserve(ledger, [400]).count == 0
    # Another pipeline of the same model has its own purse.
    assert blocked_until(ledger, "second") is None
    assert reserve(ledger, [5000], "second").count == 1


def test_settling_corrects_the_reservation_once(ledger: psycopg.Connection) -> None:
    set_budget(ledger, pipeline="page", tokens=1000)
    first, second = reserve(ledger, [500]), reserve(ledger, [500])
    assert blocked_until(ledger) is not None
    settle(ledger, first.reservation_id, 100)
    settle(ledger, first.reservation_id, 1)
    assert blocked_until(ledger) is None
    settle(ledger, second.reservation_id, None)
    assert budget(ledger, "spent", "reserved", "remaining", "state") == [(600, 0, 400, "open")]
    assert tokens_left(ledger) == 400


def test_an_answer_above_the_estimate_shows_as_overspent(ledger: psycopg.Connection) -> None:
    set_budget(ledger, pipeline="page", tokens=1000)
    settle(ledger, reserve(ledger, [900]).reservation_id, 1200)
    assert budget(ledger, "remaining", "state") == [(-200, "exhausted")]
    assert reserve(ledger, [0]).count == 0
    assert tokens_left(ledger) == 0


def test_a_crash_between_reserving_and_settling_is_counted(ledger: psycopg.Connection, connect: Connect) -> None:
    set_budget(ledger, pipeline="page", tokens=1000)
    worker = connect()
    reserve(worker, [700])
    worker.close()
    assert reserve(ledger, [400]).count == 0
    age(ledger, "3 minutes")
    # No session will settle it any more: the roll-up closes it as it was estimated.
    assert scalar(ledger, "SELECT embedline._roll_up_usage()") == 1
    # Not of the budget: what is made older may be of the day before.
    assert ledger.execute("SELECT sum(tokens), sum(reserved_tokens) FROM embedline.usage").fetchone() == (700, 0)


def test_a_living_workers_open_reservation_is_not_rolled_up(ledger: psycopg.Connection, connect: Connect) -> None:
    set_budget(ledger, pipeline="page", tokens=1000)
    worker = connect()
    worker.execute("SELECT pg_advisory_lock(1164797804, 77)")
    grant = reserve(worker, [700], worker=77)
    age(ledger, "1 hour")
    assert scalar(ledger, "SELECT embedline._roll_up_usage()") == 0
    settle(worker, grant.reservation_id, 10)
    assert scalar(ledger, "SELECT embedline._roll_up_usage()") == 1
    # Not of the budget: what is made older may be of the day before.
    assert ledger.execute("SELECT sum(tokens), sum(reserved_tokens) FROM embedline.usage").fetchone() == (10, 0)


def test_rolling_up_changes_no_sum(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 0.02)")
    set_budget(ledger, "month", model="static-256", tokens=10_000_000, money=100)
    for pipeline, tokens in (("page", 1000), ("page", 2000), ("second", 4000)):
        settle(ledger, reserve(ledger, [tokens], pipeline).reservation_id, tokens + 1)
    reserve(ledger, [500])
    # Not before the beginning of the month, whenever this runs.
    ledger.execute(
        "UPDATE embedline.reservation SET reserved_at = greatest(reserved_at - interval '3 minutes',"
        " date_trunc('month', clock_timestamp(), 'UTC'))"
    )
    before = ledger.execute("SELECT * FROM embedline.usage ORDER BY pipeline").fetchall()
    spent = budget(ledger, "unit", "spent + reserved")
    rolled = scalar(ledger, "SELECT embedline._roll_up_usage()")
    assert rolled == scalar(ledger, "SELECT 4 - count(*) FROM embedline.reservation")
    after = ledger.execute("SELECT * FROM embedline.usage ORDER BY pipeline").fetchall()
    assert [row[:5] for row in after] == [row[:5] for row in before]
    assert budget(ledger, "unit", "spent + reserved") == spent
    assert scalar(ledger, "SELECT sum(money) FROM embedline.usage") == Decimal("0.00015006")


def test_workers_roll_the_ledger_up_by_themselves(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 1)")
    settle(ledger, reserve(ledger, [10]).reservation_id, 10)
    age(ledger, "5 minutes")
    ledger.execute("SELECT setval(pg_get_serial_sequence('embedline.reservation', 'reservation_id'), 499)")
    reserve(ledger, [20])
    assert scalar(ledger, "SELECT count(*) FROM embedline.reservation") == 1
    assert scalar(ledger, "SELECT sum(tokens) FROM embedline.usage") == 30


@pytest.mark.parametrize("rolled_up", [False, True])
def test_a_new_day_begins_with_a_full_budget(ledger: psycopg.Connection, rolled_up: bool) -> None:
    set_budget(ledger, pipeline="page", tokens=1000)
    settle(ledger, reserve(ledger, [1000, 1]).reservation_id, 1000)
    assert blocked_until(ledger) is not None
    # As if it were tomorrow.
    age(ledger, "1 day")
    ledger.execute("UPDATE embedline.budget_stop SET stopped_at = stopped_at - interval '1 day'")
    if rolled_up:
        assert scalar(ledger, "SELECT embedline._roll_up_usage()") == 1
    assert blocked_until(ledger) is None
    assert budget(ledger, "spent", "state") == [(0, "open")]
    assert reserve(ledger, [1000]).count == 1


def test_days_and_months_are_those_of_utc(ledger: psycopg.Connection) -> None:
    set_budget(ledger, "day", pipeline="page", tokens=1)
    set_budget(ledger, "month", model="static-256", tokens=1)
    ledger.execute("SET TimeZone = 'Asia/Tokyo'")
    query = "SELECT period, to_char(%s AT TIME ZONE 'UTC', 'HH24:MI:SS'), resets_at > now() FROM embedline.budget"
    for column in ("starts_at", "resets_at"):
        rows = ledger.execute(query.replace("%s", column) + " ORDER BY period").fetchall()
        assert rows == [("day", "00:00:00", True), ("month", "00:00:00", True)]
    assert scalar(ledger, "SELECT bool_and(resets_at - starts_at BETWEEN '1 day' AND '31 days') FROM embedline.budget")


def test_a_models_budget_is_shared_by_its_pipelines(ledger: psycopg.Connection) -> None:
    set_budget(ledger, model="static-256", tokens=1000)
    assert reserve(ledger, [600], "page").count == 1
    grant = reserve(ledger, [300, 300], "second")
    assert grant.count == 1
    assert 'budget of model "static-256"' in str(grant.reason)
    assert budget(ledger, "scope", "name", "reserved") == [("model", "static-256", 900)]
    # What a dropped pipeline spent stays spent.
    ledger.execute("SELECT embedline.drop_pipeline('page')")
    assert budget(ledger, "reserved") == [(900,)]


def test_the_tightest_of_several_budgets_decides(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 1000)")
    set_budget(ledger, "day", pipeline="page", tokens=1000)
    set_budget(ledger, "month", pipeline="page", tokens=100_000)
    set_budget(ledger, "month", model="static-256", money="0.7")
    assert tokens_left(ledger) == 700
    grant = reserve(ledger, [400, 400])
    assert grant.count == 1
    assert "0.7 money a month" in str(grant.reason)


def test_money_counts_at_the_price_of_its_time(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 0.13)")
    set_budget(ledger, "month", pipeline="page", money="0.00013")
    grant = reserve(ledger, [600, 600])
    assert grant.count == 1
    assert budget(ledger, "unit", "reserved", "remaining") == [("money", Decimal("0.000078"), Decimal("0.000052"))]
    settle(ledger, grant.reservation_id, 1000)
    assert budget(ledger, "spent", "remaining", "state") == [(Decimal("0.00013"), 0, "exhausted")]


def test_a_model_that_costs_nothing_is_never_stopped_by_money(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 0)")
    set_budget(ledger, "month", pipeline="page", money="0.01")
    assert tokens_left(ledger) is None
    assert reserve(ledger, [10**9]).count == 1


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT embedline.set_budget('day', pipeline => 'page', tokens => 2000)",
        "SELECT embedline.drop_budget(pipeline => 'page')",
        "SELECT embedline.drop_budget(pipeline => 'page', period => 'day')",
    ],
)
def test_a_statement_resumes_the_work(ledger: psycopg.Connection, statement: str) -> None:
    set_budget(ledger, pipeline="page", tokens=1000)
    assert reserve(ledger, [900, 300]).count == 1
    assert blocked_until(ledger) is not None
    ledger.execute(statement.encode())
    assert blocked_until(ledger) is None
    assert reserve(ledger, [300]).count == 1


def test_a_budget_replaces_the_one_of_its_period(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 1)")
    set_budget(ledger, "day", pipeline="page", tokens=1000, money=5)
    set_budget(ledger, "month", pipeline="page", tokens=9000)
    assert budget(ledger, "period", "unit", "amount")[0] == ("day", "money", 5)
    set_budget(ledger, "day", pipeline="page", tokens=2000)
    assert sorted(budget(ledger, "period", "unit", "amount")) == [("day", "tokens", 2000), ("month", "tokens", 9000)]


def test_zero_stops_all_spending(ledger: psycopg.Connection) -> None:
    set_budget(ledger, pipeline="page", tokens=0)
    assert blocked_until(ledger) is not None
    assert reserve(ledger, [1]).count == 0


def test_embed_pending_keeps_no_lock_and_no_stop(ledger: psycopg.Connection, connect: Connect) -> None:
    set_budget(ledger, model="static-256", tokens=1000)
    application = connect(autocommit=False)
    assert reserve(application, [300], worker=None).count == 1
    # Workers go on while that transaction is open; they cannot see what it reserved.
    other = connect()
    other.execute("SET lock_timeout = '2s'")
    assert reserve(other, [800]).count == 1
    application.commit()
    assert budget(ledger, "reserved", "state") == [(1100, "exhausted")]
    assert reserve(application, [300], worker=None).count == 0
    application.commit()
    assert scalar(ledger, "SELECT count(*) FROM embedline.budget_stop") == 0
    assert scalar(ledger, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1164799025") == 0


def test_a_failure_while_reserving_leaves_no_lock(ledger: psycopg.Connection, connect: Connect) -> None:
    set_budget(ledger, model="static-256", tokens=1000)
    ledger.execute("ALTER TABLE embedline.reservation ADD CONSTRAINT fails CHECK (tokens <> 13)")
    application = connect()
    with pytest.raises(psycopg.Error):
        reserve(application, [13], worker=None)
    assert scalar(ledger, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1164799025") == 0
    assert reserve(application, [14], worker=None).count == 1


def test_requests_per_minute_are_spread(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_rate_limit('static-256', requests_per_minute => 600)")
    grant = reserve(ledger, [5] * 100)
    # One second's worth and the one that finds the bucket just drained; not the whole minute's.
    assert grant.count == 11
    assert grant.wait_seconds is not None
    assert 0 < grant.wait_seconds < 1
    assert grant.reason == "rate limit of 600 requests a minute"
    assert 0 < (blocked_until(ledger) or 0) < 1
    age(ledger, "1 second")
    assert blocked_until(ledger) is None
    assert 9 <= reserve(ledger, [5] * 100).count <= 11


def test_no_minute_carries_more_than_the_limit(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_rate_limit('static-256', tokens_per_minute => 60000)")
    sent: list[tuple[float, int]] = []
    skipped, began = 0.0, time.monotonic()
    while (now := skipped + time.monotonic() - began) < 150:
        grant = reserve(ledger, [700] * 40, worker=None)
        if grant.count:
            sent.append((now, grant.count * 700))
        wait = grant.wait_seconds or 0.0
        assert 0 < wait <= 60
        age(ledger, f"{wait} seconds")
        skipped += wait
    for start, _ in sent:
        assert sum(tokens for at, tokens in sent if start <= at < start + 59.9) <= 60_000
    # And no less than nine tenths of it are used, without a long silence.
    assert sum(tokens for _, tokens in sent) > 0.9 * 150 * 1000
    times = [at for at, _ in sent]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 3


def test_a_request_above_the_minutes_limit_goes_alone(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_rate_limit('static-256', tokens_per_minute => 1000)")
    assert tokens_left(ledger) == 1000
    grant = reserve(ledger, [5000, 10])
    assert grant.count == 1
    assert grant.wait_seconds is not None
    assert grant.wait_seconds > 59
    age(ledger, "61 seconds")
    assert reserve(ledger, [10]).count == 1
    assert reserve(ledger, [5000]).count == 0


def test_settling_gives_the_rate_limit_back_what_was_not_used(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_rate_limit('static-256', tokens_per_minute => 6000)")
    grant = reserve(ledger, [6000])
    assert blocked_until(ledger) is not None
    settle(ledger, grant.reservation_id, 50)
    assert blocked_until(ledger) is None


def test_rate_limits_are_shared_by_sessions_and_pipelines(ledger: psycopg.Connection, connect: Connect) -> None:
    ledger.execute("SELECT embedline.set_rate_limit('static-256', requests_per_minute => 60)")
    assert reserve(connect(), [5, 5, 5], "page").count == 2
    assert reserve(connect(), [5], "second").count == 0
    ledger.execute("SELECT embedline.set_rate_limit('static-256')")
    assert reserve(connect(), [5], "second").count == 1
    assert scalar(ledger, "SELECT count(*) FROM embedline.rate_limit") == 0


def test_a_budget_and_a_rate_limit_hold_together(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_rate_limit('static-256', requests_per_minute => 60)")
    set_budget(ledger, pipeline="page", tokens=10)
    # The rate limit is the first to stop: this is no stop of the budget.
    assert reserve(ledger, [1] * 5).count == 2
    assert scalar(ledger, "SELECT count(*) FROM embedline.budget_stop") == 0
    age(ledger, "10 seconds")
    grant = reserve(ledger, [8, 8])
    assert grant.count == 1
    assert "budget" in str(grant.reason)


@pytest.mark.parametrize(
    ("statement", "message", "hint"),
    [
        ("set_budget('day', pipeline => 'page')", "needs tokens or money", "drop_budget"),
        ("set_budget('week', pipeline => 'page', tokens => 1)", "week", "'day'"),
        ("set_budget('day', tokens => 1)", "either a pipeline or a model", "pipeline =>"),
        ("set_budget('day', pipeline => 'page', model => 'static-256', tokens => 1)", "either", "pipeline =>"),
        ("set_budget('day', pipeline => 'page', tokens => -1)", "at least 0", "0 stops"),
        ("set_budget('day', pipeline => 'page', money => 'NaN')", "number", "without it"),
        ("set_budget('day', pipeline => 'page', money => 1)", "has no price", "set_price('static-256'"),
        ("set_budget('day', model => 'static-256', money => 1)", "has no price", "set_price('static-256'"),
        ("set_budget('day', pipeline => 'none', tokens => 1)", 'no pipeline "none"', "status"),
        ("set_budget('day', model => 'none', tokens => 1)", 'no model "none"', "create_model"),
        ("drop_budget(pipeline => 'page')", "no such budget", "embedline.budget"),
        ("set_price('static-256', -1)", "at least 0", "1,000,000"),
        ("set_price('none', 1)", 'no model "none"', "create_model"),
        ("set_rate_limit('static-256', 0)", "requests_per_minute must be at least 1", "NULL"),
        ("set_rate_limit('static-256', tokens_per_minute => -5)", "tokens_per_minute must be", "NULL"),
        ("create_model('x', 'openai', 'x', price_per_million_tokens => -1)", "at least 0", "1,000,000"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_hint(
    ledger: psycopg.Connection, statement: str, message: str, hint: str
) -> None:
    with pytest.raises(psycopg.Error, match=message) as refused:
        ledger.execute(f"SELECT embedline.{statement}".encode())
    assert refused.value.sqlstate in ("22023", "42704")
    assert hint in str(refused.value.diag.message_hint)


def test_a_price_that_a_budget_needs_stays(ledger: psycopg.Connection) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 1)")
    set_budget(ledger, pipeline="page", money=1)
    with pytest.raises(errors.InvalidParameterValue, match="needs the price") as refused:
        ledger.execute("SELECT embedline.set_price('static-256', NULL)")
    hint = str(refused.value.diag.message_hint)
    ledger.execute(hint.removesuffix(" first.").encode())
    ledger.execute("SELECT embedline.set_price('static-256', NULL)")


def test_a_registered_price_is_kept(ledger: psycopg.Connection) -> None:
    ledger.execute(
        "SELECT embedline.create_model('priced', provider, model, price_per_million_tokens => 0.02)"
        " FROM embedline.model WHERE name = 'static-256'"
    )
    query = "SELECT price_per_million_tokens FROM embedline.model WHERE name = 'priced'"
    assert scalar(ledger, query) == Decimal("0.02")
    set_budget(ledger, "month", model="priced", money=1)
    ledger.execute("SELECT embedline.set_rate_limit('priced', 5)")
    ledger.execute("SELECT embedline.drop_model('priced')")
    assert budget(ledger, "name") == []


_SETTING = (
    "SELECT embedline.set_budget('day', pipeline => 'page', tokens => 1)",
    "SELECT embedline.drop_budget(pipeline => 'page')",
    "SELECT embedline.set_price('static-256', 1)",
    "SELECT embedline.set_rate_limit('static-256', 1)",
    "SELECT embedline._roll_up_usage()",
    "UPDATE embedline.spending_cap SET amount = 1",
    "DELETE FROM embedline.reservation",
)


@pytest.mark.parametrize("membership", ["embedline_reader", "embedline_worker"])
def test_readers_and_workers_see_the_budgets_and_set_none(
    ledger: psycopg.Connection, connect: Connect, make_role: MakeRole, membership: str
) -> None:
    set_budget(ledger, pipeline="page", tokens=5)
    reader = connect(make_role(membership))
    assert scalar(reader, "SELECT remaining FROM embedline.budget") == 5
    assert scalar(reader, "SELECT count(*) FROM embedline.usage") == 0
    for statement in _SETTING:
        with pytest.raises(errors.InsufficientPrivilege):
            reader.execute(statement.encode())


def test_an_administrator_sets_them(ledger: psycopg.Connection, connect: Connect, make_role: MakeRole) -> None:
    role = make_role("embedline_admin")
    administrator = connect(role)
    for statement in _SETTING[:1] + _SETTING[2:4] + _SETTING[1:2]:
        administrator.execute(statement.encode())
    set_budget(administrator, model="static-256", tokens=5)
    assert scalar(ledger, "SELECT set_by FROM embedline.spending_cap") == role


def test_a_role_without_a_grant_sees_nothing(ledger: psycopg.Connection, connect: Connect, make_role: MakeRole) -> None:
    stranger = connect(make_role())
    for view in ("budget", "usage", "reservation", "usage_day", "rate_limit", "spending_cap"):
        with pytest.raises(errors.InsufficientPrivilege):
            stranger.execute(f"SELECT * FROM embedline.{view}".encode())
