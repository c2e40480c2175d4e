"""Indexes built by pg_cron: of any version, with settings of their own, and until they are valid."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors

from embedline.dev.cluster.server import Cluster
from generated_names import PAGE, Generated
from stub_provider import StubProvider
from support import create_pages, create_pipeline, scalar, wait_until
from working import create_stub_model, create_stub_pipeline, flood, remove_all, working


@pytest.fixture(scope="module")
def cron(cron_cluster: Cluster) -> psycopg.Connection:
    """A connection to the database in which pg_cron lives, with a pipeline of two complete versions; no worker runs."""
    with psycopg.connect(cron_cluster.dsn("embedline"), autocommit=True) as connection:
        create_pages(connection, 100)
        create_pipeline(connection)
        _work(connection)
        connection.execute("SELECT embedline.add_embedding_version('page', 'static-256', column_type => 'halfvec')")
        _work(connection)
        yield connection


def _work(connection: psycopg.Connection) -> None:
    def done() -> bool:
        connection.execute("SELECT embed_pending(1000)")
        return bool(scalar(connection, "SELECT bool_and(state = 'complete' AND missing = 0) FROM embedline.versions"))

    wait_until(done, 20, "all versions are filled")


def _jobs(connection: psycopg.Connection) -> dict[str, str]:
    return dict(
        connection.execute("SELECT jobname, command FROM cron.job WHERE jobname LIKE 'embedline index%'").fetchall()
    )


def _state(connection: psycopg.Connection, name: str) -> str:
    return str(scalar(connection, "SELECT state FROM embedline.index_progress() WHERE name = %s", (name,)))


def test_the_serving_version_s_index_is_scheduled_by_whoever_finishes_its_backfill(cron: psycopg.Connection) -> None:
    assert list(_jobs(cron)) == ["embedline index page v1"]
    cron.execute("SELECT embedline.add_precision_index('page', 2, 'binary')")
    said = scalar(cron, "SELECT embedline.build_vector_index('page', 2)")
    assert "page_v2_embedding_idx at the next full minute" in said
    assert sorted(_jobs(cron)) == [
        "embedline index page v1",
        "embedline index page v2",
        "embedline index page v2 binary",
    ]
    command = _jobs(cron)["embedline index page v2"]
    assert "maintenance_work_mem = 98304kB, max_parallel_maintenance_workers = 2 */" in command


def test_a_leftover_is_dropped_and_the_next_try_is_serial(cron: psycopg.Connection, cron_cluster: Cluster) -> None:
    statement = scalar(cron, "SELECT embedline.index_statement('page', 2, 'binary')")
    with psycopg.connect(cron_cluster.dsn("embedline")) as other:
        other.execute(f"LOCK TABLE {PAGE.version(2)} IN ROW EXCLUSIVE MODE")
        cron.execute("SET statement_timeout = '500ms'")
        with pytest.raises(errors.QueryCanceled):
            cron.execute(statement)
        cron.execute("RESET statement_timeout")
    assert _state(cron, "page_v2_binary_idx") == "invalid"
    cron.execute("SELECT embed_pending(1)")
    assert _state(cron, "page_v2_binary_idx") == "missing"
    assert "max_parallel_maintenance_workers = 0 */" in _jobs(cron)["embedline index page v2 binary"]


def test_pg_cron_builds_them_and_the_jobs_go_away(cron: psycopg.Connection) -> None:
    query = "SELECT bool_and(state = 'valid') FROM embedline.index_progress()"
    wait_until(lambda: scalar(cron, query), 190, "pg_cron has built the indexes")
    cron.execute("SELECT embed_pending(1)")
    assert _jobs(cron) == {}
    # Two on one table are not built at once: one of them gave way, and none of them deadlocked.
    messages = "SELECT coalesce(string_agg(return_message, ' '), '') FROM cron.job_run_details WHERE status = 'failed'"
    assert "deadlock" not in scalar(cron, messages)
    assert "page_v2_embedding_idx is valid" in scalar(cron, "SELECT embedline.build_vector_index('page', 2)")


def test_the_jobs_of_what_is_dropped_go_with_it(cron: psycopg.Connection) -> None:
    cron.execute("SELECT embedline.add_precision_index('page', 2, 'prefix', 64)")
    cron.execute("SELECT embedline.add_precision_index('page', 2, 'prefix', 32)")
    cron.execute("SELECT embedline.build_vector_index('page', 2)")
    assert len(_jobs(cron)) == 2
    cron.execute("SELECT embedline.drop_precision_index('page', 2, 'prefix_64')")
    assert list(_jobs(cron)) == ["embedline index page v2 prefix_32"]
    cron.execute("SELECT embedline.drop_pipeline('page')")
    assert _jobs(cron) == {}


def test_an_index_is_scheduled_under_writes_that_never_let_the_worker_rest(
    cron: psycopg.Connection, stub: StubProvider
) -> None:
    create_stub_model(cron, stub)
    create_stub_pipeline(cron, "other", rows=40, index_method="hnsw")
    with flood(cron), working(cron, seconds=120):
        wait_until(lambda: "embedline index other v1" in _jobs(cron), 40, "the index of the other one is scheduled")
    remove_all(cron)


def test_lists_that_drifted_are_built_again_beside_the_old_ones(cron: psycopg.Connection) -> None:
    listed = Generated("listed")
    cron.execute("CREATE TABLE listed (id integer PRIMARY KEY, body text)")
    cron.execute("INSERT INTO listed SELECT n, 'text ' || n FROM generate_series(1, 100) AS n")
    create_pipeline(cron, "listed", "listed", "body", index_method="ivfflat")
    _work(cron)
    _run_job(cron, "embedline index listed v1")
    reach = (
        "FROM embedline.index_reach JOIN embedline.pipeline ON serving_version_id = version_id WHERE name = 'listed'"
    )
    first = scalar(cron, f"SELECT index_node {reach}")
    assert first is not None
    cron.execute(
        "UPDATE embedline.index_reach SET probes = 4, built_probes = 4, built_recall = 0.99, kept_recall = 0.9"
    )
    cron.execute("SELECT embed_pending(1)")
    _run_job(cron, "embedline index listed v1 next")
    indexes = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisprimary AND indrelid = %s::regclass"
    assert cron.execute(indexes, (listed.version(1),)).fetchall() == [(listed.index(1),)]
    assert scalar(cron, f"SELECT index_node <> %s AND probes IS NULL AND kept_recall IS NULL {reach}", (first,))
    cron.execute("SELECT embedline.drop_pipeline('listed')")


def _run_job(connection: psycopg.Connection, name: str) -> None:
    """Do what pg_cron does at the next full minute, and let embed_pending see it."""
    connection.execute(_jobs(connection)[name])
    connection.execute("SELECT embed_pending(1)")
    connection.execute("SELECT embed_pending(1)")
    assert not [job for job in _jobs(connection) if job.startswith("embedline index listed")]
