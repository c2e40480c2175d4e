"""`embedline mcp` as the protocol's own client finds it, over stdio and over HTTP."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.server.mcpserver import MCPServer
from psycopg import conninfo

import command_line
import programs
from conftest import Connect, MakeRole
from embedline.client.integrations.mcp_server import NotAReader, Reader, is_loopback, make_server, serve_http
from support import create_pages, create_pipeline, free_port, scalar, settle, wait_until


@pytest.fixture
def login(database: psycopg.Connection, database_dsn: str, make_role: MakeRole, role_passwords: dict[str, str]) -> str:
    """URI of a role in embedline_reader that may read the table of a pipeline of twenty pages."""
    create_pages(database, 20)
    create_pipeline(database, keyword="english")
    settle(database)
    role = make_role("embedline_reader")
    database.execute(f"GRANT SELECT ON page TO {role}".encode())
    parts = conninfo.conninfo_to_dict(database_dsn)
    return f"postgresql://{role}:{role_passwords[role]}@{parts['host']}:{parts['port']}/{parts['dbname']}"


@pytest.fixture
def reader(login: str) -> Iterator[Reader]:
    """What the tools run their statements by."""
    reader = Reader(login, 10)
    yield reader
    reader.close()


async def _call(client: Client, tool: str, **arguments: Any) -> Any:
    """Call a tool; return its structured answer. A failure's text is raised."""
    result = await client.call_tool(tool, arguments)
    text = result.content[0].text if result.content else ""
    if result.is_error:
        raise LookupError(text)
    answer = result.structured_content
    return answer["result"] if set(answer) == {"result"} else answer


async def _tour(client: Client) -> None:
    tools = (await client.list_tools()).tools
    assert sorted(tool.name for tool in tools) == ["get_document", "list_pipelines", "search", "status"]
    assert all(tool.annotations.read_only_hint for tool in tools)
    (pipeline,) = await _call(client, "list_pipelines")
    assert (pipeline["pipeline"], pipeline["columns"]) == ("page", ["id", "title", "body", "views"])
    found = await _call(client, "search", pipeline="page", query="violins", k=2)
    assert [row["chunk"].split()[-1] for row in found] == ["violins", "violins"]
    read = await _call(client, "get_document", pipeline="page", key=found[0]["key"])
    assert read["document"]["title"] == f"Title {found[0]['key']}"
    state = await _call(client, "status", pipeline="page")
    assert (state["state"], state["pending"], state["dead_letters"]) == ("active", 0, 0)


async def test_an_assistant_searches_over_stdio(login: str) -> None:
    command = StdioServerParameters(
        command=sys.executable, args=["-m", "embedline.client.cli", "mcp"], env={"EMBEDLINE_DSN": login}
    )
    async with Client(command) as client:
        await _tour(client)


async def test_an_assistant_searches_over_http_on_loopback(login: str) -> None:
    port = free_port()
    process = programs.Process("embedline", ["mcp", "--dsn", login, "--listen", f"127.0.0.1:{port}"])
    try:
        wait_until(lambda: _answers(port), what="the server answers")
        async with Client(f"http://127.0.0.1:{port}/mcp") as client:
            await _tour(client)
        # A page that a browser loaded under another name is not let in.
        strange = httpx.post(f"http://127.0.0.1:{port}/mcp", json={}, headers={"Host": f"evil.example:{port}"})
        assert strange.status_code == 421
    finally:
        process.terminate()
        process.communicate(20)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org", "localhost.example.org"])
def test_only_a_loopback_address_is_listened_on(host: str) -> None:
    with pytest.raises(ValueError, match="is no loopback address"):
        serve_http(MCPServer("unused"), host, 8765)
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")


def test_the_command_refuses_an_address_beyond_loopback() -> None:
    done = command_line.run("postgresql:///nowhere", "mcp", "--listen", "0.0.0.0:8765")
    assert done.returncode == 2
    assert "only a loopback address" in done.stderr


async def test_an_assistant_chooses_words_or_meaning(reader: Reader) -> None:
    async with Client(make_server(reader)) as client:
        (pipeline,) = await _call(client, "list_pipelines")
        assert pipeline["keywords"] == "pg_catalog.english"
        asked = {"pipeline": "page", "query": "number 17", "k": 1}
        (words,) = await _call(client, "search", mode="keyword", **asked)
        assert (words["key"], words["keyword_rank"], "semantic_rank" in words) == ("17", 1, False)
        (both,) = await _call(client, "search", mode="hybrid", **asked)
        assert {"semantic_rank", "keyword_rank", "chunk_start"} <= set(both)
        with pytest.raises(LookupError, match="mode"):
            await _call(client, "search", mode="guess", **asked)


async def test_a_text_is_never_taken_for_sql(reader: Reader, database: psycopg.Connection) -> None:
    hostile = "x'); DROP TABLE page; SELECT ('%s {} \\"
    async with Client(make_server(reader)) as client:
        assert len(await _call(client, "search", pipeline="page", query=hostile, k=1)) == 1
        for tool, arguments in (
            ("search", {"pipeline": hostile, "query": "violins"}),
            ("get_document", {"pipeline": "page", "key": hostile}),
            ("get_document", {"pipeline": hostile, "key": "1"}),
            ("status", {"pipeline": hostile}),
        ):
            with pytest.raises(LookupError):
                await _call(client, tool, **arguments)
        with pytest.raises(LookupError, match="less than or equal to 50"):
            await _call(client, "search", pipeline="page", query="violins", k=51)
    assert scalar(database, "SELECT count(*) FROM page") == 20


async def test_statements_run_in_read_only_transactions_with_a_time_limit(login: str, reader: Reader) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        reader.rows("CREATE TABLE note ()", {})
    hasty = Reader(login, 0.2)
    try:
        with pytest.raises(psycopg.errors.QueryCanceled):
            hasty.rows("SELECT pg_sleep(30)", {})
        assert hasty.rows("SELECT current_setting('transaction_read_only') AS now", {}) == [{"now": "on"}]
    finally:
        hasty.close()


async def test_the_login_s_rights_decide(reader: Reader, database: psycopg.Connection) -> None:
    database.execute("ALTER TABLE page ENABLE ROW LEVEL SECURITY")
    database.execute("CREATE POLICY few ON page USING (id < 3)")
    async with Client(make_server(reader)) as client:
        found = await _call(client, "search", pipeline="page", query="violins", k=20)
        assert {row["key"] for row in found} == {"1", "2"}
        with pytest.raises(LookupError, match='pipeline "page" has no document 6'):
            await _call(client, "get_document", pipeline="page", key="6")
        database.execute(
            f"REVOKE SELECT ON page FROM {reader.rows('SELECT current_user::text AS r', {})[0]['r']}".encode()
        )
        assert await _call(client, "list_pipelines") == []
        with pytest.raises(LookupError, match="permission denied for table page"):
            await _call(client, "get_document", pipeline="page", key="1")


async def test_a_search_whose_text_cannot_be_noted_is_answered(reader: Reader, database: psycopg.Connection) -> None:
    database.execute("SELECT embedline.sample_queries('page', 1.0)")
    async with Client(make_server(reader)) as client:
        assert len(await _call(client, "search", pipeline="page", query="violins", k=3)) == 3
    assert scalar(database, "SELECT count(*) FROM embedline.query_sample") == 0


async def test_sessions_that_the_server_ended_are_replaced(reader: Reader, database: psycopg.Connection) -> None:
    async with Client(make_server(reader)) as client:
        await _call(client, "search", pipeline="page", query="violins", k=1)
        ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = %s"
        role = reader.rows("SELECT current_user::text AS name", {})[0]["name"]
        assert scalar(database, ended, (role,)) > 0
        assert len(await _call(client, "search", pipeline="page", query="violins", k=1)) == 1


async def test_documents_of_any_key_are_read_and_cut(reader: Reader, database: psycopg.Connection) -> None:
    database.execute(
        'CREATE TABLE pair ("first %" varchar(3), second date, body text, PRIMARY KEY ("first %", second))'
    )
    database.execute(
        "INSERT INTO pair VALUES ('a', '2026-01-02', repeat('violin ', 20)), ('abc', '2026-01-02', 'bread')"
    )
    create_pipeline(database, "pair", "pair", content="body")
    settle(database)
    database.execute("GRANT SELECT ON pair TO public")
    async with Client(make_server(reader)) as client:
        (found,) = await _call(client, "search", pipeline="pair", query="violin", k=1)
        read = await _call(client, "get_document", pipeline="pair", key=found["key"], max_characters=10)
        assert json.loads(found["key"]) == ["a", "2026-01-02"]
        assert read["document"] == {"first %": "a", "second": "2026-01-02", "body": "violin vio"}
        assert read["truncated"] == ["body"]
        for key in ("a", '["a"]', '["abcd", "2026-01-02"]'):
            with pytest.raises(LookupError):
                await _call(client, "get_document", pipeline="pair", key=key)


def test_a_superuser_and_a_role_that_is_no_reader_are_refused(
    database_dsn: str,
    database: psycopg.Connection,
    connect: Connect,
    make_role: MakeRole,
    role_passwords: dict[str, str],
) -> None:
    with pytest.raises(NotAReader, match="is a superuser"):
        Reader(database_dsn, 10)
    stranger = make_role()
    dsn = conninfo.make_conninfo(database_dsn, user=stranger, password=role_passwords[stranger])
    done = command_line.run(dsn, "mcp")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"role {stranger} is no member of embedline_reader" in done.stderr
    assert "GRANT embedline_reader" in done.stderr
