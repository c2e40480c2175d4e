"""Sessions of the torture that live on through kills: clients that write, and workers that are started again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import psycopg
from psycopg import errors

from torture.script import Script, Statement, Transaction

# Failures that concurrent applications cause each other: unique violation, serialization failure, deadlock.
_AMONG_APPLICATIONS = ("23505", "40001", "40P01")
# What a session meets whose server or whose backend is ended, or that begins to rest too early.
_ENDED = ("57P01", "57P02", "57P03")
# Seconds of a worker's CALL: it is started again all the time, as one that is scheduled is now and then.
_WORKER_SECONDS = 6


def is_ended(error: psycopg.Error, connection: psycopg.Connection | None) -> bool:
    """Return True if an error is that of a session that was ended from outside."""
    return error.sqlstate in _ENDED or connection is None or connection.broken or connection.closed


class _Session(threading.Thread):
    """A thread with a session that connects again until `ended` is set."""

    def __init__(self, dsn: str, ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self.pids: set[int] = set()
        self.pid: int | None = None
        self.fault: str | None = None
        self._dsn = dsn
        self._ended = ended

    def run(self) -> None:
        while not self._ended.is_set() and self.fault is None:
            connection: psycopg.Connection | None = None
            try:
                connection = psycopg.connect(self._dsn, autocommit=True, connect_timeout=10)
                self.pid = connection.info.backend_pid
                self.pids.add(self.pid)
                self._use(connection)
            except psycopg.Error as error:
                if not is_ended(error, connection) and not self._explains(error):
                    self.fault = f"{type(self).__name__}: {error.sqlstate} {error}"
            except BaseException as error:
                self.fault = f"{type(self).__name__}: {error!r}"
            finally:
                self.pid = None
                if connection is not None:
                    connection.close()
            self._ended.wait(0.05)

    def _use(self, connection: psycopg.Connection) -> None:
        raise NotImplementedError

    def _explains(self, error: psycopg.Error) -> bool:
        return False


class Worker(_Session):
    """A session that calls run_worker again and again; errors that are `passing` end one CALL, as a kill does."""

    def __init__(
        self,
        dsn: str,
        ended: threading.Event,
        *,
        passing: Sequence[str] = (),
        seconds: float = _WORKER_SECONDS,
        slot: int | None = None,
    ) -> None:
        super().__init__(dsn, ended)
        self._passing = passing
        self._seconds = seconds
        self._slot = slot

    def _explains(self, error: psycopg.Error) -> bool:
        return error.sqlstate in self._passing

    def _use(self, connection: psycopg.Connection) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(errors.QueryCanceled):
                call = "CALL embedline.run_worker(max_seconds => %s, slot => %s)"
                connection.execute(call, (self._seconds, self._slot))


class Client(_Session):
    """A session that runs the transactions of a script."""

    def __init__(self, dsn: str, ended: threading.Event, seed: int, number: int) -> None:
        super().__init__(dsn, ended)
        self.transactions = 0
        self.statements = Counter[str]()
        self.outcomes = Counter[str]()
        # Deadlocks: the process ids that each names, and its whole message.
        self.deadlocks: list[str] = []
        self._transactions: Iterator[Transaction] = iter(Script(seed, number))

    def _use(self, connection: psycopg.Connection) -> None:
        while not self._ended.is_set():
            transaction = next(self._transactions)
            self.transactions += 1
            time.sleep(transaction.pause)
            try:
                self._run(connection, transaction)
            except psycopg.Error as error:
                if is_ended(error, connection):
                    self.outcomes["lost"] += 1
                    raise
                if not self._is_applications(error):
                    raise
                self.outcomes[f"failed {error.sqlstate}"] += 1
                connection.rollback()

    def _run(self, connection: psycopg.Connection, transaction: Transaction) -> None:
        connection.execute(f"BEGIN ISOLATION LEVEL {transaction.isolation}".encode())
        for statement in transaction.statements:
            _execute(connection, statement)
            self.statements[statement.kind] += 1
        if transaction.commits:
            connection.execute("COMMIT")
            self.outcomes["committed"] += 1
        else:
            connection.execute("ROLLBACK")
            self.outcomes["rolled back"] += 1

    def _is_applications(self, error: psycopg.Error) -> bool:
        """Return True if applications alone may have caused the error.

        At READ COMMITTED and REPEATABLE READ a serialization failure names the statement of a trigger if that failed.
        """
        if error.sqlstate == "40P01":
            self.deadlocks.append(f"{error.diag.message_detail}\n{error.diag.context}")
        is_ssi = error.sqlstate == "40001" and "read/write dependencies" in (error.diag.message_primary or "")
        inside = error.diag.context or ""
        return error.sqlstate in _AMONG_APPLICATIONS and (is_ssi or "embedline" not in inside)


def _execute(connection: psycopg.Connection, statement: Statement) -> None:
    if not statement.rows:
        connection.execute(statement.text.encode(), statement.values or None)
        return
    with connection.cursor() as cursor, cursor.copy(statement.text.encode()) as copy:
        for row in statement.rows:
            copy.write_row(row)


@contextlib.contextmanager
def running(sessions: Sequence[Client] | Sequence[Worker], ended: threading.Event) -> Iterator[None]:
    """Run sessions for the length of a block; fail if one of them met an error that no kill explains."""
    for session in sessions:
        session.start()
    try:
        yield
    finally:
        ended.set()
        for session in sessions:
            session.join(60)
    faults = [session.fault or "still running" for session in sessions if session.fault or session.is_alive()]
    assert not faults, "\n".join(faults)
