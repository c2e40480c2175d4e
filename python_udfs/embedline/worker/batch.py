"""A batch in flight: its claim, its documents, and their requests.

Values only; the stages move them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

from embedline.catalog.values import Pipeline
from embedline.core.embedding import EmbeddingBlock
from embedline.core.media import ModelInput
from embedline.core.request_tokens import likely_tokens, most_tokens
from embedline.documents.readability import Readability
from embedline.documents.values import Document, Vector
from embedline.errors import EmbedlineError
from embedline.models.request_size import Split
from embedline.queue.claim import Claim
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.worker.batch_size import MAX_BATCH_BYTES
from embedline.worker.meter import Meter
from embedline.worker.work_source import WorkSource

# Inputs a request carries to a model on this machine: short enough that the work is written while the next is embedded.
_LOCAL_REQUEST_ITEMS = 64
# Bytes of memory for each value of a vector: base64 in the answer, float32 in the block and in the file.
_BYTES_A_VALUE = 14
# Numbers the batches of this session, so that exporters can tell which spans belong together.
_numbers = itertools.count(1)


@dataclass(eq=False)
class Request:
    """Texts or segments that are sent together, by digest.

    `future` is None until it is sent. It is granted in a transaction and sent after the commit: a crash in between must
    not forget the reservation.
    """

    texts: dict[bytes, ModelInput]
    future: Future[EmbeddingBlock] | None = None
    # When it was sent and answered, of time.monotonic.
    sent_at: float = 0.0
    answered_at: float = 0.0
    is_granted: bool = False
    reservation_id: int | None = None

    @cached_property
    def tokens(self) -> int:
        """The estimate that is reserved before it is sent."""
        return sum(map(likely_tokens, self.texts.values()))

    @property
    def is_answered(self) -> bool:
        """Whether it was sent and has come back, well or not."""
        return self.future is not None and self.future.done()


@dataclass(eq=False)
class Unit:
    """Documents that are embedded and written together.

    They have one or more requests, and one write. `error` is the failure of a request, and `failed` holds the texts
    of each request that failed. `failures` counts the requests with these texts that failed before in this batch.
    `split` holds the sizes of all parts of the first one that was refused. `cut_sizes` are the estimated sizes of
    texts that were refused as too long and are asked for in halves. `verdict` is the answer to a harmless text that a
    failed unit waits for. `undecodable` tells why files have no vector. Times are of time.monotonic: `sent_at`, when the
    last request that failed was sent, `failed_at`, when that was seen.
    """

    documents: list[Document]
    vectors: dict[bytes, Vector] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: dict[bytes, str] = field(default_factory=dict)
    undecodable: dict[bytes, str] = field(default_factory=dict)
    error: EmbedlineError | None = None
    failed: list[dict[bytes, ModelInput]] = field(default_factory=list)
    failures: int = 0
    split: Split | None = None
    cut_sizes: frozenset[int] = frozenset()
    verdict: Future[EmbeddingBlock] | None = None
    sent_at: float = 0.0
    failed_at: float = 0.0

    @property
    def is_answered(self) -> bool:
        """Whether every request has come back, and the verdict on a failed one."""
        if self.verdict is not None and not self.verdict.done():
            return False
        return all(request.is_answered for request in self.requests)


@dataclass(eq=False)
class Batch:
    """Claimed rows of one source in flight. Times are of time.monotonic, in seconds."""

    source: WorkSource
    claim: Claim
    # When a write was last tried, and before when it is not tried again.
    written_at: float = 0.0
    write_at: float = 0.0
    # Bytes of content that are read of its rows; the rows beyond are requeued, and counted.
    max_bytes: int = MAX_BATCH_BYTES
    deferred_count: int = 0
    # Of rows that hold addresses: where files may be fetched, and documents that are left to a later batch.
    media_prefixes: tuple[str, ...] = ()
    postponed: list[Document] = field(default_factory=list)
    # How its chunks are checked before they are embedded; None: not at all.
    readability: Readability | None = None
    found: list[Document] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    embedded_count: int = 0
    # How many of these a remote worker was told of.
    told_count: int = 0
    content_bytes: int = 0
    vector_bytes: int = 0
    grant_at: float = 0.0
    claimed_at: float = field(default_factory=time.monotonic)
    answered_at: float = 0.0
    longest_write: float = 0.0
    tokens_used: dict[int, int | None] = field(default_factory=dict)

    @cached_property
    def meter(self) -> Meter:
        """The measurements of this batch."""
        version = self.pipeline.version
        return Meter(
            {
                "batch": next(_numbers),
                "pipeline": self.pipeline.name,
                "version": version.number,
                "model": version.model.config.model,
                "rows": len(self.rows),
            }
        )

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline with the version whose model embeds the rows."""
        return self.source.pipeline

    @property
    def rows(self) -> list[ClaimedRow]:
        """The claimed rows."""
        return self.claim.rows

    def requeue(self, units: Iterable[Unit], delay: float, *, charged: bool, error: str | None) -> None:
        """Put the rows of units back into the queue."""
        rows = [document.row for unit in units for document in unit.documents]
        if rows:
            self.source.requeue(self.claim, rows, delay, charged=charged, error=error)

    def quarantine(self, letters: Sequence[DeadLetter]) -> None:
        """Give rows up, if there are any."""
        if letters:
            self.meter.dead_count += len(letters)
            self.source.quarantine(self.claim, letters)

    @property
    def is_held_up(self) -> bool:
        """Whether its last write was put off."""
        return self.write_at > self.written_at

    @property
    def first_requests(self) -> int:
        """Number of requests without an answer, of texts that have not failed before."""
        return sum(not request.is_answered for unit in self.units if not unit.failures for request in unit.requests)

    @property
    def requests(self) -> Iterator[Request]:
        """All requests that are not settled yet."""
        return (request for unit in self.units for request in unit.requests)

    @property
    def futures(self) -> list[Future[EmbeddingBlock]]:
        """Requests in flight.

        Not those that are done and wait for others of their unit: a wait would end at once.
        """
        sent = [request.future for request in self.requests] + [unit.verdict for unit in self.units]
        return [future for future in sent if future is not None and not future.done()]

    @property
    def ungranted(self) -> list[Request]:
        """Requests that wait for a grant."""
        return [request for request in self.requests if not request.is_granted]

    @property
    def memory(self) -> int:
        """Bytes that the batch is expected to take at its peak."""
        return self.content_bytes + self.vector_bytes


def request_items(pipeline: Pipeline) -> int:
    """Inputs that one request of the pipeline's model may carry."""
    model = pipeline.version.model
    if model.config.provider == "sentence-transformers":
        return min(model.request_items, _LOCAL_REQUEST_ITEMS)
    return model.request_items


def vector_memory(pipeline: Pipeline, count: int) -> int:
    """Bytes that the vectors of `count` chunks take on their way into the table."""
    return count * pipeline.version.dimensions * _BYTES_A_VALUE


def pack(
    pipeline: Pipeline,
    found: Iterable[Document],
    known: Mapping[bytes, Vector],
    tokens_left: int | None = None,
    first_items: int | None = None,
) -> list[Unit]:
    """Group documents into units of about one request each.

    A document is never split over two units. Chunks whose vectors are `known` are not asked for. Requests are no larger
    than what is left of a budget. The first unit may have requests of `first_items`, which is more than the model is known
    to take.
    """
    units: list[Unit] = []
    items, most = first_items or request_items(pipeline), _request_tokens(pipeline, tokens_left)
    members: list[Document] = []
    texts: dict[bytes, ModelInput] = {}
    tokens = 0
    for document in found:
        wanted = {c.digest: c.embedded for c in document.chunks if c.digest not in known}
        size = sum(map(most_tokens, wanted.values()))
        if members and (len(texts) + len(wanted) > items or tokens + size > most):
            units.append(_unit(members, texts, known, _split(texts, tokens, items, most)))
            members, texts, tokens = [], {}, 0
            items = request_items(pipeline)
        members.append(document)
        texts |= wanted
        tokens += size
    if members:
        units.append(_unit(members, texts, known, _split(texts, tokens, items, most)))
    return units


def unit_of(pipeline: Pipeline, members: list[Document], known: Mapping[bytes, Vector]) -> Unit:
    """Return a unit of documents that asks for their chunks that are not `known`.

    Its requests are no larger than the model takes.
    """
    texts = {c.digest: c.embedded for document in members for c in document.chunks if c.digest not in known}
    tokens = sum(map(most_tokens, texts.values()))
    return _unit(members, texts, known, _split(texts, tokens, request_items(pipeline), _request_tokens(pipeline, None)))


def _unit(
    members: list[Document],
    texts: dict[bytes, ModelInput],
    known: Mapping[bytes, Vector],
    parts: Iterable[dict[bytes, ModelInput]],
) -> Unit:
    vectors = {c.digest: known[c.digest] for d in members for c in d.chunks if c.digest in known} if known else {}
    return Unit(members, vectors, [Request(part) for part in parts])


def halved_requests(unit: Unit) -> list[Request]:
    """Return requests of half the size for what a unit still lacks.

    Return none if each of its texts failed alone.
    """
    if all(len(texts) == 1 for texts in unit.failed):
        return []
    parts: list[dict[bytes, ModelInput]] = []
    for failed in unit.failed:
        texts = list(failed.items())
        middle = (len(texts) + 1) // 2
        parts += [dict(texts[:middle]), dict(texts[middle:])]
    return [Request(part) for part in parts if part]


def _request_tokens(pipeline: Pipeline, tokens_left: int | None) -> int:
    most = pipeline.version.model.config.max_batch_tokens
    return most if tokens_left is None else max(1, min(most, tokens_left))


def _split(texts: dict[bytes, ModelInput], tokens: int, items: int, most: int) -> Iterator[dict[bytes, ModelInput]]:
    """Yield the texts in parts of up to `items` texts and `most` tokens.

    All of them have `tokens`.
    """
    if len(texts) <= items and tokens <= most:
        if texts:
            yield texts
        return
    part: dict[bytes, ModelInput] = {}
    size_of_part = 0
    for digest, text in texts.items():
        size = most_tokens(text)
        if part and (len(part) >= items or size_of_part + size > most):
            yield part
            part, size_of_part = {}, 0
        part[digest] = text
        size_of_part += size
    if part:
        yield part
