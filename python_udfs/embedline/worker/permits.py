"""What a claim needs to know of the whole database: living workers, circuits, budgets, and whose turn suspects are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from embedline.catalog.values import Pipeline
from embedline.models import circuit
from embedline.postgres.locks import SUSPECT_LOCK_CLASS, live_workers
from embedline.postgres.session import Session
from embedline.spending import ledger


class Permits(Protocol):
    """Answers about the database that decide what may be claimed."""

    def live_workers(self) -> list[int]:
        """Return the workers whose claims count."""

    def is_available(self, pipeline: Pipeline) -> bool:
        """Return False while the circuit of the pipeline's model is open."""

    def has_money(self, pipeline: Pipeline) -> bool:
        """Return False while a budget or a rate limit lets no request through."""

    def isolate(self) -> bool:
        """Take the right to try suspects; return False if another session has it."""

    def end_isolation(self) -> None:
        """Release the right to try suspects."""


@dataclass(frozen=True)
class DatabasePermits:
    """The answers of the database."""

    session: Session

    def live_workers(self) -> list[int]:
        """Return the workers whose session lock is held."""
        return live_workers(self.session)

    def is_available(self, pipeline: Pipeline) -> bool:
        """Return False while the circuit is open."""
        return not circuit.is_open(self.session, pipeline.version.model.model_id)

    def has_money(self, pipeline: Pipeline) -> bool:
        """Return False while a budget or a rate limit lets no request through."""
        return not pipeline.metered or ledger.blocked_until(self.session, pipeline) is None

    def isolate(self) -> bool:
        """Take the lock under which suspects are tried: one session at a time, so that a crash accuses few others."""
        query = "SELECT pg_try_advisory_lock($1, 0)"
        return bool(self.session.scalar(query, ["integer"], SUSPECT_LOCK_CLASS))

    def end_isolation(self) -> None:
        """Release the lock."""
        self.session.query("SELECT pg_advisory_unlock($1, 0)", ["integer"], SUSPECT_LOCK_CLASS)
