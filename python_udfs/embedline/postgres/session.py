"""Give functions that run inside PostgreSQL their access to the database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
# GD, the dictionary that PL/Python shares between the functions of a session.
SessionCache = dict[str, Any]
# Plans that a session keeps. A pipeline has some 25 of 20 kB, and a worker that served 1,000 pipelines grew by 600 MB.
_MAX_PLANS = 2000


class Result(Protocol):
    """The result of plpy.execute: rows, each a mapping of column to value."""

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
    """The database as one backend sees it: plpy, GD, and cached plans."""

    def __init__(self, plpy: Plpy, cache: SessionCache) -> None:
        self.plpy = plpy
        self.cache = cache
        self._plans: dict[tuple[str, tuple[str, ...]], Any] = cache.setdefault("embedline.plans", {})

    def query(self, sql: str, types: Sequence[str] = (), *values: Any) -> list[dict[str, Any]]:
        """Run a statement that is worth a cached plan.

        Returns its rows, none for a command.
        """
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
        """Return the server's server_version_num, for example 170012."""
        return int(self.scalar("SELECT current_setting('server_version_num')"))


def _has_rows(result: Result) -> bool:
    # A command without RETURNING counts rows, but does not return them.
    return len(result) > 0
