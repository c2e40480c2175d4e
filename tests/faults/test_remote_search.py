"""Searches with a remote model: what all sessions of the server share, and what stays as if each asked alone."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from conftest import StartCluster
from embedline.dev.cluster.server import Cluster
from embedline.model_host.host_settings import remote_settings
from stub_provider import StubProvider
from support import create_pipeline, scalar, searching, settle, wait_until
from working import create_stub_model, dsn_of, insert_rows, remove_all, working

KEY = "sk-test-0123456789abcdef"
# What a session has imported. PL/Python's sessions share an interpreter among their functions.
HAS_OPENAI = """
    CREATE OR REPLACE FUNCTION public.has_openai() RETURNS boolean LANGUAGE plpython3u AS $$
        import sys
        return "openai" in sys.modules
    $$
"""


# The run's server has made these imports for its sessions: see tests/warm. Without them a session begins as on other servers.
FORGET_IMPORTS = """
    DO LANGUAGE plpython3u $$
        import sys
        for name in [name for name in sys.modules if name.partition(".")[0] in ("embedline", "openai")]:
            del sys.modules[name]
    $$
"""


@pytest.fixture
def page(stub_database: psycopg.Connection, stub: StubProvider) -> psycopg.Connection:
    """Three rows, embedded, and nothing counted since."""
    prepare(stub_database, stub)
    stub.forget()
    return stub_database


def prepare(connection: psycopg.Connection, stub: StubProvider, **model: object) -> None:
    create_stub_model(connection, stub, **model)
    connection.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
    insert_rows(connection, 1, 3)
    create_pipeline(connection, "page", "page", "body", "stub", index_method="none")
    settle(connection)
    connection.execute(HAS_OPENAI)


@pytest.fixture
def session(page: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A session that has done nothing yet."""
    with psycopg.connect(dsn_of(page), autocommit=True) as connection:
        connection.execute(FORGET_IMPORTS)
        yield connection


def host_file(cluster_pid: int, suffix: str) -> Path:
    """Return a file of the host of remote models that belongs to a server."""
    (found,) = Path(tempfile.gettempdir()).glob(f"embedline-*/{cluster_pid}-*/{remote_settings().name}.{suffix}")
    return found


def host_pid(connection: psycopg.Connection) -> int:
    """Return the process of the host that a connection's server has, from its log."""
    text = host_file(postmaster_pid(connection), "log").read_text()
    return int(re.findall(r"model host (\d+) listens", text)[-1])


def postmaster_pid(connection: psycopg.Connection) -> int:
    status = Path(f"/proc/{connection.info.backend_pid}/status").read_text()
    return int(re.findall(r"^PPid:\s+(\d+)$", status, re.MULTILINE)[0])


def test_a_search_imports_no_client_of_a_provider(session: psycopg.Connection, stub: StubProvider) -> None:
    assert len(searching(session, "page", "a question")) == 3
    assert stub.texts_seen() == {"a question": 1}
    assert not scalar(session, "SELECT has_openai()")


def test_a_query_of_another_session_is_not_paid_for_again(
    page: psycopg.Connection, session: psycopg.Connection, stub: StubProvider
) -> None:
    first = searching(page, "page", "the same question")
    assert searching(session, "page", "the same question") == first
    assert scalar(session, "SELECT embedline.embed_query('page', 'the same question') IS NOT NULL")
    assert stub.texts_seen() == {"the same question": 1}


def test_vectors_of_before_a_change_of_the_model_are_not_used(
    page: psycopg.Connection, session: psycopg.Connection, stub: StubProvider
) -> None:
    searching(page, "page", "a question of before")
    page.execute("UPDATE embedline.version SET vectors_valid_from = now()")
    searching(session, "page", "a question of before")
    page.execute("UPDATE embedline.model SET fingerprint = 'another'")
    searching(session, "page", "a question of before")
    assert stub.texts_seen() == {"a question of before": 3}


def test_statement_timeout_ends_the_wait_for_a_silent_provider(session: psycopg.Connection, stub: StubProvider) -> None:
    stub.behave(rules=[{"match": "unanswered", "answer": "silence"}])
    session.execute("SET statement_timeout = '300ms'")
    with pytest.raises(errors.QueryCanceled):
        searching(session, "page", "unanswered")
    session.execute("RESET statement_timeout")
    assert len(searching(session, "page", "answered")) == 3


def test_a_cancel_ends_the_wait_for_a_silent_provider(
    page: psycopg.Connection, session: psycopg.Connection, stub: StubProvider
) -> None:
    stub.behave(rules=[{"match": "unanswered", "answer": "silence"}])

    def cancel() -> None:
        wait_until(lambda: stub.in_flight() > 0, 20, "the query is on its way")
        page.execute("SELECT pg_cancel_backend(%s)", (session.info.backend_pid,))

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(errors.QueryCanceled):
        searching(session, "page", "unanswered")
    thread.join()
    assert len(searching(session, "page", "answered")) == 3


@pytest.mark.parametrize(
    ("rule", "sqlstate", "words", "hint"),
    [
        ({"status": 400}, "EL012", "HTTP status 400", None),
        ({"status": 401}, "EL013", "HTTP status 401", "API key in the server's environment"),
        ({"status": 302}, "EL013", "HTTP status 302", "final base URL"),
        ({"status": 503}, "EL011", "HTTP status 503", None),
        ({"answer": "html"}, "EL011", "not JSON", None),
        ({"answer": "few"}, "EL014", "0 vectors for 1 texts", None),
        ({"answer": "narrow"}, "EL004", "dimension", None),
    ],
)
def test_errors_of_the_provider_reach_the_caller_as_they_are(
    session: psycopg.Connection,
    stub: StubProvider,
    rule: dict[str, object],
    sqlstate: str,
    words: str,
    hint: str | None,
) -> None:
    body = '{"error": {"message": "the reason"}}'
    stub.behave(rules=[rule | ({"body": body} if "status" in rule else {})])
    with pytest.raises(psycopg.Error, match=words) as caught:
        searching(session, "page", f"a question for {rule}")
    assert caught.value.sqlstate == sqlstate
    if "status" in rule:
        assert caught.value.diag.message_detail == "the reason"
    assert (hint is None) == (caught.value.diag.message_hint is None)
    assert hint is None or hint in str(caught.value.diag.message_hint)
    assert not scalar(session, "SELECT has_openai()"), "asked once, by the host"
    assert stub.counts()["requests"] == 1


def test_a_killed_host_is_not_seen_by_its_sessions(page: psycopg.Connection, session: psycopg.Connection) -> None:
    searching(session, "page", "before")
    first = host_pid(page)
    os.kill(first, signal.SIGKILL)
    assert len(searching(session, "page", "after")) == 3
    assert host_pid(page) != first
    assert not scalar(session, "SELECT has_openai()")


def test_a_worker_has_the_host_run_before_a_search_needs_it(page: psycopg.Connection) -> None:
    searching(page, "page", "before")
    first = host_pid(page)
    os.kill(first, signal.SIGKILL)
    with working(page):
        log = host_file(postmaster_pid(page), "log")
        wait_until(
            # A host that starts replaces the log.
            lambda: log.exists() and re.findall(r"host (\d+) listens", log.read_text()) not in ([], [str(first)]),
            30,
            "one listens",
        )


@pytest.fixture(scope="module")
def cramped_cluster(start_cluster: StartCluster) -> Iterator[Cluster]:
    """A server on which no host can start: the path of its socket would be too long."""
    with tempfile.TemporaryDirectory(prefix="embedline-") as folder:
        deep = Path(folder) / ("d" * 90)
        deep.mkdir()
        for path in (Path(folder), deep):
            path.chmod(0o777)
        yield start_cluster(environment={"TMPDIR": str(deep)})


def test_a_session_without_a_host_asks_the_provider_itself(cramped_cluster: Cluster, stub: StubProvider) -> None:
    with psycopg.connect(cramped_cluster.dsn(), autocommit=True) as connection:
        prepare(connection, stub)
    with psycopg.connect(cramped_cluster.dsn(), autocommit=True) as connection:
        for number in range(2):
            assert len(searching(connection, "page", f"question {number}")) == 3
        assert scalar(connection, "SELECT has_openai()")
        remove_all(connection)


def test_key_and_query_stand_in_no_log(start_cluster: StartCluster, stub: StubProvider) -> None:
    cluster = start_cluster(environment={"EMBEDLINE_TEST_KEY": KEY})
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        prepare(connection, stub, api_key_env="EMBEDLINE_TEST_KEY")
        assert "listens" in host_file(postmaster_pid(connection), "log").read_text(), "create_model has started it"
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        searching(connection, "page", "a private question")
        for status in (400, 401, 429, 500):
            stub.behave(rules=[{"status": status, "body": f"Incorrect API key {KEY}, a private question"}])
            with pytest.raises(psycopg.Error) as caught:
                searching(connection, "page", "another private question")
            assert KEY not in str(caught.value)
        host_log = host_file(postmaster_pid(connection), "log").read_text()
        assert KEY not in host_log + cluster.log_file.read_text()
        assert "private" not in host_log
        remove_all(connection)
