"""The engine: one batch of claimed rows from source to vectors, in steps that the callers put into transactions.

`embed_pending` runs all steps in the caller's transaction. The resident worker commits between them and holds no
transaction while a provider works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from embedline import circuit, documents, outbox
from embedline.catalog import Pipeline
from embedline.chunking import Chunker, recursive_chunker, whole_text
from embedline.database import Session
from embedline.documents import Document, Vector
from embedline.embedder_pool import embedder_for
from embedline.embedders import EmbeddingBlock
from embedline.errors import (
    EmbedlineError,
    InputRejected,
    InvalidVectors,
    ModelHostUnavailable,
    ProviderMisconfigured,
    TransientProviderError,
    UnusableText,
)
from embedline.outbox import ClaimedRange, ClaimedRow
from embedline.retry import MAX_ATTEMPTS, backoff_seconds
from embedline.text import repair_text

# Content that is held in memory at a time; one larger row is read alone.
MAX_BATCH_BYTES = 16 * 1024 * 1024
# A busy row is in an application's hands: look again soon, without charge.
_BUSY_SECONDS = 0.1
# Inputs a request carries to a model on this machine: short enough that the work is written while the next is embedded.
_LOCAL_REQUEST_ITEMS = 64
_MISCONFIGURED_PAUSE_SECONDS = 10.0


@dataclass
class Unit:
    """Documents that are embedded and written together: one or more requests, one write."""

    documents: list[Document]
    requests: dict[Future[EmbeddingBlock], list[bytes]] = field(default_factory=dict)
    vectors: dict[bytes, Vector] = field(default_factory=dict)
    faults: dict[bytes, str] = field(default_factory=dict)
    error: EmbedlineError | None = None


@dataclass
class Batch:
    """Claimed rows of one pipeline in work."""

    pipeline: Pipeline
    rows: list[ClaimedRow]
    claimed_range: ClaimedRange | None = None
    units: list[Unit] = field(default_factory=list)
    found: list[Document] = field(default_factory=list)
    chunker: Chunker = whole_text
    embedded_count: int = 0

    @property
    def futures(self) -> list[Future[EmbeddingBlock]]:
        """Requests in flight."""
        return [future for unit in self.units for future in unit.requests]


class Engine:
    """Embeds batches for one session. `worker_id` is None inside embed_pending."""

    def __init__(self, session: Session, worker_id: int | None) -> None:
        self.session = session
        self.worker_id = worker_id

    def claim(self, pipelines: Sequence[Pipeline], limit: int, *, backfill: bool) -> Batch | None:
        """Claim rows of the first pipeline that has any: live changes, or ranges of the backfill."""
        for pipeline in pipelines:
            if circuit.is_open(self.session, pipeline.version.model.model_id):
                continue
            if backfill:
                if pipeline.version.state == "complete":
                    continue
                claimed = outbox.claim_backfill(self.session, pipeline, limit, self.worker_id)
                if claimed is not None:
                    return Batch(pipeline, claimed[1], claimed[0])
            else:
                rows = outbox.claim_changes(self.session, pipeline, limit, self.worker_id)
                if rows:
                    return Batch(pipeline, rows)
        return None

    def read(self, batch: Batch) -> None:
        """Read and compare; settle at once what is gone or has not changed."""
        pending = [row for row in batch.rows if not self._bury_fatal(batch, row)]
        keys = [row.key for row in pending]
        stored = documents.stored_hashes(self.session, batch.pipeline, keys) if keys else {}
        if batch.claimed_range is not None:
            # A row that a live change has already brought needs no backfill.
            pending = [row for i, row in enumerate(pending) if i not in stored]
            keys, stored = [row.key for row in pending], {}
        absent: list[Document] = []
        for index, row, read in self._read_all(batch, pending):
            if read is None or not read.accepted:
                absent.append(Document(row))
            elif stored.get(index) in (("embedded", read.content_hash), ("empty", None)) and (
                stored[index][1] == read.content_hash
            ):
                self._finish(batch, [row])
            else:
                batch.found.append(Document(row, read.content_hash, read.content))
        self._settle_absent(batch, absent)
        batch.chunker = self._chunker(batch.pipeline)

    def chunk(self, batch: Batch, breathe: Callable[[], None]) -> None:
        """Repair and chunk what was read. Touches no table: the resident worker holds no transaction meanwhile."""
        for document in batch.found:
            if document.content is not None:
                try:
                    document.chunks = batch.chunker(repair_text(document.content), breathe)
                except UnusableText as error:
                    document.problem = error
                document.content = None

    def submit(self, batch: Batch) -> None:
        """Give up what has nothing to embed, lend what is known already, and start the requests for the rest."""
        for document in batch.found:
            if document.problem is not None:
                self._bury(batch, document, "validate", document.problem.sqlstate, document.problem.message)
        sound = [document for document in batch.found if document.problem is None]
        known = self._lend(batch.pipeline, sound)
        batch.units = _pack(sound, known, self._request_items(batch.pipeline), batch.pipeline)
        for unit in batch.units:
            self._submit(batch.pipeline, unit)

    def write_ready(self, batch: Batch) -> bool:
        """Write one unit whose requests are all done; False where none is."""
        for unit in batch.units:
            if all(future.done() for future in unit.requests):
                batch.units.remove(unit)
                self._collect(batch.pipeline, unit)
                if unit.error is not None:
                    self._handle_failure(batch, unit)
                else:
                    self._write(batch, unit)
                return True
        return False

    def finish(self, batch: Batch) -> None:
        """Note the progress of a backfill range once all of its claimed rows are settled."""
        if batch.claimed_range is not None:
            outbox.finish_range(self.session, batch.claimed_range)

    def _bury_fatal(self, batch: Batch, row: ClaimedRow) -> bool:
        if not outbox.was_fatal(row):
            return False
        message = f"the worker died {row.crash_count} times while it had this row"
        outbox.bury(self.session, batch.pipeline, row, "claim", "EL020", message, None)
        outbox.note_error(self.session, batch.pipeline, f"{outbox.key_json(batch.pipeline, row.key)}: {message}")
        self._finish(batch, [row])
        return True

    def _read_all(
        self, batch: Batch, rows: list[ClaimedRow]
    ) -> Iterable[tuple[int, ClaimedRow, documents.ReadRow | None]]:
        remaining = list(enumerate(rows))
        while remaining:
            try:
                read = documents.read_rows(
                    self.session, batch.pipeline, [row.key for _, row in remaining], MAX_BATCH_BYTES
                )
            except Exception as error:
                if not _is_row_fault(error):
                    raise
                yield from self._read_halves(batch, remaining, error)
                return
            deferred = []
            for position, (index, row) in enumerate(remaining):
                found = read.get(position)
                if found is not None and found.deferred:
                    deferred.append((index, row))
                else:
                    yield index, row, found
            remaining = deferred

    def _read_halves(
        self, batch: Batch, rows: list[tuple[int, ClaimedRow]], error: Exception
    ) -> Iterable[tuple[int, ClaimedRow, documents.ReadRow | None]]:
        """Find the rows whose content expression raises, by halves; those are given up, their neighbours go on."""
        if len(rows) == 1:
            message = str(error).removeprefix("spiexceptions.")
            code = str(getattr(error, "sqlstate", "EL022"))
            self._bury(batch, Document(rows[0][1]), "read", code, message)
            return
        middle = len(rows) // 2
        for part in (rows[:middle], rows[middle:]):
            for position, row, read in self._read_all(batch, [row for _, row in part]):
                yield part[position][0], row, read

    def _chunker(self, pipeline: Pipeline) -> Chunker:
        if pipeline.chunking == "none":
            return whole_text
        cache: dict[object, Chunker] = self.session.cache.setdefault("embedline.chunkers", {})
        tokens = pipeline.chunk_tokens or 256
        model_id = pipeline.version.model.model_id
        key = (model_id, tokens, pipeline.chunk_overlap)
        if key not in cache:
            tokenizer = self.session.scalar(
                "SELECT tokenizer FROM embedline.model WHERE model_id = $1", ["bigint"], model_id
            )
            cache[key] = recursive_chunker(tokenizer, tokens, pipeline.chunk_overlap)
        return cache[key]

    def _lend(self, pipeline: Pipeline, found: list[Document]) -> dict[bytes, Vector]:
        digests = list(dict.fromkeys(chunk.digest for document in found for chunk in document.chunks))
        return documents.lend_vectors(self.session, pipeline, digests)

    def _request_items(self, pipeline: Pipeline) -> int:
        config = pipeline.version.model.config
        return (
            min(config.max_batch_items, _LOCAL_REQUEST_ITEMS)
            if config.provider == "sentence-transformers"
            else config.max_batch_items
        )

    def _submit(self, pipeline: Pipeline, unit: Unit) -> None:
        texts: dict[bytes, str] = {}
        for document in unit.documents:
            for chunk in document.chunks:
                if chunk.digest not in unit.vectors:
                    texts.setdefault(chunk.digest, chunk.content.strip())
        embedder = embedder_for(self.session, pipeline.version.model) if texts else None
        for digests in _split_requests(texts, self._request_items(pipeline), pipeline):
            if embedder is not None:
                unit.requests[embedder.submit([texts[digest] for digest in digests], "document")] = digests

    def _collect(self, pipeline: Pipeline, unit: Unit) -> None:
        """Take over the vectors of a unit's answers, checked and normalised; note the error of a failed one."""
        from embedline import vectors

        version = pipeline.version
        for future, digests in unit.requests.items():
            error = future.exception()
            if error is not None:
                if not isinstance(error, EmbedlineError):
                    raise error
                unit.error = error
                continue
            block = future.result()
            try:
                matrix = vectors.matrix_from_bytes(block.data, block.count, block.dimensions)
                vectors.check_shape(matrix, len(digests), version.dimensions)
            except InvalidVectors as invalid:
                unit.error = invalid
                continue
            # A normalised vector fits float16 whatever the model's scale.
            faults = vectors.find_faults(matrix, version.column_type if version.distance == "l2" else "vector")
            sound = [i for i in range(len(digests)) if i not in faults]
            usable = matrix[sound]
            if version.distance != "l2":
                usable = vectors.normalise(usable)
            unit.vectors.update({digests[i]: usable[n] for n, i in enumerate(sound)})
            unit.faults.update({digests[i]: reason for i, reason in faults.items()})
        unit.requests = {}
        if unit.error is None:
            circuit.close_circuit(self.session, version.model.model_id)

    def _write(self, batch: Batch, unit: Unit) -> None:
        sound = []
        for document in unit.documents:
            reasons = [unit.faults[chunk.digest] for chunk in document.chunks if chunk.digest in unit.faults]
            if reasons:
                self._bury(batch, document, "embed", InvalidVectors.sqlstate, reasons[0])
            else:
                sound.append(document)
        if not sound:
            return
        result = documents.write_documents(self.session, batch.pipeline, sound, unit.vectors)
        self._finish(batch, [sound[i].row for i in result.written])
        batch.embedded_count += sum(1 for i in result.written if sound[i].chunks)
        self._settle_absent(batch, [sound[i] for i in result.absent])
        for index in result.busy:
            outbox.give_back(self.session, batch.pipeline, sound[index].row, _BUSY_SECONDS, charged=False, error=None)
        for index in result.stale:
            self._give_back_stale(batch, sound[index])

    def _give_back_stale(self, batch: Batch, document: Document) -> None:
        # The newer change has its own outbox row. Only an expression that never gives the same text twice comes here often.
        if document.row.attempts >= MAX_ATTEMPTS:
            self._bury(
                batch,
                document,
                "write",
                "EL021",
                "the content differs at every read; is the content expression volatile?",
            )
        else:
            outbox.give_back(self.session, batch.pipeline, document.row, 0.0, charged=True, error=None)

    def _settle_absent(self, batch: Batch, absent: list[Document]) -> None:
        if not absent:
            return
        again = set(documents.remove_absent(self.session, batch.pipeline, absent))
        self._finish(batch, [document.row for i, document in enumerate(absent) if i not in again])
        for index in again:
            outbox.give_back(self.session, batch.pipeline, absent[index].row, _BUSY_SECONDS, charged=False, error=None)

    def _handle_failure(self, batch: Batch, unit: Unit) -> None:
        error = unit.error
        if isinstance(error, InputRejected | InvalidVectors):
            self._halve(batch, unit, error)
            return
        message = str(error)
        outbox.note_error(self.session, batch.pipeline, message)
        pause: float | None
        if isinstance(error, ProviderMisconfigured):
            pause, charged = _MISCONFIGURED_PAUSE_SECONDS, False
            circuit.open_circuit(self.session, batch.pipeline.version.model.model_id, message, pause)
        elif isinstance(error, TransientProviderError):
            # A provider that cannot be reached, or that limits its rate, says nothing about these rows.
            pause, charged = error.retry_after, not (error.throttled or isinstance(error, ModelHostUnavailable))
            if not charged:
                circuit.open_circuit(self.session, batch.pipeline.version.model.model_id, message, pause)
        else:
            pause, charged = None, True
        for document in unit.documents:
            if charged and document.row.attempts >= MAX_ATTEMPTS:
                self._bury(batch, document, "embed", getattr(error, "sqlstate", "EL010"), message)
            else:
                delay = backoff_seconds(document.row.attempts, pause) if charged else (pause or 0.0)
                outbox.give_back(self.session, batch.pipeline, document.row, delay, charged=charged, error=message)

    def _halve(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Split a rejected unit until the rows that are the cause stand alone; those are given up."""
        if len(unit.documents) == 1:
            self._bury(batch, unit.documents[0], "embed", error.sqlstate, str(error))
            return
        middle = len(unit.documents) // 2
        for part in (unit.documents[:middle], unit.documents[middle:]):
            half = Unit(part, vectors=dict(unit.vectors))
            self._submit(batch.pipeline, half)
            batch.units.append(half)

    def _bury(self, batch: Batch, document: Document, stage: str, error_code: str, message: str) -> None:
        outbox.bury(self.session, batch.pipeline, document.row, stage, error_code, message, document.content_hash)
        outbox.note_error(self.session, batch.pipeline, f"{outbox.key_json(batch.pipeline, document.key)}: {message}")
        self._finish(batch, [document.row])

    def _finish(self, batch: Batch, rows: list[ClaimedRow]) -> None:
        outbox.finish(self.session, batch.pipeline, rows, self.worker_id)


def _is_row_fault(error: Exception) -> bool:
    # Data exceptions, wrong text for a type, an error raised by a function of the expression, a missing right or function.
    return str(getattr(error, "sqlstate", ""))[:2] in ("21", "22", "23", "38", "39", "42", "P0")


def _tokens(text: str) -> int:
    # An estimate on the safe side: no vocabulary in use has under one byte a token, most have about four.
    return math.ceil(len(text) / 2)


def _pack(found: list[Document], known: dict[bytes, Vector], items: int, pipeline: Pipeline) -> list[Unit]:
    """Group documents into units of about one request each; a document is never split over two units."""
    units: list[Unit] = []
    current: list[Document] = []
    new: dict[bytes, int] = {}
    budget = pipeline.version.model.config.max_batch_tokens
    for document in found:
        wanted = {
            c.digest: _tokens(c.content) for c in document.chunks if c.digest not in known and c.digest not in new
        }
        if current and (len(new) + len(wanted) > items or sum(new.values()) + sum(wanted.values()) > budget):
            units.append(_unit(current, known))
            current, new = [], {}
            wanted = {c.digest: _tokens(c.content) for c in document.chunks if c.digest not in known}
        current.append(document)
        new |= wanted
    if current:
        units.append(_unit(current, known))
    return units


def _unit(members: list[Document], known: dict[bytes, Vector]) -> Unit:
    digests = {chunk.digest for document in members for chunk in document.chunks}
    return Unit(members, vectors={digest: known[digest] for digest in digests if digest in known})


def _split_requests(texts: dict[bytes, str], items: int, pipeline: Pipeline) -> list[list[bytes]]:
    requests: list[list[bytes]] = []
    current: list[bytes] = []
    tokens = 0
    for digest, text in texts.items():
        size = _tokens(text)
        if current and (len(current) >= items or tokens + size > pipeline.version.model.config.max_batch_tokens):
            requests.append(current)
            current, tokens = [], 0
        current.append(digest)
        tokens += size
    if current:
        requests.append(current)
    return requests
