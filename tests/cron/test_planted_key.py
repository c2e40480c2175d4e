"""A key of the server's environment is shown nowhere, on a server that logs all that it can."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

import programs
from conftest import StartCluster
from reporting import write_report
from stub_provider import StubProvider
from support import drain, scalar, wait_until
from working import create_stub_model, create_stub_pipeline, dsn_of, insert_rows, working

KEY = "sk-planted-0123456789abcdefghij"
_LOUD = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_min_messages": "debug1",
    "log_min_error_statement": "debug1",
    "log_error_verbosity": "verbose",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "track_activity_query_size": "1MB",
}
_RELATIONS = """
    SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'v', 'm', 'p') AND n.nspname <> 'information_schema'
"""


def _everything(connection: psycopg.Connection) -> str:
    """Return all rows of all relations and their columns, also those of the catalogue, of pg_cron and of Embedline."""
    shown = []
    for (name,) in connection.execute(_RELATIONS).fetchall():
        try:
            rows = connection.execute(sql.SQL("SELECT t::text FROM {} AS t").format(sql.SQL(name))).fetchall()
        except psycopg.Error:
            continue
        shown += [f"{name}: {row[0]}" for row in rows]
    return "\n".join(shown)


def _provoke(connection: psycopg.Connection, stub: StubProvider) -> list[str]:
    """Have the provider and every command meet the key; return what they said."""
    told = []
    words = f"Incorrect API key {KEY}, header 'Authorization: Bearer {KEY}'"
    statements = (
        "SELECT * FROM embedline.search('page', 'a query')",
        "SELECT embedline.embed_query('page', 'another query')",
        "SELECT embedline.rerank('judge', 'a query', ARRAY['one', 'two'])",
        "SELECT embedline.alter_model('stub', timeout_seconds => 61, options => '{\"max_tokens\": 500}')",
        "SELECT embedline.create_model('again', 'openai', 'stub', base_url => 'http://127.0.0.1:1/v1',"
        " api_key_env => 'EMBEDLINE_TEST_KEY')",
        "SELECT * FROM embedline.verify('page')",
        "SELECT * FROM embedline.doctor()",
        "SELECT embedline.metrics()",
        "SELECT * FROM embedline.alert",
        "SELECT * FROM embedline.state('page', '1')",
        "SELECT * FROM embedline.estimate('page', NULL, NULL)",
    )
    for status in (400, 401, 429, 500):
        body = json.dumps({"error": {"message": words, "param": KEY}})
        rule = {"status": status, "body": body, "headers": {"X-Echo": KEY, "Retry-After": "0"}}
        stub.behave(rules=[{**rule, "match": f"row {status} "}, {**rule, "match": "query"}])
        insert_rows(connection, status, status)
        connection.execute("DELETE FROM embedline.circuit")
        drain(connection)
        for statement in statements:
            try:
                told.append(str(connection.execute(statement).fetchall()))
            except psycopg.Error as error:
                told.append(f"{error.diag.message_primary} {error.diag.message_detail} {error.diag.message_hint}")
                told.append(f"{error.diag.context} {error}")
    assert "[redacted]" in str(told)
    return told


def test_a_planted_key_is_shown_nowhere(start_cluster: StartCluster, stub: StubProvider, tmp_path: Path) -> None:
    cluster = start_cluster(
        cron_database="embedline", environment={"EMBEDLINE_TEST_KEY": KEY}, settings_={"fsync": "off", **_LOUD}
    )
    with psycopg.connect(cluster.dsn("embedline"), autocommit=True) as connection:
        create_stub_model(connection, stub, api_key_env="EMBEDLINE_TEST_KEY")
        connection.execute(
            "SELECT embedline.create_model('judge', 'tei', 'r', base_url => %s, task => 'rerank',"
            " api_key_env => 'EMBEDLINE_TEST_KEY')",
            (stub.rerank_urls["tei"],),
        )
        create_stub_pipeline(connection, rows=20)
        connection.execute("SELECT embedline.schedule_workers(1)")
        told = _provoke(connection, stub)
        stub.behave()
        dsn = dsn_of(connection)
        with working(connection):
            connection.execute("UPDATE page SET body = body || ' changed'")
            wait_until(lambda: scalar(connection, "SELECT pending FROM embedline.status") == 0)
            told.append(_everything(connection))
        told.append(write_report(connection, tmp_path / "report.html"))
        for command in (("doctor",), ("metrics",), ("status",), ("alerts",), ("verify", "page")):
            done = programs.run("embedline", *command, env={**os.environ, "EMBEDLINE_DSN": dsn, "COLUMNS": "200"})
            told.append(done.stdout + done.stderr)
        # pg_cron runs the worker's job on the minute.
        ran = "SELECT count(*) FROM cron.job_run_details WHERE command LIKE 'CALL embedline.run_worker%'"
        wait_until(lambda: scalar(connection, ran) > 0, 90, "pg_cron has run the worker's job")
        told.append(_everything(connection))
        assert "cron.job: " in told[-1]
        assert "cron.job_run_details: " in told[-1]
        connection.execute("SELECT embedline.unschedule_workers()")
    log = cluster.log_file.read_text(errors="replace")
    assert "SELECT embedline.metrics()" in log
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    for place in (*told, log, str(commands)):
        assert KEY not in place
        # Nor a part of it that is long enough to be told from others.
        assert re.search("planted-0123456789|456789abcdefghij", place) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs a program as another OS user")
def test_another_os_user_reads_neither_the_sockets_nor_the_vectors(
    start_cluster: StartCluster, stub: StubProvider
) -> None:
    cluster = start_cluster()
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        create_stub_model(connection, stub)
        create_stub_pipeline(connection, rows=5)
        drain(connection)
        connection.execute("SELECT * FROM embedline.search('page', 'a query')")
        pid = connection.info.backend_pid
        owner = Path(f"/proc/{pid}").stat().st_uid
        hosts = scalar(connection, "SELECT current_setting('data_directory')")
        # The COPY file is a descriptor of the backend, so a user who may list these may read it.
        tried = [f"/proc/{pid}/fd", f"/proc/{pid}/environ", hosts]
        found = [path for path in Path("/tmp").glob("embedline-*") if path.stat().st_uid == owner]
        sockets = [path for folder in found for path in folder.rglob("*") if path.is_socket() or path.is_file()]
        assert sockets, "the host of remote models has a socket"
        other = pwd.getpwnam("nobody")
        assert other.pw_uid != owner
        for place in (*tried, *map(str, found), *map(str, sockets[:5])):
            script = f"import os, socket; path = {place!r}\n" + (
                "socket.socket(socket.AF_UNIX).connect(path)"
                if Path(place).is_socket()
                else "os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1)"
            )
            done = subprocess.run(
                ["setpriv", "--reuid", str(other.pw_uid), "--regid", str(other.pw_gid), "--clear-groups",
                 "/usr/bin/python3", "-c", script],
                capture_output=True, text=True, check=False, cwd="/",
            )  # fmt: skip
            assert "PermissionError" in done.stderr, (place, done.stderr)
