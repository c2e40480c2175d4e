"""Serve the metrics of a database to Prometheus."""

from __future__ import annotations

import contextlib
import gzip
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

import psycopg

from embedline.client.connection import Connection, connect, lines, server_message
from embedline.errors import EmbedlineError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Longest time of a scrape in the server. Prometheus itself gives up after 10 s.
_TIMEOUT_MS = 8000
_AWAY = """\
# HELP embedline_up 1 if the database answered the scrape, 0 if it was away.
# TYPE embedline_up gauge
embedline_up 0
"""
_PAGE = "Metrics of Embedline are at /metrics.\n"
_FAULTS = (psycopg.Error, EmbedlineError, OSError)


class Scraper:
    """Reads the metrics over one connection, which it opens again once it is lost."""

    def __init__(self, dsn: str, say: Callable[[str], None]) -> None:
        self._dsn = dsn
        self._say = say
        self._connection: Connection | None = None
        self._trouble: str | None = None
        # Two scrapers at once take turns: the connection runs one statement at a time.
        self._turn = threading.Lock()

    def read(self) -> str | None:
        """Return the metrics, None if the database gives none.

        Each trouble is told once.
        """
        with self._turn:
            try:
                text = self._read()
            except _FAULTS as error:
                self._tell(_message(error))
                return None
            self._tell(None)
            return text

    def _read(self) -> str:
        if self._connection is not None:
            try:
                return scrape(self._connection)
            except psycopg.OperationalError:
                if not self._connection.broken:
                    raise
                # The server was started again, or ended the session: a new connection may do.
                self.close()
        self._connection = connect(self._dsn)
        return scrape(self._connection)

    def _tell(self, trouble: str | None) -> None:
        if trouble != self._trouble:
            self._say(f"error: {trouble}" if trouble else "the database answers again")
        self._trouble = trouble

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def scrape(connection: Connection) -> str:
    """Return the metrics as text."""
    # The limit ends with its transaction: behind a pool the next statement may run in another session.
    with connection.transaction():
        connection.execute(f"SET LOCAL statement_timeout = {_TIMEOUT_MS}")
        row = connection.execute("SELECT embedline.metrics()").fetchone()
    return str(row[0]) if row else ""


def parse_address(listen: str) -> tuple[str, int]:
    """Return host and port; an address of IPv6 stands in brackets."""
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"--listen {listen} is no ADDRESS:PORT, for example 127.0.0.1:9187")
    return host.strip("[]"), int(port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], read: Callable[[], str | None]) -> None:
        self.read = read
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            text = self.server.read()
            self._answer(200 if text is not None else 503, text if text is not None else _AWAY)
        else:
            self._answer(200 if path == "/" else 404, _PAGE)

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a line for each scrape hides the others."""


def serve(dsn: str, address: tuple[str, int], say: Callable[[str], None]) -> None:
    """Serve the metrics until SIGINT or SIGTERM.

    Raises OSError if the address cannot be used.
    """
    scraper = Scraper(dsn, say)
    server = _Server(address, scraper.read)

    def end(_: int, __: FrameType | None) -> None:
        # shutdown() waits for the loop, which this thread runs.
        threading.Thread(target=server.shutdown).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    say(f"serving {_url(server)}")
    with server:
        server.serve_forever(poll_interval=0.2)
    scraper.close()


@contextlib.contextmanager
def serving(address: tuple[str, int], read: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
    """Serve what `read` returns, from a thread, for the length of a block.

    Raises OSError if the address cannot be used.
    """
    server = _Server(address, read)
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True)
    thread.start()
    say(f"serving {_url(server)}")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _url(server: _Server) -> str:
    host, port = server.server_address[:2]
    return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/metrics"


def _message(error: object) -> str:
    if isinstance(error, EmbedlineError):
        return lines(error.message, error.detail, error.hint)
    if isinstance(error, psycopg.errors.InvalidSchemaName | psycopg.errors.UndefinedFunction):
        return "Embedline is not installed in this database, or is older\nHINT: embedline upgrade"
    return server_message(error) or str(error)
