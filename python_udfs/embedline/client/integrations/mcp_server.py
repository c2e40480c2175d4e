"""Serve pipelines over the Model Context Protocol.

A tool runs fixed statements and passes texts as parameters, in a read-only transaction with a time limit. So a model
that was talked into something can read what its login may read, and nothing else.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import psycopg
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import ToolAnnotations
from psycopg.rows import dict_row
from pydantic import Field

import embedline
from embedline.client.connection import Connection, connect, server_message
from embedline.client.integrations.database import Pool, Row, make_pool
from embedline.client.integrations.search_call import search_call, shown
from embedline.core.sql_text import quote_ident
from embedline.errors import EmbedlineError

# Results of one search at most, because a model pays for each.
MOST_RESULTS = 50
# Characters of one column of a document, unless the caller asks for more.
_COLUMN_CHARACTERS = 20_000
_INSTRUCTIONS = (
    "Searches tables of a PostgreSQL database by meaning. list_pipelines names what can be searched; search returns"
    " chunks of text, each with the key of its row; get_document reads the whole row of a key."
)
_READ_ONLY = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)

_LOGIN = """
    SELECT current_user::text AS name, r.rolsuper AS is_superuser,
        to_regrole('embedline_reader') IS NOT NULL AND pg_has_role('embedline_reader', 'member') AS is_reader
    FROM pg_roles AS r WHERE r.rolname = current_user
"""
_PIPELINES = """
    SELECT s.pipeline, s.source, s.model, s.state, s.pending, s.backfill_percent::float8 AS backfill_percent,
        p.keyword AS keywords,
        (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute AS a
         WHERE a.attrelid = p.source AND a.attnum > 0 AND NOT a.attisdropped) AS columns
    FROM embedline.status AS s JOIN embedline.pipeline AS p ON p.name = s.pipeline
    WHERE has_any_column_privilege(p.source, 'SELECT') ORDER BY s.pipeline
"""
_STATUS = """
    SELECT pipeline, source, model, state, pending, backfill_percent::float8 AS backfill_percent,
        extract(epoch FROM oldest_pending_age)::float8 AS oldest_pending_seconds, dead_letters, last_error,
        workers_alive, index_state FROM embedline.status WHERE pipeline = %(pipeline)s
"""
_KEY = """
    SELECT p.source::text AS source, array_agg(a.attname::text ORDER BY k.position) AS names,
        array_agg(format_type(a.atttypid, -1) ORDER BY k.position) AS types
    FROM embedline.pipeline AS p CROSS JOIN unnest(p.key_attributes) WITH ORDINALITY AS k (attnum, position)
    JOIN pg_attribute AS a ON a.attrelid = p.source AND a.attnum = k.attnum
    WHERE p.name = %(pipeline)s GROUP BY p.source
"""


class NotAReader(EmbedlineError):
    """The login is not one for a server of tools."""

    sqlstate = "42501"


class Reader:
    """Runs the statements of the tools with the login's rights."""

    def __init__(self, dsn: str, timeout_seconds: float) -> None:
        """Connect.

        Raises NotAReader for a superuser, and for a role outside embedline_reader.
        """
        # The first connection is outside the pool, because a pool tells of a failure late and without its cause.
        with connect(dsn) as connection:
            _check_login(connection)
        self._milliseconds = round(timeout_seconds * 1000)
        self._pool: Pool = make_pool(dsn)

    def rows(self, statement: str, parameters: dict[str, Any]) -> list[Row]:
        """Run one statement in a read-only transaction of its own."""
        with self._pool.connection() as connection:
            # Said at BEGIN and to the end of the transaction, because behind PgBouncer a session is not kept.
            connection.read_only = True
            with connection.cursor(row_factory=dict_row) as cursor:
                cursor.execute(f"SET LOCAL statement_timeout = {self._milliseconds}".encode())
                cursor.execute(statement.encode(), parameters)
                found: list[Row] = cursor.fetchall()
                return found

    def document(self, pipeline: str, key: str) -> Row:
        """Return the row of a source by its key as `search` shows it.

        Raises ToolError if there is none.
        """
        found = self.rows(_KEY, {"pipeline": pipeline})
        if not found:
            raise ToolError(f'there is no pipeline "{pipeline}"; list_pipelines names them')
        names, types = found[0]["names"], found[0]["types"]
        values = _key_values(key, len(names))
        condition = " AND ".join(
            f"s.{_escaped(quote_ident(name))} = %(key_{number})s::{_escaped(kind)}"
            for number, (name, kind) in enumerate(zip(names, types, strict=True))
        )
        source = _escaped(found[0]["source"])
        rows = self.rows(
            f"SELECT to_jsonb(s) AS document FROM {source} AS s WHERE {condition}",
            {f"key_{number}": value for number, value in enumerate(values)},
        )
        if not rows:
            raise ToolError(f'pipeline "{pipeline}" has no document {key}')
        return dict(rows[0]["document"])

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


def _check_login(connection: Connection) -> None:
    row = connection.execute(_LOGIN).fetchone()
    name, is_superuser, is_reader = row or ("", False, False)
    if is_superuser or not is_reader:
        what = "is a superuser" if is_superuser else "is no member of embedline_reader"
        raise NotAReader(
            f"role {name} {what}",
            hint="CREATE ROLE assistant LOGIN; GRANT embedline_reader TO assistant; and SELECT on the sources",
        )


def _escaped(text: str) -> str:
    """Return SQL text in which psycopg takes no sign for a parameter."""
    return text.replace("%", "%%")


def _key_values(key: str, count: int) -> list[str]:
    """Return the texts of a key's columns; a key of several is a JSON array."""
    if count == 1:
        return [key]
    try:
        values = json.loads(key)
    except ValueError:
        values = None
    if not isinstance(values, list) or len(values) != count:
        raise ToolError(f"the key of this pipeline is a JSON array of {count} values, as search shows it")
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


@contextmanager
def _told() -> Iterator[None]:
    """Give the model the database's message and hint.

    Any other error stays on this side.
    """
    try:
        yield
    except psycopg.Error as error:
        raise ToolError(server_message(error) or "the database is away") from error


def make_server(reader: Reader) -> MCPServer[Any]:
    """Return the server with its four tools."""
    server: MCPServer[Any] = MCPServer(
        "embedline", instructions=_INSTRUCTIONS, version=embedline.__version__, log_level="WARNING"
    )

    @server.tool(annotations=_READ_ONLY)
    def list_pipelines() -> list[dict[str, Any]]:
        """List the pipelines that can be searched.

        Each comes with its table, its columns and how up to date it is.
        """
        with _told():
            return reader.rows(_PIPELINES, {})

    @server.tool(annotations=_READ_ONLY)
    def search(
        pipeline: Annotated[str, Field(description="A name from list_pipelines.")],
        query: Annotated[str, Field(description="Text to search for, in plain words.")],
        k: Annotated[int, Field(ge=1, le=MOST_RESULTS, description="Results at most.")] = 10,
        per_document: Annotated[bool, Field(description="Only the best chunk of each row.")] = False,
        mode: Annotated[
            Literal["vector", "keyword", "hybrid"] | None,
            Field(
                description="vector ranks by meaning, keyword by exact words such as names and codes, hybrid by both."
                " keyword and hybrid need a pipeline with keywords. Without it as the pipeline is set."
            ),
        ] = None,
    ) -> list[dict[str, Any]]:
        """Search a pipeline by meaning, by words, or by both.

        Return chunks of text, best first, with the keys of their rows.
        """
        options = {"per_document": per_document, "mode": mode}
        with _told():
            found = reader.rows(
                f"SELECT * FROM {search_call(options)}", {"pipeline": pipeline, "query": query, "k": k, **options}
            )
        return [{"key": row["key"], "chunk": row["chunk"], **shown(row)} for row in found]

    @server.tool(annotations=_READ_ONLY)
    def get_document(
        pipeline: Annotated[str, Field(description="A name from list_pipelines.")],
        key: Annotated[str, Field(description="The key of a search's result.")],
        max_characters: Annotated[int, Field(ge=1, description="Characters of each column at most.")] = (
            _COLUMN_CHARACTERS
        ),
    ) -> dict[str, Any]:
        """Read the whole row of a key.

        A column that is longer than max_characters is cut and named under truncated.
        """
        with _told():
            document = reader.document(pipeline, key)
        cut = [name for name, value in document.items() if isinstance(value, str) and len(value) > max_characters]
        return {
            "key": key,
            "document": {**document, **{name: document[name][:max_characters] for name in cut}},
            "truncated": cut,
        }

    @server.tool(annotations=_READ_ONLY)
    def status(pipeline: Annotated[str, Field(description="A name from list_pipelines.")]) -> dict[str, Any]:
        """Tell whether a pipeline is up to date.

        Return its changes that wait, dead letters, last error and the state of its index.
        """
        with _told():
            found = reader.rows(_STATUS, {"pipeline": pipeline})
        if not found:
            raise ToolError(f'there is no pipeline "{pipeline}"; list_pipelines names them')
        return found[0]

    return server


def is_loopback(host: str) -> bool:
    """Return True if an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve_http(server: MCPServer[Any], host: str, port: int) -> None:
    """Serve at http://HOST:PORT/mcp until SIGINT or SIGTERM.

    Raises ValueError for an address beyond loopback.
    """
    if not is_loopback(host):
        raise ValueError(
            f"{host} is no loopback address: any client that reaches the port would search with this login"
        )
    shown_host = f"[{host}]" if ":" in host else host
    # A page in a browser of this machine must not reach the port under a name of its own.
    here = [f"{name}:{port}" for name in (shown_host, "localhost", "127.0.0.1")]
    security = TransportSecuritySettings(allowed_hosts=here, allowed_origins=[f"http://{name}" for name in here])
    server.run("streamable-http", host=host, port=port, stateless_http=True, transport_security=security)
