"""Turn Python functions into entry points for SQL wrappers.

An entry point gets a Session, and reports its errors as PostgreSQL's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec

import embedline
from embedline.errors import (
    EmbedlineError,
    InvalidParameter,
    VersionSkew,
)
from embedline.postgres.locks import lock_holders
from embedline.postgres.session import Plpy, Session, SessionCache, T
from embedline.postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of

P = ParamSpec("P")
# Classes of errors in our statements that the caller's own circumstances cause: read-only transaction, serialization
# failure or deadlock, missing privilege, lock timeout, cancellation. Python frames say nothing about them.
_CALLERS_OWN = ("25", "40", "42501", "55P03", "57")
# Read-only transaction, and unlogged tables during recovery; then what to do about both on a standby.
_OF_STANDBY = ("25006", "0A000")
_ON_THE_PRIMARY = "This server is a standby, which only reads. Run it on the primary."
# Key in GD of the number of our functions that are running inside each other.
_DEPTH = "embedline.depth"


def entry_point(
    function: Callable[Concatenate[Session, P], T],
) -> Callable[Concatenate[Plpy, SessionCache, P], T]:
    """Turn a function of a Session into the entry point of an SQL wrapper.

    Embedline's errors are reported as PostgreSQL's. PL/Python prints the frames of a Python exception under the error,
    as its CONTEXT. An error for the caller is raised without our frames; PL/Python adds only the wrapper's own line. A
    defect keeps all of its frames.
    """

    def wrapper(plpy: Plpy, cache: SessionCache, /, *args: P.args, **kwargs: P.kwargs) -> T:
        cache[_DEPTH] = cache.get(_DEPTH, 0) + 1
        told: BaseException | None = None
        try:
            session = Session(plpy, cache)
            check_version(session)
            return function(session, *args, **kwargs)
        except EmbedlineError as error:
            told = postgres_error(plpy, error)
            raise told from None
        except Exception as error:
            needs_primary = _needs_primary(plpy, error)
            if not needs_primary and not sqlstate_of(error).startswith(_CALLERS_OWN):
                raise
            told = in_plain_words(plpy, error)
            if needs_primary:
                told.hint = _ON_THE_PRIMARY  # type: ignore[attr-defined]
            if sqlstate_of(error) == LOCK_NOT_AVAILABLE and not getattr(told, "hint", None):
                # PostgreSQL reports that the wait ended, not which session held the lock.
                with contextlib.suppress(Exception):
                    told.hint = lock_holders(Session(plpy, cache))  # type: ignore[attr-defined]
            raise told from None
        finally:
            cache[_DEPTH] -= 1
            if told is not None:
                # Python does not add this function's frame again when it goes on raising after `finally`.
                told.__traceback__ = None

    wrapper.__doc__ = function.__doc__
    return wrapper


def _needs_primary(plpy: Plpy, error: Exception) -> bool:
    """Return True if the error is a standby's.

    A standby writes nothing, and reads no unlogged table.
    """
    if sqlstate_of(error) not in _OF_STANDBY:
        return False
    with contextlib.suppress(Exception):
        return bool(plpy.execute("SELECT pg_is_in_recovery() AS is_standby")[0]["is_standby"])
    return False


def is_nested(session: Session) -> bool:
    """Return True if one of our functions runs inside another.

    Then a user's expression, which the outer function evaluates, called the inner one.
    """
    return int(session.cache.get(_DEPTH, 0)) > 1


@contextmanager
def calling_ours(session: Session) -> Iterator[None]:
    """Do not count our functions that the block calls itself as nested."""
    session.cache[_DEPTH] -= 1
    try:
        yield
    finally:
        session.cache[_DEPTH] += 1


def require_given(**values: object) -> None:
    """Raise InvalidParameter for the first value that is NULL."""
    for name, value in values.items():
        if value is None:
            raise InvalidParameter(f"{name} must not be NULL", hint="Leave it out to use its default.")


def postgres_error(plpy: Plpy, error: EmbedlineError) -> BaseException:
    """Return the exception that PL/Python turns into a PostgreSQL error.

    It carries the SQLSTATE, DETAIL and HINT of `error`. PL/Python puts the exception's type before the message, and
    only the bare name if the class is in __main__.
    """
    exception: BaseException = type("embedline", (plpy.Error,), {"__module__": "__main__"})(error.message)
    for name, value in (("sqlstate", error.sqlstate), ("detail", error.detail), ("hint", error.hint)):
        if value:
            setattr(exception, name, value)
    return exception


def in_plain_words(plpy: Plpy, error: Exception) -> BaseException:
    """Return a server's error without the name that PL/Python puts before it.

    The error passed through SPI and has a SQLSTATE; any other exception is returned unchanged.
    """
    sqlstate = sqlstate_of(error)
    if not sqlstate:
        return error
    plain = EmbedlineError(str(error).removeprefix("embedline: "))
    _, plain.detail, plain.hint, *_ = getattr(error, "spidata", None) or (None, None, None)
    plain.sqlstate = sqlstate
    return postgres_error(plpy, plain)


def check_version(session: Session) -> None:
    if "embedline.version_checked" in session.cache:
        return
    installed = session.scalar("SELECT value FROM embedline.setting WHERE name = 'version'")
    if installed is None:
        raise VersionSkew(
            "Embedline's tables are there, and their data are not",
            detail="A dump of the schema alone was restored.",
            hint="Restore the data, too, as a superuser: pg_restore --data-only --disable-triggers",
        )
    if installed != embedline.__version__:
        raise VersionSkew(
            f"the server runs embedline {embedline.__version__}, this database has {installed}",
            hint="Run alembic upgrade head with the version that the server sees, then start a new session.",
        )
    session.cache["embedline.version_checked"] = True
