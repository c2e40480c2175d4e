"""`embedline downgrade base` while scheduled workers are at work."""

from __future__ import annotations

import os
import subprocess
import sys

import psycopg

from embedline.dev.cluster.cluster import Cluster
from support import create_pages, create_pipeline, scalar, wait_until


def test_base_is_reached_under_scheduled_workers(cron_cluster: Cluster) -> None:
    dsn = cron_cluster.dsn("embedline")
    with psycopg.connect(dsn, autocommit=True) as connection:
        create_pages(connection, 2000)
        create_pipeline(connection)
        connection.execute("SELECT embedline.schedule_workers(2)")
        wait_until(lambda: scalar(connection, "SELECT embedline._workers_alive()") == 2, 90, "the workers run")
        connection.execute(
            "INSERT INTO page (id, title, body) SELECT n, 'more', 'of it ' || n FROM generate_series(2001, 7000) AS n"
        )
        done = subprocess.run(
            [sys.executable, "-m", "embedline.client.cli", "downgrade", "base", "--dsn", dsn],
            env=dict(os.environ), capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert scalar(connection, "SELECT count(*) FROM cron.job WHERE jobname LIKE 'embedline%'") == 0
        assert scalar(connection, "SELECT to_regnamespace('embedline') IS NULL") is True
        assert scalar(connection, "SELECT count(*) FROM page") == 7000
        running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CALL embedline%'"
        wait_until(lambda: scalar(connection, running) == 0, 60, "the workers have ended")
