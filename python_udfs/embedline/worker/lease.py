"""The lease of a worker: its number, its lock and its row of embedline.worker.

Its claims count exactly as long as the lock is held, which ends with the session.
"""

from __future__ import annotations

from embedline.postgres.locks import WORKER_LOCK_CLASS
from embedline.postgres.session import Session
from embedline.queue import signals


def next_worker_id(session: Session) -> int:
    """Return a number that no worker has had."""
    return int(session.scalar("SELECT nextval('embedline.worker_id_seq')"))


def take(session: Session, worker_id: int, slot: int | None, login: str | None) -> None:
    """Take a worker's lock and show it; `login` is that of a remote worker."""
    session.query("SELECT pg_advisory_lock($1, $2)", ["integer", "integer"], WORKER_LOCK_CLASS, worker_id)
    signals.renew(session)
    signals.note_dead_workers(session)
    session.query(
        "INSERT INTO embedline.worker (worker_id, slot, pid, login) VALUES ($1, $2, pg_backend_pid(), $3)",
        ["integer", "integer", "text"],
        worker_id,
        slot,
        login,
    )


def release(session: Session, worker_id: int) -> None:
    """Release a worker's lock; what it may still have claimed is free."""
    session.query("SELECT pg_advisory_unlock($1, $2)", ["integer", "integer"], WORKER_LOCK_CLASS, worker_id)
