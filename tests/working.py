"""Workers in sessions of their own, and the pipeline on the stub that they work on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import conninfo

from generated_names import Generated
from stub_provider import StubProvider, vector_of
from support import create_pipeline, scalar, wait_until


def dsn_of(connection: psycopg.Connection) -> str:
    """Return the address with which a connection was opened."""
    return conninfo.make_conninfo(connection.info.dsn, password=connection.info.password)


class Worker:
    """CALL run_worker in a thread and a session of its own. As a context it is stopped and joined at the end."""

    def __init__(self, dsn: str, *, seconds: float = 60, until_idle: bool = False, pipeline: str | None = None) -> None:
        self.error: Exception | None = None
        self._connection = psycopg.connect(dsn, autocommit=True)
        self.pid = self._connection.info.backend_pid
        self._call = (seconds, pipeline, until_idle)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._connection:
                self._connection.execute(
                    "CALL embedline.run_worker(max_seconds => %s, pipeline_name => %s, until_idle => %s)", self._call
                )
        except psycopg.Error as error:
            self.error = error

    @property
    def is_running(self) -> bool:
        """Whether the CALL has not returned yet."""
        return self._thread.is_alive()

    def join(self, seconds: float = 60) -> None:
        """Wait until the CALL has returned; fail after `seconds`."""
        self._thread.join(seconds)
        assert not self.is_running, f"the worker has not ended within {seconds:.0f} s"

    def stop(self, connection: psycopg.Connection) -> None:
        """Ask the worker to end in order, as unschedule_workers asks scheduled ones."""
        connection.execute("UPDATE embedline.worker SET stop_requested = true WHERE pid = %s", (self.pid,))

    def waits_for_lock(self, connection: psycopg.Connection) -> bool:
        """Whether its session waits for a lock."""
        query = "SELECT wait_event_type IS NOT DISTINCT FROM 'Lock' FROM pg_stat_activity WHERE pid = %s"
        row = connection.execute(query, (self.pid,)).fetchone()
        return bool(row and row[0])

    def __enter__(self) -> Worker:
        return self

    def cancel(self) -> None:
        """Cancel the CALL, if it still runs, and wait for its end."""
        if self.is_running:
            with contextlib.suppress(psycopg.Error):
                self._connection.cancel_safe()
        self.join(30)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


@contextlib.contextmanager
def working(connection: psycopg.Connection, count: int = 1, seconds: float = 60) -> Iterator[list[Worker]]:
    """Run resident workers for the length of a block; they end in order."""
    workers = [Worker(dsn_of(connection), seconds=seconds) for _ in range(count)]
    try:
        yield workers
    except BaseException as error:
        # In order it might not end.
        for worker in workers:
            if worker.error is not None:
                error.add_note(f"a worker had ended with {worker.error}")
            worker.cancel()
        raise
    for worker in workers:
        worker.stop(connection)
    for worker in workers:
        worker.join()
    for worker in workers:
        assert worker.error is None, worker.error


def work_until_idle(connection: psycopg.Connection, count: int = 1, seconds: float = 60) -> None:
    """Run workers until nothing waits; fail where that takes longer than `seconds` or a worker ends with an error."""
    workers = [Worker(dsn_of(connection), seconds=seconds, until_idle=True) for _ in range(count)]
    for worker in workers:
        worker.join(seconds + 15)
    for worker in workers:
        assert worker.error is None, worker.error


@contextlib.contextmanager
def writing(connection: psycopg.Connection, *statements: str) -> Iterator[None]:
    """Run each statement again and again, in a session of its own, for as long as the block lasts."""
    ended = threading.Event()

    def write(statement: str) -> None:
        with psycopg.connect(dsn_of(connection), autocommit=True) as session:
            while not ended.is_set():
                session.execute(statement.encode())

    with ThreadPoolExecutor(len(statements)) as pool:
        writers = [pool.submit(write, statement) for statement in statements]
        try:
            yield
        finally:
            ended.set()
        for writer in writers:
            writer.result()


@contextlib.contextmanager
def flood(connection: psycopg.Connection) -> Iterator[None]:
    """Write to a pipeline of its own of model stub faster than a worker embeds, for as long as the block lasts."""
    create_stub_pipeline(connection, "flood", rows=2000)
    halves = (f"UPDATE flood SET body = 'flood ' || random() WHERE id % 2 = {remainder}" for remainder in (0, 1))
    with writing(connection, *halves):
        yield


def create_stub_model(
    connection: psycopg.Connection, stub: StubProvider, name: str = "stub", **options: object
) -> None:
    """Register the stub as a model."""
    named = "".join(f", {option} => %s" for option in options)
    connection.execute(
        f"SELECT embedline.create_model(%s, 'openai', 'stub', base_url => %s{named})",
        (name, stub.url, *options.values()),
    )
    # Registering asked for one vector.
    stub.forget()


def create_stub_pipeline(
    connection: psycopg.Connection, table: str = "page", model: str = "stub", rows: int = 0, **options: object
) -> None:
    """Create a table (id, body), insert rows with different texts, and a pipeline of its name whose content is body."""
    connection.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, body text)")
    insert_rows(connection, 1, rows, table)
    create_pipeline(connection, table, table, "body", model, **{"index_method": "none", **options})


def make_reading_deadly(connection: psycopg.Connection, login: str, end: str) -> None:
    """Create the pipeline "page" again, of no rows, whose expression runs `end` for a body that begins with "deadly"."""
    connection.execute(
        b"CREATE OR REPLACE FUNCTION deadly(body text) RETURNS text LANGUAGE plpgsql STABLE AS $$BEGIN"
        + f" IF body LIKE 'deadly%' THEN {end}; END IF; RETURN body; END$$".encode()
    )
    connection.execute("SELECT embedline.drop_pipeline('page')")
    connection.execute("TRUNCATE page")
    create_pipeline(connection, "page", "page", "deadly(body)", "stub", index_method="none")
    connection.execute("SELECT embedline.grant_remote('page', %s, true)", (login,))


def insert_rows(connection: psycopg.Connection, first: int, last: int, table: str = "page") -> None:
    """Insert rows whose texts differ from all others."""
    connection.execute(
        f"INSERT INTO {table} SELECT g, '{table} row ' || g || ' of ' || md5(g::text) FROM generate_series(%s::bigint, %s) AS g",
        (first, last),
    )


def remove_all(connection: psycopg.Connection) -> None:
    """Drop every pipeline with its table and every model that is not local."""
    for name, source in connection.execute("SELECT name, source::text FROM embedline.pipeline").fetchall():
        connection.execute("SELECT embedline.drop_pipeline(%s)", (name,))
        connection.execute(f"DROP TABLE IF EXISTS {source}")
    connection.execute("SELECT embedline.drop_model(name) FROM embedline.model WHERE provider = 'openai'")
    connection.execute("TRUNCATE embedline.finished_batch, embedline.batch_hour, embedline.batch_total")
    connection.execute("TRUNCATE embedline.request_failure, embedline.alert_state")


def dead_letters(connection: psycopg.Connection, table: str = "page") -> dict[int, tuple[str, str, str]]:
    """Return (stage, error code, message) of each dead letter of a pipeline on a table (id, body), by id."""
    return {
        int(key["id"]): (stage, code, message)
        for key, stage, code, message in connection.execute(
            "SELECT key, stage, error_code, message FROM embedline.dead_letter JOIN embedline.pipeline USING (pipeline_id)"
            " WHERE name = %s",
            (table,),
        )
    }


def assert_all_settled(connection: psycopg.Connection, dimensions: int, table: str = "page") -> int:
    """Assert that each row of a table (id, body) is embedded with the stub's vector of its text, or else a dead letter.

    Nothing is queued, in hand or besides. Return the number of rows that are embedded.
    """
    for suffix in ("inbox", "deleted", "hidden", "lent", "claim", "outbox"):
        left = scalar(connection, f"SELECT count(*) FROM {Generated(table)(suffix)}")
        assert left == 0, f"{left} rows are left in {table}_{suffix}"
    texts = dict(connection.execute(f"SELECT id, body FROM {table}").fetchall())
    given_up = set(dead_letters(connection, table))
    stored = connection.execute(
        f"SELECT c.key_id, c.content, v.embedding_v1::real[] FROM {Generated(table)('chunk')} AS c"
        f" JOIN {Generated(table)('v1')} AS v USING (chunk_id)"
    ).fetchall()
    for kind, keys in (("chunk", [row[0] for row in stored]), ("document", _documents(connection, table))):
        assert len(keys) == len(set(keys)), f"a row has more than one {kind}"
        assert set(keys) == texts.keys() - given_up, f"{kind}s: {sorted(set(keys) ^ (texts.keys() - given_up))[:5]}"
    vectors = scalar(connection, f"SELECT count(*) FROM {Generated(table)('v1')}")
    assert vectors == len(stored), "vectors without a chunk"
    assert given_up <= texts.keys(), "dead letters of rows that there are none of"
    wrong = [key for key, content, _ in stored if content != texts[key]]
    assert not wrong, f"chunks that are not their row's text: {wrong[:5]}"
    if stored:
        expected = unit_vectors([content for _, content, _ in stored], dimensions)
        found = np.array([vector for _, _, vector in stored], dtype=np.float32)
        assert np.abs(found - expected).max() < 1e-5, "a stored vector is not that of its text"
    return len(stored)


def _documents(connection: psycopg.Connection, table: str) -> list[int]:
    query = f"SELECT key_id FROM {Generated(table)('document')} WHERE state = 'embedded'"
    return [row[0] for row in connection.execute(query)]


def unit_vectors(texts: Sequence[str], dimensions: int) -> npt.NDArray[np.float32]:
    """Return the stub's vectors of texts, normalised, as an array of shape (texts, dimensions)."""
    matrix = np.stack([vector_of(text, dimensions) for text in texts])
    unit: npt.NDArray[np.float32] = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return unit


def wait_for_in_flight(stub: StubProvider, texts: int = 1, seconds: float = 20) -> None:
    """Wait until the stub has so many texts in work."""
    wait_until(lambda: stub.in_flight() >= texts, seconds, f"{texts} texts are in flight")


def wait_for_chunks(connection: psycopg.Connection, table: str, count: int, seconds: float = 20) -> None:
    """Wait until a pipeline has so many chunks."""
    query = f"SELECT count(*) FROM {Generated(table)('chunk')}"
    wait_until(lambda: scalar(connection, query) == count, seconds, f"{table} has {count} chunks")


def seconds_until_found(connection: psycopg.Connection, key: int, table: str = "page", limit: float = 10) -> float:
    """Insert a row; return the seconds until its vector can be searched."""
    query = f"SELECT count(*) FROM {table}_embedding WHERE id = %s"
    insert_rows(connection, key, key, table)
    started = time.monotonic()
    wait_until(lambda: scalar(connection, query, (key,)), limit, f"row {key} of {table} can be found")
    return time.monotonic() - started
