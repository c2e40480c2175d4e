"""A source of work, permits, models and a clock without a database, for tests of what workers decide."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from embedline.catalog.values import WorkKey
from embedline.chunking import Chunk
from embedline.chunking.chunk import content_digest
from embedline.core.embedding import EmbeddingBlock, Kind, ModelInfo
from embedline.documents.values import Document, Vector
from embedline.errors import EmbedlineError, InputRejected
from embedline.models.health_check import Verdict
from embedline.queue.claim import Claim
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.queue.signals import Asked
from embedline.spending.ledger import Grant
from embedline.worker import work_source
from embedline.worker.work_source import Reading, Waiting

DIMENSIONS = 2


@dataclass
class Clock:
    """A clock that stands until it is set."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def pipeline(number: int, items: int = 8, concurrency: int = 8) -> Any:
    """Return the part of a pipeline that workers read."""
    config = SimpleNamespace(
        provider="openai",
        model="m",
        base_url=None,
        max_batch_items=items,
        max_batch_tokens=10_000,
        concurrency=concurrency,
        document_prefix="",
    )
    model = SimpleNamespace(model_id=number, config=config, request_items=items, text_size_refused=None)
    version = SimpleNamespace(
        version_id=number, number=1, model=model, dimensions=DIMENSIONS, distance="cosine", column_type="vector"
    )
    return SimpleNamespace(
        pipeline_id=number, name=f"p{number}", version=version, metered=False, is_remote=False, last_error=None
    )


@dataclass
class Work:
    """A queue in memory: keys that wait as changes, in the backfill, or suspected. It notes every call that matters."""

    number: int
    changes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    weight: float = 1.0
    is_hidden: bool = False
    has_signals: bool = True
    may_cut: bool = False
    is_locked: bool = False
    calls: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    requeued: dict[str, bool] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pipeline = pipeline(self.number)

    @property
    def key(self) -> WorkKey:
        return WorkKey("pipeline", self.number)

    def can_claim(self) -> bool:
        return not self.is_locked

    def has_work(self, live: Sequence[int]) -> bool:
        return True

    def peek(self, live: Sequence[int]) -> Waiting:
        self.calls.append("peek")
        has_changes = bool(self.changes)
        return Waiting(
            fresh=has_changes,
            queued=has_changes,
            unread=bool(self.unread),
            suspected=bool(self.suspects),
            orphaned=bool(self.orphans),
        )

    def claim(self, kind: work_source.Kind, limit: int, waiting: Waiting) -> Claim | None:
        self.calls.append(kind.value)
        queues = {
            work_source.Kind.CHANGES: self.changes,
            work_source.Kind.BACKFILL: self.unread,
            work_source.Kind.SUSPECTS: self.suspects,
        }
        queue = queues[kind]
        taken, queue[:] = queue[:limit], queue[limit:]
        rows = [ClaimedRow((key,)) for key in taken]
        is_suspect = kind is work_source.Kind.SUSPECTS
        return Claim(rows, of_backfill=kind is work_source.Kind.BACKFILL, is_suspect=is_suspect) if rows else None

    def reclaim_from_dead_workers(self) -> None:
        self.calls.append("reclaim")
        self.suspects += self.orphans
        self.orphans = []

    def remove_deleted(self) -> bool:
        return False

    def read(self, claim: Claim, rows: Sequence[ClaimedRow], max_bytes: int) -> Reading:
        return Reading([document(row.key[0]) for row in rows])

    def known_vectors(self, documents: Sequence[Document]) -> dict[bytes, Vector]:
        return {}

    def write(self, claim: Claim, documents: Sequence[Document], vectors: Mapping[bytes, Vector]) -> list[int]:
        self.written += [found.key[0] for found in documents]
        return list(range(len(documents)))

    def settle(self, rows: Sequence[ClaimedRow]) -> None:
        pass

    def requeue(
        self, claim: Claim, rows: Sequence[ClaimedRow], delay: float, *, charged: bool, error: str | None
    ) -> None:
        self.requeued |= {row.key[0]: charged for row in rows}

    def quarantine(self, claim: Claim, letters: Sequence[DeadLetter]) -> None:
        self.quarantined += [letter.row.key[0] for letter in letters]

    def finish(self, claim: Claim) -> None:
        self.calls.append("finish")

    def release(self, claim: Claim) -> None:
        self.calls.append("release")

    def close(self) -> bool:
        return False

    def clear_signals(self, asked: Asked) -> None:
        pass

    def maintain(self) -> None:
        pass

    def record_error(self, message: str) -> None:
        self.errors.append(message)

    def forget_error(self) -> None:
        self.calls.append("forget_error")

    def record_fault(self, message: str) -> None:
        self.errors.append(message)

    def hidden_reason(self) -> str:
        return "rows are hidden"

    def likely_row_bytes(self) -> float | None:
        return None


def document(key: str) -> Document:
    """Return a document of one chunk, whose text is its key."""
    return Document(ClaimedRow((key,)), content_hash=b"", chunks=[Chunk(0, 0, len(key), key, content_digest(key))])


@dataclass
class FakePermits:
    """Permits that a test sets."""

    open_circuits: set[int] = field(default_factory=set)
    without_money: set[int] = field(default_factory=set)
    others_isolate: bool = False
    granted: int | None = None
    wait_seconds: float = 0.0

    def live_workers(self) -> list[int]:
        return [1]

    def is_available(self, pipeline: Any) -> bool:
        return pipeline.version.model.model_id not in self.open_circuits

    def has_money(self, pipeline: Any) -> bool:
        return pipeline.pipeline_id not in self.without_money

    def reserve(self, pipeline: Any, tokens: Sequence[int]) -> Grant:
        if self.granted is None:
            return Grant(len(tokens), None, None, None)
        return Grant(min(self.granted, len(tokens)), None, self.wait_seconds, "the rate limit is reached")

    def settle(self, reservation_id: int, tokens_used: int | None) -> None:
        pass

    def isolate(self) -> bool:
        return not self.others_isolate

    def end_isolation(self) -> None:
        pass


@dataclass
class FakeModels:
    """A provider that refuses requests with poison in them, or fails every request with `failure`."""

    poison: Collection[str] = ()
    failure: EmbedlineError | None = None
    requests: list[list[str]] = field(default_factory=list)
    # How often the provider was asked for a harmless text.
    asked: int = 0
    paused: list[float | None] = field(default_factory=list)

    def embedder(self, model: Any) -> FakeModels:
        return self

    def submit(self, texts: Sequence[str], kind: Kind) -> Future[EmbeddingBlock]:
        future: Future[EmbeddingBlock] = Future()
        self.requests.append(list(texts))
        if self.failure is not None:
            future.set_exception(self.failure)
        elif any(text in self.poison for text in texts):
            future.set_exception(InputRejected("refused"))
        else:
            data = np.ones((len(texts), DIMENSIONS), dtype="<f4").tobytes()
            future.set_result(EmbeddingBlock(len(texts), DIMENSIONS, data))
        return future

    def probe(self) -> Future[ModelInfo]:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def ask(self, version: Any, since: float, in_flight: Future[EmbeddingBlock] | None) -> Verdict:
        self.asked += 1
        return Verdict("failing", error=self.failure) if self.failure is not None else Verdict("sound")

    def note_answer(self, model: Any, sent_at: float) -> None:
        pass

    def note_success(self, model: Any, sizes: Collection[int], cut_sizes: Iterable[int]) -> None:
        pass

    def open_circuit(self, model: Any, message: str, seconds: float | None) -> None:
        self.paused.append(seconds)

    def keep_learned(self, pipeline: Any, learned: Mapping[str, str]) -> str | None:
        return None

    def remember_splits(self, model: Any, splits: Iterable[object]) -> None:
        pass
