"""`embedline metrics`: printed, and served to scrapers."""

from __future__ import annotations

import gzip
from pathlib import Path

import psycopg
import pytest

import command_line
from monitors import get, serving
from support import free_port, scalar


def test_it_prints_what_the_function_returns(database: psycopg.Connection, database_dsn: str) -> None:
    done = command_line.run(database_dsn, "metrics")
    assert done.returncode == 0, done.stderr
    assert "embedline_up 1\n" in done.stdout
    names = {line.split()[2] for line in done.stdout.splitlines() if line.startswith("# TYPE")}
    text = str(scalar(database, "SELECT embedline.metrics()"))
    assert names == {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_scrapers_are_served_and_an_ended_session_is_opened_again(
    database: psycopg.Connection, database_dsn: str, tmp_path: Path
) -> None:
    with serving(database_dsn, tmp_path) as (url, _):
        status, content_type, body = get(url)
        assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert b"embedline_up 1\n" in body
        # Of this database: other tests run commands on the same server.
        sessions = "FROM pg_stat_activity WHERE application_name = 'embedline' AND datname = current_database()"
        assert scalar(database, f"SELECT bool_and(pg_terminate_backend(pid, 5000)) {sessions}")
        status, _, body = get(url, **{"Accept-Encoding": "gzip"})
        assert status == 200
        assert b"embedline_up 1\n" in gzip.decompress(body)
        assert get(url.replace("metrics", "other"))[0] == 404


def test_a_database_that_is_away_gives_503_and_up_0(tmp_path: Path) -> None:
    with serving(f"postgresql://reader@127.0.0.1:{free_port()}/nothing", tmp_path) as (url, messages):
        for _ in range(2):
            status, _, body = get(url)
            assert status == 503
            assert body.endswith(b"embedline_up 0\n")
        assert messages.read_text().count("error:") == 1


@pytest.mark.parametrize("listen", ["9187", "localhost:http", ":99999"])
def test_a_wrong_address_is_refused(database_dsn: str, listen: str) -> None:
    done = command_line.run(database_dsn, "metrics", "--listen", listen)
    assert done.returncode == 2
    assert "ADDRESS:PORT" in done.stderr
