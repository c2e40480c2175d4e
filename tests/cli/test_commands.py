"""Run commands against a real database, in a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import psycopg
import pytest
import typer.main

import programs
from command_line import Terminal, lines_in_terminal, run, unstyled
from embedline.client.cli import app
from generated_names import PAGE
from support import ROOT, create_pages, create_pipeline, scalar, settle, wait_until

_REFERENCE = ROOT / "docs" / "reference" / "command-line.md"
# They print nothing but messages.
_WITHOUT_DATA = {"upgrade", "downgrade", "worker", "metrics", "mcp", "remote-worker", "ray-backfill"}


def _commands() -> dict[str, click.Command]:
    group = typer.main.get_command(app)
    return dict(group.commands)  # type: ignore[attr-defined]


@pytest.fixture
def pages(database: psycopg.Connection) -> psycopg.Connection:
    """A pipeline over 20 embedded pages, one of them with a long text in Japanese."""
    create_pages(database, 20)
    database.execute("UPDATE page SET body = repeat('川は海へ流れる。', 30) || E'\\n\\x1b[31mred' WHERE id = 3")
    create_pipeline(database, index_method="none", keyword="english")
    settle(database)
    return database


# --- what all commands have in common


def test_every_command_that_prints_data_has_json() -> None:
    without = {
        name
        for name, command in _commands().items()
        if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert without <= _WITHOUT_DATA


def test_the_reference_has_every_command_with_its_options() -> None:
    sections = dict(
        re.findall(
            r"^## embedline ([\w-]+)\n(.*?)(?=^## |\Z)",
            _REFERENCE.read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        )
    )
    commands = _commands()
    assert set(commands) == set(sections)
    common = {"--help", "--dsn", "--json", "--verbose"}
    missing = {
        (name, option)
        for name, command in commands.items()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option not in common and option not in sections[name]
    }
    # A switch that is on says how to switch it off.
    assert missing <= {("upgrade-model", "--contract")}


@pytest.mark.parametrize("arguments", [("--help",), ("watch", "--help"), ("statsu",), ("watch", "--interval", "0")])
def test_help_and_wrong_usage_are_plain_in_a_pipe(arguments: tuple[str, ...]) -> None:
    done = programs.run("embedline", *arguments)
    assert done.returncode == (0 if "--help" in arguments else 2)
    said = done.stdout + done.stderr
    assert said.isascii()
    assert "Usage: embedline" in said
    assert ("Error: " in said) == (done.returncode == 2)


def test_help_fits_a_narrow_terminal() -> None:
    lines = [unstyled(line) for line in lines_in_terminal("--help", columns=60)]
    assert max(map(len, lines)) <= 60
    assert any("Observe" in line for line in lines)


def test_bash_completes_the_commands() -> None:
    script = (
        'eval "$(embedline --show-completion)"; COMP_WORDS=(embedline stat); COMP_CWORD=1;'
        ' _embedline_completion embedline stat; echo "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "status\n", done.stderr


def test_an_error_is_a_sentence_with_a_hint(empty_database_dsn: str, tmp_path: Path) -> None:
    (tmp_path / "alembic.ini").write_text("no section\n")
    upgrade = ("upgrade-model", "page", "--model", "m", "--config", str(tmp_path / "alembic.ini"))
    with psycopg.connect(empty_database_dsn, autocommit=True) as connection:
        absent = run(empty_database_dsn, "status")
        connection.execute("CREATE SCHEMA embedline")
        older = run(empty_database_dsn, "status", "--json")
        connection.execute("DROP SCHEMA embedline")
    unreachable = run("postgresql://localhost:1/none", "alerts")
    broken = run("", *upgrade)
    for done, message, hint in (
        (absent, "Embedline is not installed in this database", "embedline upgrade"),
        (older, "the database has an older Embedline than this command", "embedline upgrade"),
        (unreachable, "Connection refused", "--dsn"),
        (broken, "unexpected MissingSectionHeaderError", "EMBEDLINE_TRACEBACK=1"),
    ):
        first, second = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (1, "")
        assert first.startswith("error: ")
        assert message in first
        assert second.startswith("HINT: ")
        assert hint in second
    traced = programs.run("embedline", *upgrade, env={**os.environ, "EMBEDLINE_TRACEBACK": "1"})
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr


# --- search


def test_search_in_a_pipe_is_one_line_a_chunk(pages: psycopg.Connection, database_dsn: str) -> None:
    done = run(database_dsn, "search", "page", "Title 5 Body number 5 about rockets", "-k", "4")
    head, *rows = done.stdout.splitlines()
    assert (done.returncode, head.split()) == (0, ["score", "key", "text"])
    assert len(rows) == 4
    assert rows[0].split()[1:4] == ["5", "Title", "5"]
    scores = [float(row.split()[0]) for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_search_for_programs_has_the_whole_text(pages: psycopg.Connection, database_dsn: str) -> None:
    done = run(database_dsn, "search", "page", "川は海へ流れる", "--k", "1", "--json")
    (row,) = json.loads(done.stdout)
    assert row["key"] == "3"
    assert row["chunk"].count("川") > 10


def test_search_by_both_shows_the_ranks_filters_and_explains(pages: psycopg.Connection, database_dsn: str) -> None:
    asked = ["search", "page", "number 5 about rockets", "--mode", "hybrid", "--filter", "id % 2 = 1"]
    done = run(database_dsn, *asked)
    head, *rows = done.stdout.splitlines()
    assert (done.returncode, head.split()) == (0, ["score", "semantic", "keyword", "key", "text"])
    assert rows[0].split()[2:4] == ["1", "5"]
    assert {int(row.split()[3]) % 2 for row in rows} == {1}
    (best, *_) = json.loads(run(database_dsn, *asked, "--json").stdout)
    assert (best["keyword_rank"], best["key"], best["chunk_start"]) == (1, "5", 0)
    plan = run(database_dsn, *asked, "--explain").stdout
    assert plan.startswith("vector:\n")
    assert "\nkeyword:\n" in plan
    refused = run(database_dsn, "search", "page", "rockets", "--reranker", "static-256")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is no reranker" in refused.stderr


@pytest.mark.parametrize("columns", [80, 30])
def test_search_cuts_texts_at_the_edge_of_the_terminal(
    pages: psycopg.Connection, database_dsn: str, columns: int
) -> None:
    lines = lines_in_terminal("search", "page", "川は海へ流れる", "--dsn", database_dsn, columns=columns)
    # An ideograph takes two columns.
    assert max(sum(1 + (character > "\u2e80") for character in line) for line in lines) <= columns
    assert any("川は海へ" in line and line.endswith("...") for line in lines)
    # A text must not steer the terminal.
    assert not any("\x1b" in line for line in lines)


# --- requeue and verify


def test_requeue_tells_how_many(pages: psycopg.Connection, database_dsn: str) -> None:
    pages.execute("UPDATE page SET title = U&'\\200B', body = U&'\\200B' WHERE id IN (7, 9)")
    settle(pages)
    assert scalar(pages, "SELECT dead_letters FROM embedline.status") == 2
    one = run(database_dsn, "requeue", "page", "--key", '{"id": 7}')
    assert (one.returncode, one.stdout) == (0, "1 row of pipeline page queued again.\n")
    # A dead letter stays until its row is settled.
    rest = run(database_dsn, "requeue", "page", "--json")
    assert json.loads(rest.stdout)["queued"] == 2
    chunks = run(database_dsn, "requeue", "page", "--version", "1")
    assert chunks.stdout == "0 chunks of pipeline page queued again.\n"
    absent = run(database_dsn, "requeue", "page", "--version", "7")
    assert (absent.returncode, absent.stdout) == (1, "")
    assert absent.stderr.startswith("error: embedline: ")
    both = run(database_dsn, "requeue", "page", "--version", "1", "--key", "{}")
    assert both.returncode == 2


def test_verify_ends_with_a_code_of_its_own_until_it_is_repaired(pages: psycopg.Connection, database_dsn: str) -> None:
    pages.execute(f"DELETE FROM {PAGE('chunk')} WHERE key_id = 1")
    found = run(database_dsn, "verify", "page", "--json")
    assert found.returncode == 3
    assert [(row["finding"], row["count"], row["repaired"]) for row in json.loads(found.stdout)] == [
        ("missing_vector", 1, 0)
    ]
    assert run(database_dsn, "verify", "page", "--repair").returncode == 0
    settle(pages)
    clean = run(database_dsn, "verify", "page")
    assert (clean.returncode, clean.stdout) == (0, "Pipeline page is what its source asks for.\n")
    assert run(database_dsn, "verify", "nothing").returncode == 1


# --- watch and alerts


@pytest.fixture
def waiting(database: psycopg.Connection) -> psycopg.Connection:
    """A pipeline whose backfill no worker has begun."""
    create_pages(database, 40)
    database.execute("ANALYZE page")
    create_pipeline(database, index_method="none")
    return database


def test_watch_once_is_a_line_a_task_in_a_pipe(waiting: psycopg.Connection, database_dsn: str) -> None:
    done = run(database_dsn, "watch", "--once")
    assert done.stdout == "page v1 backfill, no worker: 0.0 %, 0 of 40 rows\n"
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(run(database_dsn, "watch", "--once", "--json").stdout)
    assert (row["task"], row["done"], row["total"], row["percent"]) == ("backfill", 0, 40, 0)
    assert run(database_dsn, "watch", "--pipeline", "another").stdout == "Nothing is in progress.\n"


def test_watch_ends_with_the_work(waiting: psycopg.Connection, database_dsn: str) -> None:
    process = programs.Process(
        "embedline", ("watch", "--interval", "0.1"), env={**os.environ, "EMBEDLINE_DSN": database_dsn}
    )
    wait_until(lambda: _watches(waiting), 60, "the command reads the view")
    settle(waiting)
    output, messages = process.communicate(60)
    assert (process.returncode, messages) == (0, "")
    first, *_, last = output.splitlines()
    assert first == "page v1 backfill, no worker: 0.0 %, 0 of 40 rows"
    assert last.endswith(": ended") or last.endswith(", ended")


def _watches(connection: psycopg.Connection) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'embedline' AND query LIKE '%embedline.progress%'"
    return bool(scalar(connection, query))


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_watch_draws_bars_as_wide_as_the_terminal_allows(
    waiting: psycopg.Connection, database_dsn: str, columns: int
) -> None:
    lines = [unstyled(line) for line in lines_in_terminal("watch", "--once", "--dsn", database_dsn, columns=columns)]
    drawn = [line.rstrip() for line in lines if line.strip()]
    assert max(map(len, drawn)) <= columns
    assert drawn[0].startswith("page v1 backfill, no worker")
    assert len(drawn) == (1 if columns == 140 else 2)
    assert "━" in drawn[-1]
    assert drawn[-1].endswith("0.0 %  0 of 40 rows")


def test_watch_stopped_by_a_person_ends_with_130(waiting: psycopg.Connection, database_dsn: str) -> None:
    with Terminal(database_dsn, "watch") as terminal:
        wait_until(lambda: "no worker" in terminal.text, 60, "the bar is drawn")
        terminal.interrupt()
        assert terminal.wait() == 130
    assert "Traceback" not in terminal.text


def test_alerts_end_with_a_code_of_their_own(pages: psycopg.Connection, database_dsn: str) -> None:
    # An old pgvector is a note.
    quiet = run(database_dsn, "alerts")
    assert quiet.returncode == 0
    assert "warning" not in quiet.stdout
    pages.execute("UPDATE page SET title = U&'\\200B', body = U&'\\200B' WHERE id = 7")
    settle(pages)
    found = run(database_dsn, "alerts", "--json")
    assert found.returncode == 3
    alert = json.loads(found.stdout)[0]
    assert (alert["severity"], alert["alert"], alert["subject"]) == ("warning", "dead_letters", "page")
    assert alert["remedy"] == "SELECT embedline.requeue('page');"
    (line,) = [line for line in run(database_dsn, "alerts").stdout.splitlines() if line.startswith("warning")]
    assert line.split()[1:3] == ["dead_letters", "page"]
    assert line.endswith(alert["remedy"])
    shown = [unstyled(line) for line in lines_in_terminal("alerts", "--dsn", database_dsn, columns=60)]
    assert max(len(line) for line in shown if "apt-get" not in line) <= 60
    assert "            SELECT embedline.requeue('page');" in shown
