"""Models for the stages: embedders, health, circuits, request sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from embedline.catalog.values import Model, Pipeline, Version
from embedline.core.embedding import Embedder, EmbeddingBlock
from embedline.models import circuit, health_check, learning, request_size
from embedline.models.health_check import Verdict
from embedline.models.pool import embedder_for
from embedline.models.request_size import Split
from embedline.postgres.session import Session


class Models(Protocol):
    """The models, as all workers of the database see them."""

    def embedder(self, model: Model) -> Embedder:
        """Return the embedder of a model."""

    def ask(self, version: Version, since: float, in_flight: Future[EmbeddingBlock] | None) -> Verdict:
        """Return the health of the version's model, by requests sent since a time.

        The verdict may be pending, until a request is answered.
        """

    def note_answer(self, model: Model, sent_at: float) -> None:
        """Note that a request sent at a time was answered well."""

    def note_success(self, model: Model, sizes: Collection[int], cut_sizes: Iterable[int]) -> None:
        """Close the circuit, and learn request and text sizes.

        `sizes` are the texts of each request, `cut_sizes` the sizes of texts that passed in halves.
        """

    def open_circuit(self, model: Model, message: str, seconds: float | None) -> None:
        """Leave the model alone for a while."""

    def keep_learned(self, pipeline: Pipeline, learned: Mapping[str, str]) -> str | None:
        """Keep what an answer showed of the endpoint; return a remark the first time."""

    def remember_splits(self, model: Model, splits: Iterable[Split]) -> None:
        """Keep what splits that are through tell of the model's limit."""


@dataclass(frozen=True)
class DatabaseModels:
    """The models of the database, with the session's embedders."""

    session: Session

    def embedder(self, model: Model) -> Embedder:
        """Return the session's embedder."""
        return embedder_for(self.session, model)

    def ask(self, version: Version, since: float, in_flight: Future[EmbeddingBlock] | None) -> Verdict:
        """Ask the session's notes, or else the model for a harmless text."""
        return health_check.ask(self.session, version, since, in_flight)

    def note_answer(self, model: Model, sent_at: float) -> None:
        """Note it in the session."""
        health_check.note_answer(self.session, model.model_id, sent_at)

    def note_success(self, model: Model, sizes: Collection[int], cut_sizes: Iterable[int]) -> None:
        """Note it in the tables of circuits and models."""
        circuit.close_circuit(self.session, model.model_id)
        request_size.note_passed(self.session, model, max(sizes))
        request_size.note_too_long(self.session, model, cut_sizes)

    def open_circuit(self, model: Model, message: str, seconds: float | None) -> None:
        """Open the circuit in its table."""
        circuit.open_circuit(self.session, model.model_id, message, seconds)

    def keep_learned(self, pipeline: Pipeline, learned: Mapping[str, str]) -> str | None:
        """Keep it in the model's row."""
        return learning.keep(self.session, pipeline, learned)

    def remember_splits(self, model: Model, splits: Iterable[Split]) -> None:
        """Keep it in the model's row."""
        request_size.remember(self.session, model, splits)
