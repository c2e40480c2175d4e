"""Permits to claim and send: workers, circuits, budgets, suspects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from embedline.catalog.values import Pipeline
from embedline.models import circuit
from embedline.postgres.claims import Claims
from embedline.postgres.locks import SUSPECT_LOCK_CLASS, live_workers
from embedline.postgres.session import Session
from embedline.spending import ledger
from embedline.spending.ledger import Grant


class Permits(Protocol):
    """Answers about the database that decide what may be claimed and sent."""

    def live_workers(self) -> list[int]:
        """Return the workers whose claims count."""

    def is_available(self, pipeline: Pipeline) -> bool:
        """Return False while the circuit of the pipeline's model is open."""

    def has_money(self, pipeline: Pipeline) -> bool:
        """Return False while a budget or a rate limit lets no request through."""

    def reserve(self, pipeline: Pipeline, tokens: Sequence[int]) -> Grant:
        """Reserve requests in order, by the estimate of each.

        They may be sent after the commit.
        """

    def settle(self, reservation_id: int, tokens_used: int | None) -> None:
        """Correct a reservation to the tokens that were used; None: the estimate stands."""

    def isolate(self) -> bool:
        """Take the right to try suspects; return False if another session has it."""

    def end_isolation(self) -> None:
        """Release the right to try suspects."""


@dataclass(frozen=True)
class DatabasePermits:
    """The answers of the database."""

    session: Session
    claims: Claims

    def live_workers(self) -> list[int]:
        """Return the workers whose session lock is held."""
        return live_workers(self.session)

    def is_available(self, pipeline: Pipeline) -> bool:
        """Return False while the circuit is open."""
        return not circuit.is_open(self.session, pipeline.version.model.model_id)

    def has_money(self, pipeline: Pipeline) -> bool:
        """Return False while a budget or a rate limit lets no request through."""
        return not pipeline.metered or ledger.blocked_until(self.session, pipeline) is None

    def reserve(self, pipeline: Pipeline, tokens: Sequence[int]) -> Grant:
        """Reserve in the ledger; a pipeline that is not metered has all requests granted."""
        if not pipeline.metered:
            return Grant(len(tokens), None, None, None)
        return ledger.reserve(self.session, pipeline, tokens, self.claims)

    def settle(self, reservation_id: int, tokens_used: int | None) -> None:
        """Correct the ledger."""
        ledger.settle(self.session, reservation_id, tokens_used)

    def isolate(self) -> bool:
        """Take the lock under which suspects are tried.

        One session at a time, so that a crash accuses few others.
        """
        query = "SELECT pg_try_advisory_lock($1, 0)"
        return bool(self.session.scalar(query, ["integer"], SUSPECT_LOCK_CLASS))

    def end_isolation(self) -> None:
        """Release the lock."""
        self.session.query("SELECT pg_advisory_unlock($1, 0)", ["integer"], SUSPECT_LOCK_CLASS)
