"""Build a vector index from a client.

`embedline build-index` and Alembic's op.build_vector_index use it. The server decides which index to build, and how,
because it knows its memory, its disk and its tables. The client runs CREATE INDEX CONCURRENTLY, which no function can,
in a session with the settings that the server returns.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from embedline.core.sql_text import quote_literal
from embedline.errors import EmbedlineError

if TYPE_CHECKING:
    import psycopg
    import sqlalchemy

Rows = Sequence[Sequence[Any]]
Execute = Callable[[str], Rows]
# Called with PostgreSQL's name of the phase, and the percentage of it that is done.
Report = Callable[[str, float], None]
Tell = Callable[[str], None]
Outcome = Literal["done", "exhausted", "deadlocked"]

_WATCH_SECONDS = 0.2
_POLL_SECONDS = 0.5
_BUILD_SECONDS = 24 * 3600.0
# Failed attempts after which the build is given up.
_TRIES = 3
# SQLSTATE class "insufficient resources": shared memory, memory, disk. A parallel build needs more of each.
_INSUFFICIENT_RESOURCES = "53"
# SQLSTATE of a deadlock with a concurrent build that was started by hand.
_DEADLOCK = "40P01"
_BACKEND = "SELECT pg_backend_pid()"
_PROGRESS = """
    SELECT phase, coalesce(
        CASE WHEN phase NOT LIKE '%loading tuples%' THEN 100.0 * nullif(blocks_done, 0) / nullif(blocks_total, 0) END,
        100.0 * nullif(tuples_done, 0) / nullif(tuples_total, 0), 0)::float8
    FROM pg_stat_progress_create_index WHERE pid = {pid}
"""


class IndexNotBuilt(EmbedlineError):
    """The index was not built."""

    sqlstate = "EL032"


class SessionNotKept(EmbedlineError):
    """The connection passes through a pool that changes sessions between transactions."""

    sqlstate = "EL033"


class Client(Protocol):
    """A session in autocommit mode.

    Statements have no parameters, so "%" and ":" have no meaning in them.
    """

    def execute(self, statement: str) -> Rows:
        """Run one statement as a transaction of its own; return its rows."""
        ...

    def another(self) -> AbstractContextManager[Execute]:
        """Open a second session of the same database, to watch the first."""
        ...

    def sqlstate(self, error: Exception) -> str | None:
        """Return the SQLSTATE of an error that `execute` raised, None of any other."""
        ...


@dataclass(frozen=True)
class PsycopgClient:
    """Run statements over a psycopg connection in autocommit mode."""

    connection: psycopg.Connection[Any]

    def execute(self, statement: str) -> Rows:
        return _fetched(self.connection, statement)

    @contextlib.contextmanager
    def another(self) -> Iterator[Execute]:
        import psycopg

        info = self.connection.info
        with psycopg.connect(info.dsn, password=info.password, autocommit=True) as observer:
            yield lambda statement: _fetched(observer, statement)

    def sqlstate(self, error: Exception) -> str | None:
        return _sqlstate(error)


def _fetched(connection: psycopg.Connection[Any], statement: str) -> Rows:
    cursor = connection.execute(statement)
    return cursor.fetchall() if cursor.description else []


@dataclass(frozen=True)
class SqlAlchemyClient:
    """Run statements over a SQLAlchemy connection in autocommit mode.

    The connection may have any driver, as in Alembic's autocommit_block().
    """

    connection: sqlalchemy.Connection

    def execute(self, statement: str) -> Rows:
        return _run(self.connection, statement)

    @contextlib.contextmanager
    def another(self) -> Iterator[Execute]:
        with self.connection.engine.connect() as opened:
            observer = opened.execution_options(isolation_level="AUTOCOMMIT")
            yield lambda statement: _run(observer, statement)

    def sqlstate(self, error: Exception) -> str | None:
        return _sqlstate(getattr(error, "orig", None) or error)


def _run(connection: sqlalchemy.Connection, statement: str) -> Rows:
    result = connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
    return [tuple(row) for row in result] if result.returns_rows else []


def _sqlstate(error: object) -> str | None:
    # psycopg and asyncpg name it sqlstate, psycopg2 names it pgcode.
    found = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return None if found is None else str(found)


@dataclass(frozen=True)
class Listener:
    """Receive what a build tells: its progress, and the server's notices."""

    report: Report | None = None
    tell: Tell | None = None


@dataclass(frozen=True)
class _Plan:
    """The result of embedline._index_plan."""

    state: str
    index: str = ""
    statement: str = ""
    maintenance_work_mem_kb: int = 0
    parallel_workers: int = 0
    notices: tuple[str, ...] = ()
    lock_key: tuple[int, int] = (0, 0)


def build(
    client: Client,
    pipeline: str,
    version: int | None = None,
    precision: str | None = None,
    *,
    parallel_workers: int | None = None,
    listener: Listener | None = None,
) -> str | None:
    """Build an index of a version, and return once it is valid.

    Returns the statement that built it, None if there was nothing to build. Without a `version` it is the serving one.
    A build of the same index in another session is waited for. The `listener` is told the progress during the build, and
    the server's notices, such as that the build will be serial.

    Raises IndexNotBuilt, SessionNotKept, and the driver's errors. SQLSTATE 55000 means that the version is not verified
    to be complete.
    """
    workers, tried, limit = parallel_workers, 0, time.monotonic() + _BUILD_SECONDS
    listener = listener or Listener()
    tell = listener.tell or _ignore
    statement: str | None = None
    while True:
        plan = _plan(client, pipeline, version, precision, workers)
        if plan.state in ("none", "valid"):
            return statement
        if time.monotonic() > limit or tried == _TRIES:
            raise IndexNotBuilt(f"{plan.index} did not become valid", hint=f"embedline build-index {pipeline}")
        if tried == 0:
            _require_own_session(client, pipeline, version)
        with _alone(client, plan) as is_alone:
            if not is_alone:
                time.sleep(_POLL_SECONDS)
                continue
            for notice in plan.notices:
                tell(notice)
            tried, statement = tried + 1, plan.statement
            outcome = _try(client, plan, listener.report)
        if outcome == "exhausted":
            workers = 0
            tell("the parallel build ran out of shared memory, memory or disk: it is tried again serially")


def _ignore(notice: str) -> None:
    """Drop a notice if the caller wants none."""


def is_behind_pool(client: Client) -> bool:
    """Return True behind a pool in transaction mode.

    Such a pool would give the session, with our settings and our lock, to other clients. It gives a second connection
    the session that the first one used last, or then gives the first one another. The check must not fail if there is
    no free connection for it.
    """
    shared = False
    with contextlib.suppress(Exception), client.another() as execute:
        mine = client.execute(_BACKEND)[0][0]
        execute("BEGIN")
        # Checked only if the second has another session: with a single session in the pool the first would wait for it.
        shared = execute(_BACKEND)[0][0] == mine or client.execute(_BACKEND)[0][0] != mine
        execute("ROLLBACK")
    return shared


def _require_own_session(client: Client, pipeline: str, version: int | None) -> None:
    """Raise SessionNotKept behind a pool in transaction mode."""
    if is_behind_pool(client):
        arguments = quote_literal(pipeline) + ("" if version is None else f", {version}")
        raise SessionNotKept(
            hint="Connect to the server itself instead of the pool, or have pg_cron build it:"
            f" SELECT embedline.build_vector_index({arguments});"
        )


@contextlib.contextmanager
def _alone(client: Client, plan: _Plan) -> Iterator[bool]:
    """Keep other builds off the version's table; yield False if one is running.

    Two concurrent builds on one table deadlock: the second waits for the first's lock, the first for the second's
    snapshot. So this does not wait for either lock.
    """
    key = ", ".join(map(str, plan.lock_key))
    if plan.state == "building" or not client.execute(f"SELECT pg_try_advisory_lock({key})")[0][0]:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(Exception):
            client.execute(f"SELECT pg_advisory_unlock({key})")


def _plan(client: Client, pipeline: str, version: int | None, precision: str | None, workers: int | None) -> _Plan:
    given = (
        f"pipeline_name => {quote_literal(pipeline)}, version_number => {'NULL' if version is None else int(version)},"
        f" precision_name => {'NULL' if precision is None else quote_literal(precision)},"
        f" parallel_workers => {'NULL' if workers is None else int(workers)}"
    )
    values: dict[str, Any] = json.loads(client.execute(f"SELECT embedline._index_plan({given})::text")[0][0])
    for name in ("notices", "lock_key"):
        if name in values:
            values[name] = tuple(values[name])
    return _Plan(**values)


def _try(client: Client, plan: _Plan, report: Report | None) -> Outcome:
    """Build once, without leaving an INVALID index.

    An error is raised if another attempt is useless.
    """
    if plan.state == "invalid":
        _drop(client, plan)
    try:
        with _settings(client, plan), _watched(client, report):
            client.execute(plan.statement)
    except BaseException as error:
        # Also at Ctrl-C, because a leftover slows every write and serves no query.
        with contextlib.suppress(Exception):
            _drop(client, plan)
        sqlstate = (client.sqlstate(error) if isinstance(error, Exception) else None) or ""
        if sqlstate == _DEADLOCK:
            return "deadlocked"
        if plan.parallel_workers > 0 and sqlstate.startswith(_INSUFFICIENT_RESOURCES):
            return "exhausted"
        raise
    return "done"


def _drop(client: Client, plan: _Plan) -> None:
    """Drop the leftover of a failed build.

    A valid index, or one that another session builds, is never dropped.
    """
    query = (
        "SELECT 1 FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
        f" WHERE c.oid = to_regclass({quote_literal(plan.index)}) AND embedline._index_state(c.relname) = 'invalid'"
        # While another index of the table is built, the drop would wait for that build.
        " AND NOT EXISTS (SELECT FROM pg_stat_progress_create_index AS p WHERE p.relid = i.indrelid)"
    )
    if client.execute(query):
        client.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {plan.index}")


@contextlib.contextmanager
def _settings(client: Client, plan: _Plan) -> Iterator[None]:
    """Set the build's settings in the session, and restore the earlier ones."""
    wanted = {
        "maintenance_work_mem": f"{plan.maintenance_work_mem_kb}kB",
        "max_parallel_maintenance_workers": str(plan.parallel_workers),
        # CONCURRENTLY waits for every older transaction, however long that takes.
        "lock_timeout": "0",
        "statement_timeout": "0",
    }
    before = {name: str(client.execute(f"SHOW {name}")[0][0]) for name in wanted}
    try:
        for name, value in wanted.items():
            client.execute(f"SET {name} = {quote_literal(value)}")
        yield
    finally:
        with contextlib.suppress(Exception):
            for name, value in before.items():
                client.execute(f"SET {name} = {quote_literal(value)}")


@contextlib.contextmanager
def _watched(client: Client, report: Report | None) -> Iterator[None]:
    """Report the progress of the build from a second session while the block runs."""
    if report is None:
        yield
        return
    query = _PROGRESS.format(pid=int(client.execute(_BACKEND)[0][0]))
    finished = threading.Event()

    def follow() -> None:
        # The watch must not fail the build if there is no free connection for it.
        with contextlib.suppress(Exception), client.another() as execute:
            while not finished.wait(_WATCH_SECONDS):
                for phase, percent in execute(query):
                    report(str(phase), float(percent))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
