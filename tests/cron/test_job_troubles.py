"""Jobs that pg_cron cannot run, as on a stock cluster: who says so, and that what they say to run mends it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

from conftest import StartCluster
from embedline.dev.cluster.server import Cluster
from support import scalar, wait_until

_TROUBLES = "SELECT jobs, trouble, remedy FROM embedline._job_troubles()"


def _trouble(connection: psycopg.Connection) -> tuple[str, str] | None:
    """Return what is wrong with the worker's job, and what to run; None where nothing is."""
    found = [row[1:] for row in connection.execute(_TROUBLES) if "embedline worker 1" in row[0].split(", ")]
    return found[0] if found else None


@pytest.fixture(scope="module")
def stock(start_cluster: StartCluster) -> Cluster:
    """A server whose pg_cron connects as it does by default: to localhost, where a password is asked for."""
    return start_cluster(cron_database="embedline", settings_={"cron.host": "localhost", "cron.max_running_jobs": "3"})


@pytest.fixture
def connection(stock: Cluster) -> Iterator[psycopg.Connection]:
    with psycopg.connect(stock.dsn("embedline"), autocommit=True) as connection:
        yield connection


def _findings(dsn: str, code: int = 1) -> list[dict[str, Any]]:
    """Return what doctor finds; `code` is how it is to exit."""
    done = subprocess.run(
        [sys.executable, "-m", "embedline.client.cli", "doctor", "--json", "--dsn", dsn],
        env=dict(os.environ), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_more_workers_than_pg_cron_runs_jobs_are_refused(connection: psycopg.Connection) -> None:
    with pytest.raises(errors.InvalidParameterValue) as caught:
        connection.execute("SELECT embedline.schedule_workers(3)")
    assert "ALTER SYSTEM SET cron.max_running_jobs = 4;" in str(caught.value.diag.message_hint)
    assert scalar(connection, "SELECT count(*) FROM cron.job") == 0


def test_a_job_that_cannot_connect_is_told_and_mended(stock: Cluster, connection: psycopg.Connection) -> None:
    said: list[tuple[str, str]] = []
    connection.add_notice_handler(lambda n: said.append((n.message_primary or "", n.message_hint or "")))
    connection.execute("SELECT embedline.schedule_workers(1)")
    assert any("asks for a password" in message and "cron.host" in hint for message, hint in said), said
    failed = "SELECT count(*) FROM cron.job_run_details WHERE return_message = 'connection failed'"
    wait_until(lambda: scalar(connection, failed) > 0, 90, "pg_cron could not connect")
    trouble, remedy = _trouble(connection) or ("", "")
    assert "connection failed" in trouble
    found = _findings(stock.dsn("embedline"))
    assert [finding["verdict"] for finding in found if finding["check"].startswith("job failing")] == ["error", "error"]
    assert ("workers", "warning", "1 scheduled, none alive") in {
        (finding["check"], finding["verdict"], finding["found"]) for finding in found
    }
    setting = re.match(r"ALTER SYSTEM SET cron\.host = '[^']+';", remedy)
    assert setting is not None, remedy
    said.clear()
    connection.execute("SELECT embedline.schedule_workers(1)")
    assert any("connection failed" in message for message, _ in said), said

    # What it says: the setting, a restart, and the workers scheduled again.
    connection.execute(setting.group().encode())
    connection.close()
    stock.stop()
    stock.start()
    with psycopg.connect(stock.dsn("embedline"), autocommit=True) as after:
        trouble, remedy = _trouble(after) or ("", "")
        assert "connects to localhost" in trouble
        assert remedy == "SELECT embedline.schedule_workers(1);"
        after.execute(remedy.encode())
        hosts = "SELECT DISTINCT nodename = current_setting('cron.host') FROM cron.job"
        assert after.execute(hosts).fetchall() == [(True,)]
        wait_until(lambda: scalar(after, "SELECT embedline._workers_alive()") == 1, 90, "the worker runs")
        wait_until(lambda: _trouble(after) is None, 10)
        found = _findings(stock.dsn("embedline"), code=0)
        assert [finding for finding in found if finding["check"].startswith("job failing")] == []
        after.execute("SELECT embedline.unschedule_workers()")


def test_background_workers_are_refused_where_a_resident_job_would_stop_the_others(
    start_cluster: StartCluster,
) -> None:
    cluster = start_cluster(cron_database="embedline", settings_={"cron.use_background_workers": "on"})
    with psycopg.connect(cluster.dsn("embedline"), autocommit=True) as connection:
        version = tuple(
            map(
                int,
                re.findall(r"\d+", scalar(connection, "SELECT extversion FROM pg_extension WHERE extname = 'pg_cron'")),
            )
        )
        if version < (1, 5):
            with pytest.raises(errors.InvalidParameterValue) as caught:
                connection.execute("SELECT embedline.schedule_workers(1)")
            assert "cron.use_background_workers = off" in str(caught.value.diag.message_hint)
            return
        assert scalar(connection, "SELECT embedline.schedule_workers(1)") == 1
        wait_until(lambda: scalar(connection, "SELECT embedline._workers_alive()") == 1, 90, "the worker runs")
        assert connection.execute(_TROUBLES).fetchall() == []
        connection.execute("SELECT embedline.unschedule_workers()")
