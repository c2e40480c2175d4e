"""Statements and commands that take minutes say how far they are, to psql, to other sessions and on the command line."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from command_line import Terminal, run
from conftest import Connect, MakeRole
from small_models import register_static
from support import create_pages, create_pipeline, drain, scalar, settle, wait_until

_PROGRESS = "SELECT task, pipeline, version, step, percent, seconds FROM embedline.evaluation_progress('page')"
_OUR_LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = %s"
_EVALUATE = "SELECT verdict FROM embedline.evaluate('page', 1, query_count => 10)"


class Gate:
    """An endpoint that can be closed: requests wait until it is opened again, or are refused."""

    def __init__(self, server: HTTPServer) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.waiting = threading.Event()
        self.refused: str | None = None
        self.status = 200
        self.url = server.url_for("/v1")
        server.expect_request("/v1/embeddings").respond_with_handler(self._answer)

    def close(self) -> None:
        """Let requests wait from now on."""
        self.waiting.clear()
        self.is_open.clear()

    def _answer(self, request: Request) -> Response:
        texts = request.get_json()["input"]
        self.waiting.set()
        self.is_open.wait(60)
        if self.status != 200 or (self.refused and any(self.refused in text for text in texts)):
            status = self.status if self.status != 200 else 400
            return Response('{"error": {"message": "this is refused"}}', status, content_type="application/json")
        data = [
            {"object": "embedding", "index": n, "embedding": [1.0 + hash(text) % (i + 2) for i in range(8)]}
            for n, text in enumerate(texts)
        ]
        body = {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        return Response(json.dumps(body), content_type="application/json")


@pytest.fixture
def gate(httpserver: HTTPServer) -> Iterator[Gate]:
    """The endpoint, open."""
    made = Gate(httpserver)
    yield made
    made.is_open.set()


@pytest.fixture
def pages(database: psycopg.Connection, gate: Gate) -> psycopg.Connection:
    """20 rows and a pipeline on a model behind the endpoint; nothing is embedded yet."""
    database.execute("SELECT embedline.create_model('http', 'openai', 'm', base_url => %s)", (gate.url,))
    create_pages(database, 20)
    create_pipeline(database, model="http", index_method="none")
    return database


def test_another_session_sees_how_far_a_gate_is_and_its_client_gets_a_notice(
    pages: psycopg.Connection, gate: Gate, connect: Connect, make_role: MakeRole
) -> None:
    settle(pages)
    evaluating, looking = connect(), connect(make_role("embedline_reader"))
    notices: list[str] = []
    evaluating.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    gate.close()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: evaluating.execute(_EVALUATE).fetchall())
        try:
            gate.waiting.wait(60)
            wait_until(lambda: looking.execute(_PROGRESS).fetchone(), 30, "the gate is seen")
            row = looking.execute(_PROGRESS).fetchone()
            assert row is not None
            assert row[:5] == ("evaluate", "page", 1, "embedding the queries", 0.0)
            # A gate of two seconds is worth a notice at its next step; the statement began a moment before it.
            wait_until(lambda: looking.execute(_PROGRESS).fetchall()[0][5] > 4, 30, "two seconds are over")
        finally:
            gate.is_open.set()
        assert done.result(60)[0] == ("inconclusive",)
    assert notices
    assert all(notice.startswith('evaluate, version 1 of pipeline "page": ') for notice in notices)
    assert looking.execute(_PROGRESS).fetchall() == []
    assert scalar(pages, _OUR_LOCKS, (evaluating.info.backend_pid,)) == 0


def test_a_cancelled_gate_is_no_longer_seen(pages: psycopg.Connection, gate: Gate, connect: Connect) -> None:
    settle(pages)
    evaluating = connect()
    gate.close()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: evaluating.execute(_EVALUATE).fetchall())
        try:
            gate.waiting.wait(60)
            wait_until(lambda: pages.execute(_PROGRESS).fetchone(), 30, "the gate is seen")
            pages.execute("SELECT pg_cancel_backend(%s)", (evaluating.info.backend_pid,))
            with pytest.raises(psycopg.errors.QueryCanceled):
                done.result(60)
        finally:
            gate.is_open.set()
    assert pages.execute(_PROGRESS).fetchall() == []
    assert scalar(pages, _OUR_LOCKS, (evaluating.info.backend_pid,)) == 0


def test_evaluate_shows_a_bar_on_a_terminal(pages: psycopg.Connection, gate: Gate, database_dsn: str) -> None:
    settle(pages)
    gate.close()
    with Terminal(database_dsn, "evaluate", "page", "--version", "1", "--query-count", "10") as terminal:
        wait_until(lambda: "embedding the queries" in terminal.text, 60, "the bar is drawn")
        assert "version 1 of page" in terminal.text
        assert "━" in terminal.text
        gate.is_open.set()
        assert terminal.wait() == 2
    assert "nDCG@10" in terminal.text
    assert "version 1 of page: inconclusive" in terminal.text


def _add_static_version(database: psycopg.Connection, dimensions: int) -> None:
    name = register_static(database, dimensions)
    database.execute("SELECT embedline.add_embedding_version('page', %s, index_method => 'none')", (name,))
    complete = "SELECT bool_and(state = 'complete') FROM embedline.versions"
    wait_until(lambda: drain(database) == 0 and scalar(database, complete), 60, "the version is filled")


def test_the_exit_code_of_evaluate_is_the_verdict(database: psycopg.Connection, database_dsn: str) -> None:
    create_pages(database, 120)
    create_pipeline(database, index_method="none")
    settle(database)
    _add_static_version(database, 2)
    arguments = ("evaluate", "page", "--version", "2", "--query-count", "120")
    passed = run(database_dsn, *arguments, "--margin", "0.99")
    assert passed.returncode == 0, passed.stderr
    assert "version 2 of page: pass" in passed.stdout
    assert passed.stdout.rstrip().endswith("SELECT embedline.cutover('page', 2);")
    assert "measuring version 2 of page" in passed.stderr
    assert "\x1b" not in passed.stdout + passed.stderr
    assert passed.stdout.isascii()
    assert passed.stdout.split()[:4] == ["measure", "old", "new", "difference"]
    failed = run(database_dsn, *arguments, "--json")
    assert failed.returncode == 1, failed.stderr
    found = json.loads(failed.stdout)
    assert (found["pipeline"], found["version"], found["verdict"]) == ("page", 2, "fail")
    assert found["rows"][0]["measure"] == "verdict"
    assert {row["measure"] for row in found["rows"]} >= {"nDCG@10", "recall@10", "MRR@10"}
    undecided = run(database_dsn, "evaluate", "page", "--version", "1", "--query-count", "5")
    assert undecided.returncode == 2, undecided.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "nothing", "--version", "1"), 'there is no pipeline "nothing"'),
        (("evaluate", "page", "--version", "7"), "version 7"),
        (("evaluate", "page", "--version", "1", "--canaries", "no_table"), "no_table"),
        (("evaluate", "page"), "--version"),
        (("evaluate", "page", "--version", "one"), "--version"),
    ],
)
def test_what_cannot_be_measured_has_an_exit_code_of_its_own(
    pages: psycopg.Connection, database_dsn: str, arguments: tuple[str, ...], message: str
) -> None:
    done = run(database_dsn, *arguments)
    assert done.returncode == 3, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_until_idle_shows_bar_and_summary_on_a_terminal(
    pages: psycopg.Connection, gate: Gate, database_dsn: str
) -> None:
    gate.close()
    with Terminal(database_dsn, "worker", "--until-idle") as terminal:
        wait_until(lambda: "left" in terminal.text or "is read" in terminal.text, 60, "the bar is drawn")
        assert "page" in terminal.text
        assert "━" in terminal.text
        gate.is_open.set()
        assert terminal.wait() == 0
    assert "20 rows embedded in " in terminal.text
    assert "nothing is left to embed" in terminal.text


def test_a_worker_until_idle_prints_plain_lines_in_a_pipe(
    pages: psycopg.Connection, gate: Gate, database_dsn: str
) -> None:
    pages.execute("ANALYZE page")
    # These are queued: the backfill's share of the table does not count them again.
    pages.execute(
        "INSERT INTO page (id, title, body) SELECT n, 'Late', 'row ' || n FROM generate_series(101, 150) AS n"
    )
    gate.close()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run, database_dsn, "worker", "--until-idle")
        gate.waiting.wait(60)
        gate.is_open.set()
        result = done.result(120)
    assert result.returncode == 0, result.stderr
    assert "page: 0 rows done, about 70 left" in result.stderr
    # A row that is queued and in a block of the backfill may be embedded for both.
    assert re.match(r"\d+ rows embedded in .*; nothing is left to embed\n$", result.stdout)
    assert "\x1b" not in result.stdout + result.stderr
    again = run(database_dsn, "worker", "--until-idle")
    assert again.stdout.startswith("0 rows embedded in ")
    assert again.returncode == 0


def test_a_worker_until_idle_ends_with_what_it_could_not_embed(
    pages: psycopg.Connection, gate: Gate, database_dsn: str
) -> None:
    pages.execute("UPDATE page SET body = 'poison' WHERE id = 7")
    gate.refused = "poison"
    done = run(database_dsn, "worker", "--until-idle")
    assert done.returncode == 1
    assert "19 rows embedded" in done.stdout
    assert "error: page: 1 row could not be embedded" in done.stderr
    assert "SELECT embedline.requeue('page');" in done.stderr
    gate.refused = None
    pages.execute("SELECT embedline.requeue('page')")
    assert run(database_dsn, "worker", "--until-idle").returncode == 0


def test_a_worker_whose_provider_fails_says_so_at_its_end(
    pages: psycopg.Connection, gate: Gate, database_dsn: str
) -> None:
    gate.status = 401
    done = run(database_dsn, "worker", "--until-idle", "--max-seconds", "3")
    assert done.returncode == 1
    assert "0 rows embedded" in done.stdout
    assert "not done: page" in done.stdout
    assert 'error: model "http" is left alone for now' in done.stderr
    assert "SELECT * FROM embedline.circuit;" in done.stderr


def test_a_role_that_may_only_work_sees_the_same(
    pages: psycopg.Connection, database_dsn: str, make_role: MakeRole, role_passwords: dict[str, str]
) -> None:
    role = make_role("embedline_worker")
    dsn = psycopg.conninfo.make_conninfo(database_dsn, user=role, password=role_passwords[role])
    done = run(dsn, "worker", "--until-idle")
    assert done.returncode == 0, done.stderr
    assert "20 rows embedded" in done.stdout


def test_a_backfill_is_told_with_its_unit(pages: psycopg.Connection, database_dsn: str) -> None:
    blocks = scalar(pages, "SELECT backfill_total FROM embedline.status")
    assert scalar(pages, "SELECT backfill_percent FROM embedline.status") == 0
    assert f"0 % of {blocks} blocks" in run(database_dsn, "status").stdout
    settle(pages)
    assert scalar(pages, "SELECT backfill_percent FROM embedline.status") == 100
    shown = run(database_dsn, "status").stdout
    assert "complete" in shown
    assert f"{blocks}/{blocks}" not in shown
