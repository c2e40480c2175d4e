"""Workers as pg_cron jobs, on a server of their own: pg_cron lives in one database only."""

from __future__ import annotations

import re
import subprocess
import textwrap

import psycopg
import pytest
from psycopg import errors

from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from support import ROOT, assert_exact, create_pages, create_pipeline, scalar, wait_until


@pytest.fixture(scope="module")
def cron(cron_cluster: Cluster) -> psycopg.Connection:
    """A connection to the database in which pg_cron lives."""
    with psycopg.connect(cron_cluster.dsn("embedline"), autocommit=True) as connection:
        yield connection


def test_scheduled_worker_embeds_what_is_written_and_builds_the_index(cron: psycopg.Connection) -> None:
    create_pages(cron, 50)
    create_pipeline(cron)
    assert scalar(cron, "SELECT embedline.schedule_workers(2)") == 2
    jobs = cron.execute("SELECT schedule, command FROM cron.job WHERE jobname LIKE 'embedline worker%'").fetchall()
    assert sorted(schedule for schedule, _ in jobs) == ["* * * * *"] * 2 + ["@reboot"] * 2
    assert all(command.startswith("CALL embedline.run_worker(") for _, command in jobs)
    # pg_cron 1.4 starts jobs on the minute.
    wait_until(lambda: scalar(cron, "SELECT embedline._workers_alive()") == 2, 90, "pg_cron has started the workers")
    wait_until(lambda: scalar(cron, "SELECT backfill_complete AND pending = 0 FROM embedline.status"), 60)
    cron.execute("UPDATE page SET body = 'seen by nobody but the worker' WHERE id = 1")
    wait_until(
        lambda: scalar(cron, f"SELECT content FROM {PAGE('chunk')} WHERE key_id = 1").endswith("the worker"),
        10,
    )
    assert_exact(cron)
    # With a resident job in its hands pg_cron 1.4 heeds no interrupt by itself.
    cron.execute("CREATE DATABASE short_lived")
    cron.execute("SET statement_timeout = '20s'")
    cron.execute("DROP DATABASE short_lived")
    cron.execute("RESET statement_timeout")
    wait_until(
        lambda: scalar(cron, "SELECT index_state FROM embedline.status") == "valid", 130, "pg_cron built the index"
    )
    wait_until(lambda: scalar(cron, "SELECT count(*) FROM cron.job WHERE jobname LIKE 'embedline index%'") == 0, 30)


def test_fewer_workers_then_none(cron: psycopg.Connection) -> None:
    assert scalar(cron, "SELECT embedline.schedule_workers(1)") == 1
    wait_until(lambda: scalar(cron, "SELECT embedline._workers_alive()") == 1, 30, "the second worker has stopped")
    assert scalar(cron, "SELECT embedline.schedule_workers(1)") == 1
    assert scalar(cron, "SELECT count(*) FROM cron.job WHERE jobname LIKE 'embedline worker%'") == 2
    cron.execute("SELECT embedline.unschedule_workers()")
    assert scalar(cron, "SELECT count(*) FROM cron.job WHERE jobname LIKE 'embedline worker%'") == 0
    wait_until(lambda: scalar(cron, "SELECT embedline._workers_alive()") == 0, 30, "the worker has stopped")


def test_the_installations_sql_blocks_run_in_their_order(cron: psycopg.Connection) -> None:
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(sh|sql)\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    for kind, block in blocks:
        if kind == "sh":
            subprocess.run(["bash", "-n"], input=textwrap.dedent(block), text=True, check=True)
        else:
            cron.execute(block.encode())
    assert "export PG=" in blocks[0][1], "the values to adapt come first"
    assert scalar(cron, "SELECT count(*) FROM cron.job WHERE jobname LIKE 'embedline worker%'") == 2
    cron.execute("SELECT embedline.unschedule_workers()")


def test_without_pg_cron_the_error_names_the_way(database: psycopg.Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue) as caught:
        database.execute("SELECT embedline.schedule_workers(1)")
    assert "embedline.run_worker" in str(caught.value.diag.message_hint)
