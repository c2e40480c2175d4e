"""What a person sees under an error in psql: DETAIL and HINT, and no Python frames of ours."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from support import create_pages, create_pipeline, scalar

Connect = Callable[..., psycopg.Connection]


def _assert_short(error: psycopg.Error, function: str) -> None:
    # PL/Python adds the line of the SQL function's own body to each error; the rest was ours.
    context = (error.diag.context or "").splitlines()
    assert len(context) <= 4, error.diag.context
    assert context[-1].endswith(f'"{function}"')
    assert [line for line in context if ", line " in line] == [context[1]]


@pytest.mark.parametrize(
    ("function", "statement", "sqlstate"),
    [
        ("drop_pipeline", "SELECT embedline.drop_pipeline('nope')", "42704"),
        ("search", "SELECT * FROM embedline.search('nope', 'words')", "42704"),
        ("create_model", "SELECT embedline.create_model('x', 'nope', 'y')", "22023"),
        ("schedule_workers", "SELECT embedline.schedule_workers(0)", "22023"),
        ("run_worker", "CALL embedline.run_worker(pipeline_name => 'nope')", "42704"),
    ],
)
def test_our_own_errors(database: psycopg.Connection, function: str, statement: str, sqlstate: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        database.execute(statement.encode())
    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.message_hint
    _assert_short(caught.value, function)


def test_a_lock_timeout(database: psycopg.Connection, connect: Connect) -> None:
    create_pages(database, 1)
    create_pipeline(database)
    with connect().transaction() as holder:
        holder.connection.execute("LOCK TABLE page")
        database.execute("SET lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
            database.execute("SELECT embedline.drop_pipeline('page')")
    assert "spiexceptions" not in str(caught.value.diag.message_primary)
    _assert_short(caught.value, "drop_pipeline")


def test_a_worker_leaves_the_session_as_it_was(database: psycopg.Connection) -> None:
    """Behind a pool the next client has the session that the worker had."""
    database.execute("SET jit = on; SET default_transaction_isolation = 'serializable'")
    database.execute("CALL embedline.run_worker(max_seconds => 5, until_idle => true)")
    assert scalar(database, "SHOW jit") == "on"
    assert scalar(database, "SHOW default_transaction_isolation") == "serializable"
    assert scalar(database, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()") == 0
