"""Reserving beside each other: a cap holds whoever reserves, and a restart of the server forgets nothing."""

from __future__ import annotations

import threading

import psycopg
import pytest

from conftest import Connect
from embedline.dev.cluster.server import Cluster
from ledger import install_ledger_functions, reserve, settle
from support import create_pages, create_pipeline, scalar


@pytest.fixture
def ledger(database: psycopg.Connection) -> psycopg.Connection:
    """Pipelines page and second, both of model static-256."""
    create_pages(database, 3)
    create_pipeline(database)
    create_pipeline(database, "second", chunking="none")
    install_ledger_functions(database)
    return database


def _in_parallel(connections: list[psycopg.Connection], pipelines: list[str], calls: int) -> list[int]:
    """Reserve requests of 300 and 200 tokens again and again in each session; return the tokens granted to each."""
    granted = [0] * len(connections)
    failures: list[BaseException] = []
    start = threading.Barrier(len(connections))

    def work(index: int) -> None:
        try:
            start.wait(20)
            for _ in range(calls):
                grant = reserve(connections[index], [300, 200], pipelines[index], worker=index + 1)
                granted[index] += sum([300, 200][: grant.count])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(connections))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    return granted


def test_workers_that_reserve_at_once_never_exceed_the_cap(ledger: psycopg.Connection, connect: Connect) -> None:
    ledger.execute("SELECT embedline.set_budget('day', model => 'static-256', tokens => 20000)")
    granted = _in_parallel([connect() for _ in range(4)], ["page", "second", "page", "second"], 30)
    # All that fits is granted, and not one token more.
    assert sum(granted) == 20_000
    assert scalar(ledger, "SELECT remaining FROM embedline.budget") == 0


def test_a_rate_limit_holds_for_workers_that_reserve_at_once(ledger: psycopg.Connection, connect: Connect) -> None:
    ledger.execute("SELECT embedline.set_rate_limit('static-256', requests_per_minute => 60)")
    _in_parallel([connect() for _ in range(4)], ["page", "second", "page", "second"], 5)
    spread = scalar(
        ledger, "SELECT extract(epoch FROM max(reserved_at) - min(reserved_at))::float FROM embedline.reservation"
    )
    assert 2 <= scalar(ledger, "SELECT sum(requests) FROM embedline.reservation") <= 2 + spread + 1


def test_reservations_and_roll_ups_beside_each_other_lose_nothing(ledger: psycopg.Connection, connect: Connect) -> None:
    ledger.execute("SELECT embedline.set_price('static-256', 1)")
    # Whatever is settled is old at once, so that the roll-ups find something.
    ledger.execute(
        "CREATE FUNCTION public.backdate() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN NEW.reserved_at := NEW.reserved_at - interval '1 hour'; RETURN NEW; END$$"
    )
    ledger.execute(
        "CREATE TRIGGER backdate BEFORE INSERT ON embedline.reservation FOR EACH ROW EXECUTE FUNCTION public.backdate()"
    )
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            connection = connect()
            for _ in range(40):
                settle(connection, reserve(connection, [100], worker=index).reservation_id, 70)
        except BaseException as error:
            failures.append(error)

    def roll() -> None:
        try:
            connection = connect()
            while not stop.is_set():
                connection.execute("SELECT embedline._roll_up_usage()")
        except BaseException as error:
            failures.append(error)

    # Their workers live: open reservations stay open.
    for index in (1, 2):
        ledger.execute("SELECT pg_advisory_lock(1164797804, %s)", (index,))
    rollers = [threading.Thread(target=roll) for _ in range(2)]
    workers = [threading.Thread(target=work, args=(index,)) for index in (1, 2)]
    for thread in (*rollers, *workers):
        thread.start()
    for thread in workers:
        thread.join(60)
    stop.set()
    for thread in rollers:
        thread.join(20)
    assert not failures, failures
    query = "SELECT sum(tokens), sum(requests), sum(reserved_tokens) FROM embedline.usage"
    assert ledger.execute(query).fetchone() == (80 * 70, 80, 0)
    assert scalar(ledger, "SELECT count(*) FROM embedline.usage_day") >= 1


@pytest.mark.faults
def test_the_ledger_survives_a_crash_of_the_server(own_cluster: Cluster) -> None:
    with psycopg.connect(own_cluster.dsn(), autocommit=True) as connection:
        create_pages(connection, 3)
        create_pipeline(connection)
        install_ledger_functions(connection)
        connection.execute("SELECT embedline.set_budget('month', pipeline => 'page', tokens => 1000)")
        settle(connection, reserve(connection, [300]).reservation_id, 250)
        assert reserve(connection, [500]).count == 1
    own_cluster.stop("immediate")
    own_cluster.start()
    with psycopg.connect(own_cluster.dsn(), autocommit=True) as connection:
        row = connection.execute("SELECT spent, reserved, remaining FROM embedline.budget").fetchone()
        assert row == (250, 500, 250)
        assert reserve(connection, [300]).count == 0
        assert reserve(connection, [250]).count == 1
