"""The database edge: what every function that runs inside PostgreSQL needs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import embedline
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import (
    EmbedlineError,
    InvalidParameter,
    NotReady,
    VersionSkew,
)

P = ParamSpec("P")
T = TypeVar("T")
# GD, the dictionary that PL/Python shares between the functions of a session.
SessionCache = dict[str, Any]
# A try for a strong lock: below what a reader notices; and the pause before the next, in seconds.
_LOCK_TRY = "10ms"
_LOCK_PAUSE_SECONDS = (0.01, 0.04)
# Who holds locks: sessions, and transactions that were prepared for a two-phase commit, of which no session is left.
_SESSIONS = "SELECT pid, state, xact_start, query FROM pg_stat_activity WHERE state <> 'idle' ORDER BY xact_start;"
_PREPARED = """
    SELECT quote_literal(p.gid) AS gid, p.owner, date_trunc('second', p.prepared)::text AS prepared_at
    FROM pg_prepared_xacts AS p
    WHERE p.database = current_database() AND EXISTS (
        SELECT FROM pg_locks AS x JOIN pg_locks AS l ON l.virtualtransaction = x.virtualtransaction AND l.pid IS NULL
        WHERE x.locktype = 'transactionid' AND x.transactionid = p.transaction AND x.pid IS NULL
            AND l.locktype IN ('relation', 'tuple', 'advisory'))
    ORDER BY p.prepared LIMIT 3
"""
# Plans that a session keeps. A pipeline has some 25 of 20 kB: a worker that served 1,000 pipelines grew by 600 MB.
_MAX_PLANS = 2000
# SQLSTATEs that are handled in more than one place.
LOCK_NOT_AVAILABLE = "55P03"
UNDEFINED_TABLE = "42P01"
# A table that another transaction has dropped, or given a key of other columns or types: undefined_table, undefined_column,
# datatype_mismatch, invalid_text_representation.
CHANGED_TABLE = (UNDEFINED_TABLE, "42703", "42804", "22P02")
# The end of the session, or of the statement: whoever tries again after errors lets these through.
ENDING = ("57014", "57P01", "57P02", "57P03")
# Classes of errors that the caller's own circumstances raise in a statement of ours: read-only transaction, serialization
# failure or deadlock, missing privilege, lock timeout, cancellation. Python frames tell nothing about them.
_CALLERS_OWN = ("25", "40", "42501", "55P03", "57")
# In GD: how many of our functions are running inside each other.
_DEPTH = "embedline.depth"
# In GD: the number of pgvector's type.
_VECTOR_TYPE = "embedline.vector_type"
# Schema of the functions of users' expressions. The sources' owners may name these, and nothing in embedline_data.
EXPRESSION_SCHEMA = "embedline_expression"
# Schema of the generated functions that rank a version's chunks. Readers may name these, and nothing in embedline_data.
SEARCH_SCHEMA = "embedline_search"
# First key of every session advisory lock that a resident worker holds ("Embl" in ASCII).
WORKER_LOCK_CLASS = 1164797804
# First key of the lock that makes a worker slot's scheduled jobs exclude each other ("Ems1").
SLOT_LOCK_CLASS = 1164800817
# First key of the transaction lock under which workers claim rows of one pipeline ("Emc1").
CLAIM_LOCK_CLASS = 1164796721
# First key of the transaction lock that writes share and a change of a pipeline's versions has alone ("Emv1").
VERSIONS_LOCK_CLASS = 1164801585
# First key of the session lock under which rows are tried that were in hand when a worker died ("Emx1").
SUSPECT_LOCK_CLASS = 1164802097


class Result(Protocol):
    """What plpy.execute returns: a sequence of rows, each a mapping of column to value."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def __len__(self) -> int: ...
    def nrows(self) -> int: ...


class Plpy(Protocol):
    """The part of PL/Python's plpy module that Embedline uses."""

    Error: type[Exception]
    SPIError: type[Exception]

    def execute(self, query: Any, arguments: Any = ..., limit: int = ...) -> Result: ...
    def prepare(self, query: str, argument_types: Sequence[str] = ...) -> Any: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def subtransaction(self) -> AbstractContextManager[Any]: ...
    def notice(self, message: str, **fields: str) -> None: ...
    def warning(self, message: str, **fields: str) -> None: ...


class Session:
    """One backend's view of the database: plpy, GD, and plans prepared once a session."""

    def __init__(self, plpy: Plpy, cache: SessionCache) -> None:
        self.plpy = plpy
        self.cache = cache
        self._plans: dict[tuple[str, tuple[str, ...]], Any] = cache.setdefault("embedline.plans", {})

    def query(self, sql: str, types: Sequence[str] = (), *values: Any) -> list[dict[str, Any]]:
        """Run a statement that is worth a cached plan; return its rows (none for a command)."""
        key = (sql, tuple(types))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                for oldest in list(self._plans)[: _MAX_PLANS // 4]:
                    del self._plans[oldest]
            plan = self._plans[key] = self.plpy.prepare(sql, list(types))
        result = self.plpy.execute(plan, list(values))
        return list(result) if result.nrows() and _has_rows(result) else []

    def execute(self, sql: str) -> list[dict[str, Any]]:
        """Run a statement once, without keeping its plan."""
        result = self.plpy.execute(sql)
        return list(result) if result.nrows() and _has_rows(result) else []

    def scalar(self, sql: str, types: Sequence[str] = (), *values: Any) -> Any:
        """Return the first column of the only row, or None without a row."""
        rows = self.query(sql, types, *values)
        return next(iter(rows[0].values())) if rows else None

    @property
    def server_version(self) -> int:
        """The server's server_version_num, for example 170012."""
        return int(self.scalar("SELECT current_setting('server_version_num')"))


def sqlstate_of(error: BaseException) -> str:
    """Return an error's SQLSTATE, or '' where it is none of the database's."""
    return str(getattr(error, "sqlstate", None) or "")


def _has_rows(result: Result) -> bool:
    # A command without RETURNING counts rows that it does not hand out.
    return len(result) > 0


def retry_locked(session: Session, work: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """Do work that needs a strong lock, waiting for the lock a few milliseconds at a time; return what it returns.

    Whoever waits for a strong lock makes all wait who come after: so nobody waits for longer than one try. Locks that a try
    had already are given up with it. Raises NotReady after `seconds`, naming `what` could not be had.
    """
    before = session.scalar("SELECT current_setting('lock_timeout')")
    deadline = time.monotonic() + seconds
    while True:
        try:
            with session.plpy.subtransaction():
                session.execute(f"SET LOCAL lock_timeout = '{_LOCK_TRY}'")
                result = work()
            session.execute(f"SET LOCAL lock_timeout = {quote_literal(str(before))}")
            return result
        except Exception as error:
            if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
                raise
        if time.monotonic() > deadline:
            raise NotReady(
                f"{what} is in use by other transactions all the time",
                hint=f"{lock_holders(session)} Then run it again.",
            )
        session.execute(f"SELECT pg_sleep({random.uniform(*_LOCK_PAUSE_SECONDS):.3f})")


def lock_holders(session: Session) -> str:
    """Return the hint that leads to those who may hold a lock: sessions, and the prepared transactions that hold locks now.

    A prepared transaction has no session: it is in no row of pg_stat_activity, and holds its locks until it is ended.
    """
    prepared = session.query(_PREPARED)
    hint = f"Wait for the sessions that this shows: {_SESSIONS}"
    if not prepared:
        return hint
    named = " ".join(
        f"COMMIT PREPARED {row['gid']}; or ROLLBACK PREPARED {row['gid']}; ends the one of {row['owner']}, prepared at"
        f" {row['prepared_at']}."
        for row in prepared
    )
    return f"Prepared transactions hold locks: SELECT * FROM pg_prepared_xacts; lists them. {named} {hint}"


class _ReadThrough(Exception):
    """Ends the subtransaction of `read_and_release`."""


def read_and_release(session: Session, read: Callable[[], T]) -> T:
    """Return what `read` finds, and undo all else that it did: it runs in a subtransaction that is rolled back.

    The locks of tables that it took are given back at once. And what a user's expression did besides, in this session, has no
    effect: a deferred trigger or a held cursor of the source's owner would run at the commit, with the rights of the session,
    and a search_path set by it would be that of our next statement.
    """
    found: list[T] = []
    try:
        with session.plpy.subtransaction():
            found.append(read())
            raise _ReadThrough
    except _ReadThrough:
        return found[0]


def change_versions(session: Session, pipeline_id: int) -> None:
    """Have a pipeline's versions to this transaction alone: writes of workers end before, and begin again after it."""
    retry_locked(
        session,
        lambda: session.query(
            "SELECT pg_advisory_xact_lock($1, $2)", ["integer", "integer"], VERSIONS_LOCK_CLASS, pipeline_id
        ),
        "the pipeline",
        30.0,
    )


def hold_source(session: Session, source_oid: int) -> None:
    """Lock a pipeline's source as its readers do, to the end of the transaction, before anything else of the pipeline is.

    TRUNCATE locks the source first and then the generated tables: whoever has one of these and then wants the source keeps
    it waiting, or deadlocks with it.
    """
    name = session.scalar("SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], source_oid)
    if name is None:
        return
    retry_locked(session, lambda: session.execute(f"LOCK TABLE ONLY {name} IN ROW SHARE MODE"), "the source")


def data_name(name: str) -> str:
    """Return the qualified, quoted name of a generated object."""
    return "embedline_data." + quote_ident(name)


def entry_point(
    function: Callable[Concatenate[Session, P], T],
) -> Callable[Concatenate[Plpy, SessionCache, P], T]:
    """Turn a function of a Session into what an SQL wrapper calls, with Embedline's errors reported as PostgreSQL's.

    PL/Python prints the frames of a Python exception under the error, as its CONTEXT. An error that is meant for the caller
    leaves without ours: the wrapper's own line is left, which PL/Python adds after us. A defect keeps all of its frames.
    """

    def wrapper(plpy: Plpy, cache: SessionCache, /, *args: P.args, **kwargs: P.kwargs) -> T:
        cache[_DEPTH] = cache.get(_DEPTH, 0) + 1
        told: BaseException | None = None
        try:
            session = Session(plpy, cache)
            _check_version(session)
            return function(session, *args, **kwargs)
        except EmbedlineError as error:
            told = postgres_error(plpy, error)
            raise told from None
        except Exception as error:
            if not sqlstate_of(error).startswith(_CALLERS_OWN):
                raise
            told = in_plain_words(plpy, error)
            if sqlstate_of(error) == LOCK_NOT_AVAILABLE and not getattr(told, "hint", None):
                # PostgreSQL says that it gave up, not for whom it waited.
                with contextlib.suppress(Exception):
                    told.hint = lock_holders(Session(plpy, cache))  # type: ignore[attr-defined]
            raise told from None
        finally:
            cache[_DEPTH] -= 1
            if told is not None:
                # Python adds no frame of this function again when it goes on raising after `finally`.
                told.__traceback__ = None

    wrapper.__doc__ = function.__doc__
    return wrapper


def is_nested(session: Session) -> bool:
    """Whether one of our functions runs inside another: a user's expression, which another of ours evaluates, called it."""
    return int(session.cache.get(_DEPTH, 0)) > 1


@contextmanager
def calling_ours(session: Session) -> Iterator[None]:
    """For the length of a block, functions of ours that are called are not nested in the one that runs: it calls them itself."""
    session.cache[_DEPTH] -= 1
    try:
        yield
    finally:
        session.cache[_DEPTH] += 1


def require_given(**values: object) -> None:
    """Raise InvalidParameter for the first value that is NULL."""
    for name, value in values.items():
        if value is None:
            raise InvalidParameter(f"{name} must not be NULL", hint="Leave it out: then it has its default.")


def postgres_error(plpy: Plpy, error: EmbedlineError) -> BaseException:
    """Return the exception that PL/Python turns into a PostgreSQL error with the SQLSTATE, DETAIL and HINT of `error`.

    PL/Python puts the exception's type before the message; of a class in __main__ only the bare name.
    """
    exception: BaseException = type("embedline", (plpy.Error,), {"__module__": "__main__"})(error.message)
    for name, value in (("sqlstate", error.sqlstate), ("detail", error.detail), ("hint", error.hint)):
        if value:
            setattr(exception, name, value)
    return exception


def in_plain_words(plpy: Plpy, error: Exception) -> BaseException:
    """Return a server's error that passed through SPI without the name that PL/Python puts before its message."""
    sqlstate = sqlstate_of(error)
    if not sqlstate:
        return error
    plain = EmbedlineError(str(error).removeprefix("embedline: "))
    _, plain.detail, plain.hint, *_ = getattr(error, "spidata", None) or (None, None, None)
    plain.sqlstate = sqlstate
    return postgres_error(plpy, plain)


def _check_version(session: Session) -> None:
    if "embedline.version_checked" in session.cache:
        return
    installed = session.scalar("SELECT value FROM embedline.setting WHERE name = 'version'")
    if installed != embedline.__version__:
        raise VersionSkew(
            f"the server runs embedline {embedline.__version__}, this database has {installed}",
            hint="Run alembic upgrade head with the version that the server sees, then start a new session.",
        )
    session.cache["embedline.version_checked"] = True


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block all signals while threads start: PostgreSQL's handlers must only ever run in the main thread."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def prepare_environment() -> None:
    """Keep numeric libraries from starting threads of their own inside a backend; call before numpy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a jsonb value, which PL/Python hands over as text, as a mapping."""

    loaded = json.loads(value) if isinstance(value, str) else value
    return loaded if isinstance(loaded, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return a jsonb array, which PL/Python hands over as text, as a list; NULL as none."""

    loaded = json.loads(value) if isinstance(value, str) else value
    return loaded if isinstance(loaded, list) else []


def vector_schema(session: Session) -> str:
    """Return the quoted schema that holds pgvector: search_path is pinned, so its functions are named in full.

    ALTER EXTENSION vector SET SCHEMA may move it at any time. So the type's number is kept, not its name, and the name is
    read past the snapshot: a REPEATABLE READ transaction from before the move would read where the extension was then.
    """
    number = session.cache.get(_VECTOR_TYPE)
    if number is not None:
        name = str(session.scalar("SELECT format_type($1::oid, NULL)", ["bigint"], number))
        if name.endswith(".vector"):
            return name.removesuffix(".vector")
    rows = session.query(
        "SELECT t.oid::bigint AS number, quote_ident(n.nspname) AS schema FROM pg_extension AS e"
        " JOIN pg_namespace AS n ON n.oid = e.extnamespace"
        " JOIN pg_type AS t ON t.typnamespace = n.oid AND t.typname = 'vector' WHERE e.extname = 'vector'"
    )
    session.cache[_VECTOR_TYPE] = rows[0]["number"] if rows else None
    return str(rows[0]["schema"]) if rows else "None"


def live_workers(session: Session) -> list[int]:
    """Return the ids of the workers whose session lock is held: only their claims count."""
    rows = session.query(
        """
        SELECT objid::bigint AS worker_id FROM pg_locks
        WHERE locktype = 'advisory' AND classid = $1::bigint::oid AND objsubid = 2 AND granted
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """,
        ["bigint"],
        WORKER_LOCK_CLASS,
    )
    return [int(row["worker_id"]) for row in rows]


def bound_lock_wait(session: Session) -> None:
    # A CREATE TRIGGER that waits makes every later write wait behind it: better to fail and be run again.
    session.execute("SELECT set_config('lock_timeout', '5s', true) WHERE current_setting('lock_timeout') = '0'")
