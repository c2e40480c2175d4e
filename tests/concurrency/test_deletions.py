"""Rows are deleted, come back and change keys beside workers that are killed: no reader ever sees a chunk of another row.

Each row has a number of its own from its first INSERT on, and its text begins with it: so a chunk tells whose it is.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors

from conftest import Connect
from stub_provider import StubProvider
from support import create_pipeline, data_count, scalar, settle
from working import create_stub_model

WRITERS, KEYS, SECONDS = 4, 24, 12
LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
FOREIGN = "SELECT count(*) FROM page_embedding WHERE chunk NOT LIKE 'row ' || born || ' %'"
FOUND = """
    SELECT count(*) FROM embedline.search('page', 'row 7', 200) AS s LEFT JOIN page AS p ON p.id::text = s.key
    WHERE p.id IS NULL OR s.chunk NOT LIKE 'row ' || p.born || ' %'
"""
Write = Callable[[psycopg.Connection, random.Random, int], None]
_numbers = itertools.count(1000)


def _insert(connection: psycopg.Connection, rng: random.Random, key: int) -> None:
    born = next(_numbers)
    clause = rng.choice(("DO NOTHING", "(id) DO UPDATE SET body = page.body || ' upserted'"))
    connection.execute(
        f"INSERT INTO page VALUES (%s, %s, %s) ON CONFLICT {clause}".encode(), (key, born, f"row {born} of {key}")
    )


def _delete(connection: psycopg.Connection, _rng: random.Random, key: int) -> None:
    connection.execute("DELETE FROM page WHERE id = %s", (key,))


def _edit(connection: psycopg.Connection, rng: random.Random, key: int) -> None:
    connection.execute("UPDATE page SET body = body || %s WHERE id = %s", (f" e{rng.randrange(9)}", key))


def _replace(connection: psycopg.Connection, rng: random.Random, key: int) -> None:
    _delete(connection, rng, key)
    _insert(connection, rng, key)


def _reload(connection: psycopg.Connection, rng: random.Random, key: int) -> None:
    """Take the writer's rows away and put them back, some of them under the keys of others."""
    rows = connection.execute("DELETE FROM page WHERE id %% %s = %s RETURNING *", (WRITERS, key % WRITERS)).fetchall()
    keys = [row[0] for row in rows]
    if rng.random() < 0.6:
        rng.shuffle(keys)
    with connection.cursor() as cursor, cursor.copy("COPY page FROM STDIN") as copy:
        for new_key, (_, born, body) in zip(keys, rows, strict=True):
            copy.write_row((new_key, born, body))


def _move(connection: psycopg.Connection, rng: random.Random, key: int) -> None:
    other = key + WRITERS * rng.randrange(1, 5)
    connection.execute("UPDATE page SET id = -id WHERE id IN (%s, %s)", (key, other))
    connection.execute("UPDATE page SET id = CASE id WHEN %s THEN %s ELSE %s END WHERE id IN (%s, %s)",
                       (-key, other, key, -key, -other))  # fmt: skip


def _in_one_statement(connection: psycopg.Connection, _rng: random.Random, key: int) -> None:
    born = next(_numbers)
    connection.execute(
        "WITH gone AS (DELETE FROM page WHERE id = %s RETURNING id)"
        " INSERT INTO page SELECT id, %s, 'row ' || %s || ' again' FROM gone",
        (key, born, born),
    )


WRITES: tuple[Write, ...] = (_insert, _insert, _delete, _edit, _replace, _reload, _move, _in_one_statement)


class _Scene:
    """What the threads share: when to end, and what went wrong."""

    def __init__(self, connect: Connect) -> None:
        self.connect = connect
        self.until = time.monotonic() + SECONDS
        self.failures: list[BaseException | str] = []

    def run(self, *actions: Callable[[], None]) -> None:
        """Run each action in a thread until all have returned."""

        def kept(action: Callable[[], None]) -> None:
            try:
                action()
            except BaseException as error:
                self.failures.append(error)

        threads = [threading.Thread(target=kept, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS + 60)

    @property
    def is_over(self) -> bool:
        """Whether the threads are to end."""
        return time.monotonic() > self.until or bool(self.failures)

    def write(self, number: int, level: str) -> None:
        """Write rows whose keys no other writer has: no one but us could make a transaction fail."""
        rng, connection = random.Random(number), self.connect(autocommit=False)
        connection.execute(f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}".encode())
        connection.execute("SET lock_timeout = '5s'")
        connection.commit()
        while not self.is_over:
            key = number + WRITERS * rng.randrange(1, KEYS)
            try:
                for _ in range(rng.randrange(1, 4)):
                    if rng.random() < 0.2:
                        with contextlib.suppress(psycopg.Rollback), connection.transaction(force_rollback=True):
                            rng.choice(WRITES)(connection, rng, key)
                    rng.choice(WRITES)(connection, rng, key)
                connection.rollback() if rng.random() < 0.15 else connection.commit()
            except errors.SerializationFailure:
                # The pages of the source's own index are shared: there a SERIALIZABLE writer may fail without us.
                connection.rollback()
                if level != "SERIALIZABLE":
                    raise

    def read(self, level: str, query: str) -> None:
        """Look again and again for chunks of other rows."""
        connection = self.connect(autocommit=False)
        connection.execute(f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}, READ ONLY".encode())
        connection.commit()
        looked = 0
        while not self.is_over:
            for _ in range(random.randrange(1, 4)):
                if count := scalar(connection, query):
                    self.failures.append(f"{count} chunks of other rows at {level}: {query}")
                looked += 1
            connection.commit()
        assert looked > 20

    def work(self) -> None:
        """Work in a session that is ended from without."""
        while not self.is_over:
            with contextlib.suppress(errors.AdminShutdown, psycopg.OperationalError):
                connection = self.connect()
                connection.execute("SET application_name = 'victim'")
                connection.execute("CALL embedline.run_worker(max_seconds => 5)")

    def kill(self) -> None:
        """End workers at any moment."""
        connection, rng = self.connect(), random.Random(1)
        while not self.is_over:
            time.sleep(rng.uniform(0.1, 0.8))
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'victim'"
                " AND datname = current_database() ORDER BY random() LIMIT 1"
            )


@pytest.mark.faults
@pytest.mark.parametrize("level", LEVELS)
def test_no_reader_ever_sees_a_chunk_of_another_row(
    connect: Connect, database: psycopg.Connection, stub: StubProvider, level: str
) -> None:
    create_stub_model(database, stub)
    database.execute("CREATE TABLE page (id integer PRIMARY KEY, born integer, body text)")
    database.execute("INSERT INTO page SELECT n, n, 'row ' || n || ' of old' FROM generate_series(4, 99) AS n")
    create_pipeline(database, content="body", model="stub", index_method="none")
    database.execute("SELECT embedline.configure('max_rows', 20), embedline.configure('min_rows', 1)")
    settle(database)
    scene = _Scene(connect)
    scene.run(
        *(lambda number=number: scene.write(number, level) for number in range(WRITERS)),
        *(lambda reader=reader: scene.read(reader, FOREIGN) for reader in LEVELS[:2]),
        lambda: scene.read("REPEATABLE READ", FOUND),
        scene.work, scene.work, scene.kill,
    )  # fmt: skip
    assert not scene.failures, scene.failures
    settle(database, 60)
    assert scalar(database, FOREIGN) == 0
    query = "SELECT count(*) FROM page AS p LEFT JOIN page_embedding AS e ON e.id = p.id WHERE e.chunk IS DISTINCT FROM p.body"
    assert scalar(database, query) == 0
    assert data_count(database, "chunk") == scalar(database, "SELECT count(*) FROM page")
    assert data_count(database, "document") == data_count(database, "v1") == data_count(database, "chunk")
    assert data_count(database, "hidden") == data_count(database, "deleted") == 0
