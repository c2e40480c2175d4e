"""The nightly run: each pipeline by itself, on a server of its own, because pg_cron lives in one database only."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from embedline.dev.cluster.server import Cluster
from generated_names import Generated
from support import assert_exact, create_pages, create_pipeline, scalar, settle, wait_until

JOBS = "SELECT schedule, command FROM cron.job WHERE jobname = 'embedline nightly'"


@pytest.fixture(scope="module")
def cron(cron_cluster: Cluster) -> psycopg.Connection:
    """A connection to the database in which pg_cron lives."""
    with psycopg.connect(cron_cluster.dsn("embedline"), autocommit=True) as connection:
        yield connection


def test_the_job_comes_and_goes_with_the_workers_and_keeps_its_time(cron: psycopg.Connection) -> None:
    cron.execute("SELECT embedline.schedule_workers(1)")
    assert cron.execute(JOBS).fetchall() == [("30 3 * * *", "CALL embedline.run_nightly(repair => true)")]
    cron.execute("SELECT embedline.schedule_nightly('23:05', repair => false)")
    assert cron.execute(JOBS).fetchall() == [("5 23 * * *", "CALL embedline.run_nightly(repair => false)")]
    cron.execute("SELECT embedline.schedule_workers(2)")
    assert cron.execute(JOBS).fetchall() == [("5 23 * * *", "CALL embedline.run_nightly(repair => false)")]
    cron.execute("SELECT embedline.schedule_nightly(NULL)")
    assert cron.execute(JOBS).fetchall() == []
    cron.execute("SELECT embedline.schedule_nightly()")
    cron.execute("SELECT embedline.unschedule_workers()")
    assert cron.execute(JOBS).fetchall() == []


def test_pg_cron_runs_it(cron: psycopg.Connection) -> None:
    create_pages(cron, 10)
    create_pipeline(cron)
    settle(cron)
    with cron.transaction():
        cron.execute("SET LOCAL session_replication_role = replica")
        cron.execute("DELETE FROM page WHERE id <= 3")
    cron.execute("SELECT embedline.schedule_nightly()")
    # Not to wait for the night: the same job, each minute.
    cron.execute("UPDATE cron.job SET schedule = '* * * * *' WHERE jobname = 'embedline nightly'")
    query = "SELECT coalesce(max(repaired_count), 0) FROM embedline.verification"
    wait_until(lambda: scalar(cron, query) == 3, 90, "pg_cron has run the job")
    cron.execute("SELECT embedline.schedule_nightly(NULL)")
    assert assert_exact(cron) == 7


def test_the_trouble_of_one_pipeline_stops_no_other(database: psycopg.Connection) -> None:
    for name in ("first", "second", "third"):
        create_pages(database, 5, table=name)
        create_pipeline(database, name, name)
    settle(database)
    database.execute(f"DROP FUNCTION {Generated('second')('audit')}(integer, timestamptz)")
    for name in ("first", "third"):
        with database.transaction():
            database.execute("SET LOCAL session_replication_role = replica")
            database.execute(f"DELETE FROM {name} WHERE id = 1".encode())
    database.execute("INSERT INTO embedline.verification (pipeline_id, verified_at) SELECT pipeline_id, '2000-01-01'"
                     " FROM embedline.pipeline")  # fmt: skip
    database.execute("SELECT embedline.configure('dead_letter_retention', '1 day')")
    database.execute(
        "INSERT INTO embedline.dead_letter (pipeline_id, key, stage, error_code, message, attempts, created_at)"
        " SELECT pipeline_id, '{\"id\": \"2\"}', 'embed', 'EL012', 'old', 1, '2000-01-01' FROM embedline.pipeline"
        " WHERE name = 'second'"
    )
    database.execute("CALL embedline.run_nightly()")
    rows = database.execute(
        "SELECT p.name, v.repaired_count, v.error ~ 'second_audit' FROM embedline.verification AS v"
        " JOIN embedline.pipeline AS p USING (pipeline_id) ORDER BY p.name"
    ).fetchall()
    assert rows == [("first", 1, None), ("second", 0, True), ("third", 1, None)]
    assert scalar(database, "SELECT count(*) FROM embedline.dead_letter") == 0


def test_a_report_without_repair_changes_nothing(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    settle(database)
    with database.transaction():
        database.execute("SET LOCAL session_replication_role = replica")
        database.execute("DELETE FROM page WHERE id = 1")
    database.execute("CALL embedline.run_nightly(repair => false)")
    assert database.execute("SELECT finding_count, repaired_count FROM embedline.verification").fetchall() == [(1, 0)]


def test_two_runs_do_not_overlap_and_a_transaction_block_is_refused(database: psycopg.Connection) -> None:
    create_pages(database, 5)
    create_pipeline(database)
    with psycopg.connect(database.info.dsn, password=database.info.password, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(1164799537)")
        database.execute("CALL embedline.run_nightly()")
        assert scalar(database, "SELECT count(*) FROM embedline.verification") == 0
    wait_until(lambda: scalar(database, "SELECT pg_try_advisory_lock(1164799537)"))
    database.execute("SELECT pg_advisory_unlock(1164799537)")
    with pytest.raises(errors.InvalidTransactionTermination), database.transaction():
        database.execute("CALL embedline.run_nightly()")
    assert scalar(database, "SELECT pg_try_advisory_lock(1164799537)"), "the lock is free again"


def test_without_pg_cron_the_error_names_the_way(database: psycopg.Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue) as caught:
        database.execute("SELECT embedline.schedule_nightly()")
    assert "CALL embedline.run_nightly(repair => true)" in str(caught.value.diag.message_hint)
    database.execute("SELECT embedline.schedule_nightly(NULL)")
