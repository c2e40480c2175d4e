"""The two forms of claims: marks in the queues, or row locks.

A resident worker marks; embed_pending holds the locks of its caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from embedline.postgres.locks import CLAIM_LOCK_CLASS
from embedline.postgres.session import Session


class Claims(Protocol):
    """One holder of claims.

    What it claims is marked with `worker_id`, or locked if that is None.
    """

    @property
    def worker_id(self) -> int | None:
        """Return the value of claimed_by in the rows that this session claims."""

    @property
    def is_resident(self) -> bool:
        """Return True if claims outlive the transaction that takes them."""

    def fence(self, parameter: int) -> str:
        """Return the condition that this holder has claimed a row, to follow others.

        `values` are its parameters.
        """

    @property
    def types(self) -> Sequence[str]:
        """Return the types of `values`."""

    @property
    def values(self) -> Sequence[int]:
        """Return the parameters of the fence."""

    def take_turns(self, session: Session, pipeline_id: int) -> None:
        """Let claims of one pipeline follow each other: each sees the earlier ones."""

    def serialised(self, session: Session, lock_class: int, lock: int) -> AbstractContextManager[None]:
        """Hold an advisory lock for a block, or to the end of a short transaction."""


@dataclass(frozen=True)
class WorkerClaims:
    """Marks of a resident worker.

    They count exactly as long as its session advisory lock is held. Its transactions are short, so a transaction's lock
    orders them.
    """

    worker_id: int
    is_resident: bool = True

    def fence(self, parameter: int) -> str:
        """Return the condition that a row bears this worker's mark."""
        return f" AND claimed_by = ${parameter}"

    @property
    def types(self) -> Sequence[str]:
        """Return the type of the worker's id."""
        return ("integer",)

    @property
    def values(self) -> Sequence[int]:
        """Return the worker's id."""
        return (self.worker_id,)

    def take_turns(self, session: Session, pipeline_id: int) -> None:
        """Take the pipeline's claim lock to the end of the transaction.

        That is a few milliseconds.
        """
        session.query("SELECT pg_advisory_xact_lock($1, $2)", ["integer", "integer"], CLAIM_LOCK_CLASS, pipeline_id)

    @contextmanager
    def serialised(self, session: Session, lock_class: int, lock: int) -> Iterator[None]:
        """Take the lock to the end of the transaction.

        So the next holder sees what this one commits.
        """
        session.query("SELECT pg_advisory_xact_lock($1, $2)", ["integer", "integer"], lock_class, lock)
        yield


@dataclass(frozen=True)
class TransactionClaims:
    """Row locks of the caller's transaction, as in embed_pending.

    Nothing is marked, so a row needs no fence. That transaction may be long, so no lock that others wait for is held to its
    end.
    """

    worker_id: None = None
    is_resident: bool = False

    def fence(self, parameter: int) -> str:
        """Return no condition: the row is locked."""
        return ""

    @property
    def types(self) -> Sequence[str]:
        """Return no types."""
        return ()

    @property
    def values(self) -> Sequence[int]:
        """Return no parameters."""
        return ()

    def take_turns(self, session: Session, pipeline_id: int) -> None:
        """Do nothing: the lock would be held to the end of the caller's transaction."""

    @contextmanager
    def serialised(self, session: Session, lock_class: int, lock: int) -> Iterator[None]:
        """Hold the lock for the block alone.

        Others do not see what it wrote until the caller commits.
        """
        session.query("SELECT pg_advisory_lock($1, $2)", ["integer", "integer"], lock_class, lock)
        try:
            yield
        finally:
            session.query("SELECT pg_advisory_unlock($1, $2)", ["integer", "integer"], lock_class, lock)


# The claims of a function that works inside its caller's transaction.
CALLERS_TRANSACTION = TransactionClaims()
