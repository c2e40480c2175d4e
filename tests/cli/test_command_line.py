"""The command line as a person meets it: in a terminal of 80 columns, in a pipe, with a number too many."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import conninfo

import embedline
import programs
from command_line import lines_in_terminal
from embedline.client.doctor.examine import examine
from embedline.client.doctor.server import Finding, Server
from generated_names import PAGE
from support import create_pages, create_pipeline, scalar, settle, uri


def _piped(*arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run("embedline", *arguments)


@pytest.fixture
def two(database: psycopg.Connection) -> psycopg.Connection:
    """A database with two pipelines, one of them with an error."""
    create_pages(database, 5)
    create_pipeline(database)
    create_pipeline(database, name="title_of_the_page", content="title")
    settle(database)
    database.execute(
        "UPDATE embedline.pipeline_health SET last_error = 'the provider did not answer in time, for the third time'"
    )
    database.execute(
        "INSERT INTO embedline.pipeline_health (pipeline_id, last_error) SELECT pipeline_id,"
        " 'the provider did not answer in time, for the third time' FROM embedline.pipeline ON CONFLICT DO NOTHING"
    )
    return database


def test_the_version() -> None:
    assert _piped("--version").stdout == f"embedline {embedline.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("build-index", "docs", "--version", "99999999999"),
        ("build-index", "docs", "--version", "0"),
        ("build-index", "docs", "--workers", "3000000000"),
        ("verify", "docs", "--sample", "3000000000"),
        ("upgrade-model", "docs", "--model", "m", "--chunk-tokens", "3000000000"),
        ("upgrade-model", "docs", "--model", "m", "--chunk-overlap", "-1"),
        ("upgrade-model", "docs", "--model", "m", "--backfill-rate", "3000000000"),
    ],
)
def test_a_number_out_of_range_is_told_with_the_range(arguments: tuple[str, ...]) -> None:
    done = _piped(*arguments, *(() if arguments[0] == "upgrade-model" else ("--dsn", "postgresql:///unused")))
    assert done.returncode == 2
    said = " ".join(done.stderr.replace("\u2502", " ").split())
    assert f"Invalid value for '{arguments[-2]}'" in said


def test_a_number_that_the_database_takes_is_judged_by_the_function(two: psycopg.Connection, database_dsn: str) -> None:
    done = _piped("verify", "page", "--sample", str(2**31 - 1), "--dsn", database_dsn)
    assert done.stderr == (
        "error: embedline: sample must be between 0 and 1000\nHINT: sample => 0 checks without asking the model.\n"
    )


def test_status_in_a_narrow_terminal_shows_every_value_whole(two: psycopg.Connection, database_dsn: str) -> None:
    lines = lines_in_terminal("status", "--dsn", database_dsn)
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in "\n".join(lines)
    shown = [line.split(maxsplit=1) for line in lines if line]
    assert ["pipeline", "title_of_the_page"] in shown
    assert ["model", "static-256"] in shown
    assert ["index", "waiting"] in shown


def test_status_in_a_pipe_is_one_line_a_pipeline(two: psycopg.Connection, database_dsn: str) -> None:
    head, *rows = _piped("status", "--dsn", database_dsn).stdout.splitlines()
    assert head.split()[:4] == ["pipeline", "source", "model", "state"]
    assert [row.split()[:4] for row in rows] == [
        ["page", "page", "static-256", "active"],
        ["title_of_the_page", "page", "static-256", "active"],
    ]
    assert all(row.isascii() for row in (head, *rows))
    assert rows[0].endswith("the provider did not answer in time, for the third time")
    wide = lines_in_terminal("status", "--dsn", database_dsn, columns=250)
    assert wide == [head, *rows]


def test_status_for_programs(two: psycopg.Connection, database_dsn: str) -> None:
    rows = json.loads(_piped("status", "--json", "--dsn", database_dsn).stdout)
    assert [row["pipeline"] for row in rows] == ["page", "title_of_the_page"]
    assert (rows[0]["pending"], rows[0]["backfill_complete"]) == (0, True)


def test_verify_in_a_narrow_terminal(two: psycopg.Connection, database_dsn: str) -> None:
    two.execute(f"DELETE FROM {PAGE('chunk')} WHERE key_id = 1")
    lines = lines_in_terminal("verify", "page", "--dsn", database_dsn)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["finding", "count", "repaired", "example"]
    assert lines[1].split(maxsplit=3) == ["missing_vector", "1", "0", '{"id": "1"}']


# --- doctor


def _doctor(dsn: str) -> list[Finding]:
    with psycopg.connect(dsn, autocommit=True, client_encoding="utf8") as connection:
        return examine(connection)


def _only(found: list[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in found if finding.check == check]
    return finding


def test_doctor_before_the_installation_looks_at_everything(empty_database_dsn: str) -> None:
    found = _doctor(empty_database_dsn)
    assert not any("superuser" in finding.advice for finding in found)
    package = _only(found, "Python package")
    assert (package.verdict, package.found.split()[0]) == ("ok", embedline.__version__)
    assert _only(found, "schema embedline").commands == ("embedline upgrade",)
    with psycopg.connect(empty_database_dsn) as connection:
        assert scalar(connection, "SELECT count(*) FROM pg_extension WHERE extname = 'plpython3u'") == 0


def test_doctor_tells_a_role_without_the_right_to_look(
    database_dsn: str, make_role: Callable[..., str], role_passwords: dict[str, str]
) -> None:
    role = make_role("embedline_admin")
    parts = conninfo.conninfo_to_dict(database_dsn)
    found = _doctor(uri(str(parts["host"]), str(parts["port"]), role, role_passwords[role], str(parts["dbname"])))
    assert "connect as a superuser" in _only(found, "role").advice
    assert not any(finding.verdict == "error" for finding in found)


def test_doctor_has_one_finding_for_pgvector_and_none_about_memory_that_builds_set(database_dsn: str) -> None:
    found = _doctor(database_dsn)
    pgvector = _only(found, "pgvector")
    if pgvector.found == "0.8.0":
        assert pgvector.verdict == "warning"
        assert all(words in pgvector.advice for words in ("CVE-2026-3172", "VACUUM", "deletes", "fixed with 0.8.4"))
    for finding in found:
        assert "maintenance_work_mem" not in finding.check + finding.found + " ".join(finding.commands)


def test_doctor_puts_the_gravest_first(database_dsn: str) -> None:
    def calm(server: Server) -> Iterator[Finding]:
        yield Finding("calm", "ok", "fine")
        yield Finding("remark", "note", "so")

    def grave(server: Server) -> Iterator[Finding]:
        yield Finding("grave", "error", "broken")

    def refused(server: Server) -> Iterator[Finding]:
        yield Finding("first", "warning", "seen")
        server.connection.execute("SELECT * FROM there_is_no_such_table")

    with psycopg.connect(database_dsn, autocommit=True) as connection:
        found = examine(connection, (calm, grave, refused))
    assert [(finding.check, finding.verdict) for finding in found] == [
        ("grave", "error"), ("first", "warning"), ("remark", "note"), ("refused", "note"), ("calm", "ok")
    ]  # fmt: skip


def test_doctor_shows_commands_whole_in_a_narrow_terminal(database_dsn: str, empty_database_dsn: str) -> None:
    for dsn in (database_dsn, empty_database_dsn):
        found = _doctor(dsn)
        lines = lines_in_terminal("doctor", "--dsn", dsn, columns=60)
        for command in (command for finding in found for command in finding.commands):
            assert f"           {command}" in lines
    piped = _piped("doctor", "--dsn", database_dsn).stdout
    assert piped.isascii()
    assert "\x1b" not in piped


def test_doctor_for_programs(database_dsn: str) -> None:
    found: list[dict[str, Any]] = json.loads(_piped("doctor", "--json", "--dsn", database_dsn).stdout)
    assert {"check", "verdict", "found", "advice", "commands"} == set(found[0])
    weights = ["error", "warning", "note", "ok"]
    assert [finding["verdict"] for finding in found] == sorted((f["verdict"] for f in found), key=weights.index)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_JP"])
def test_another_encoding_is_told_with_the_remedy(
    maintenance: psycopg.Connection, server_dsn: str, encoding: str
) -> None:
    name = f"embedline_encoding_{secrets.token_hex(4)}"
    maintenance.execute(
        f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0".encode()
    )
    dsn = conninfo.make_conninfo(server_dsn, dbname=name)
    try:
        for arguments in (("upgrade",), ("doctor",), ("status",), ("verify", "docs"), ("build-index", "docs")):
            done = _piped(*arguments, "--dsn", dsn)
            assert done.returncode == 1
            said = done.stdout + done.stderr
            assert "Traceback" not in said
            if arguments[0] in ("upgrade", "doctor"):
                assert encoding in said
                assert "CREATE DATABASE mydb ENCODING 'UTF8' LOCALE 'C.UTF-8' TEMPLATE template0;" in said
    finally:
        maintenance.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    # What it says to run is right.
    maintenance.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' LOCALE 'C.UTF-8' TEMPLATE template0".encode())
    maintenance.execute(f"DROP DATABASE {name}".encode())
