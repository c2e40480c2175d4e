"""Publish to a subscriber that has only pgvector, and wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import conninfo

from support import scalar, wait_until
from working import dsn_of

_STATES = "SELECT count(*) = 0 FROM pg_subscription_rel WHERE srsubstate <> 'r'"


def prepare(publisher: psycopg.Connection, subscriber: psycopg.Connection, pipeline: str = "page") -> None:
    """Run the publisher's text on the subscriber."""
    subscriber.execute(scalar(publisher, "SELECT embedline.subscriber_ddl(%s)", (pipeline,)))


def subscribe(
    publisher: psycopg.Connection, subscriber: psycopg.Connection, pipeline: str = "page", **login: str
) -> None:
    """Subscribe to a pipeline's publication, and wait for the copy."""
    info = publisher.info
    # The server's libpq is older than psycopg's, and does not know all of its options.
    address = conninfo.make_conninfo(
        "",
        host=info.host,
        port=info.port,
        dbname=info.dbname,
        **({"user": info.user, "password": info.password} | login),
    )
    name = f"embedline_{pipeline}"
    subscriber.execute(f"CREATE SUBSCRIPTION {name} CONNECTION '{address}' PUBLICATION {name}")
    wait_until_copied(subscriber)


def refresh(subscriber: psycopg.Connection, pipeline: str = "page") -> None:
    """Subscribe to tables that joined the publication, and wait for their copy."""
    subscriber.execute(f"ALTER SUBSCRIPTION embedline_{pipeline} REFRESH PUBLICATION")
    wait_until_copied(subscriber)


def wait_until_copied(subscriber: psycopg.Connection) -> None:
    """Wait until every table of every subscription is up to date."""
    wait_until(lambda: scalar(subscriber, _STATES), 30, "the tables are copied")


def wait_until_caught_up(publisher: psycopg.Connection, slots: int) -> None:
    """Wait until the subscribers have confirmed all that is committed now."""
    lsn = scalar(publisher, "SELECT pg_current_wal_lsn()")
    query = "SELECT count(*) = %s FROM pg_replication_slots WHERE confirmed_flush_lsn >= %s"
    wait_until(lambda: scalar(publisher, query, (slots, lsn)), 30, "the subscribers have caught up")


class Seen:
    """What a reader has seen: results with how often, in a session of its own."""

    def __init__(self) -> None:
        self.results: dict[object, int] = {}
        self.error: Exception | None = None

    def sees(self, result: object) -> Callable[[], bool]:
        """Return a condition: the reader has got this result more often than now."""
        before = self.results.get(result, 0)
        return lambda: self.results.get(result, 0) > before + 1


@contextmanager
def reading(connection: psycopg.Connection, ask: Callable[[psycopg.Connection], object]) -> Iterator[Seen]:
    """Ask all the time for as long as the block lasts."""
    seen, ended = Seen(), threading.Event()

    def read() -> None:
        try:
            with psycopg.connect(dsn_of(connection), autocommit=True) as session:
                while not ended.is_set():
                    result = ask(session)
                    seen.results[result] = seen.results.get(result, 0) + 1
        except psycopg.Error as error:
            seen.error = error

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
    assert seen.error is None, seen.error
