"""The engine: one batch of claimed rows from source to vectors, in steps that the callers put into transactions.

`embed_pending` runs all steps in the caller's transaction. The resident worker commits between them, holds no
transaction while a provider works, and has several batches in work at a time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from embedline.catalog.load import ChunkSet
from embedline.catalog.settings import load_settings
from embedline.catalog.source import hidden_source
from embedline.chunking.chunk import Chunker
from embedline.chunking.factory import make_chunker
from embedline.chunking.halves import cut_chunks, halves
from embedline.core.embedding import EmbeddingBlock
from embedline.core.retry import MAX_ATTEMPTS, MAX_CRASHES, backoff_seconds
from embedline.core.text import repair_text
from embedline.core.tokens import estimated_size, likely_tokens, plausible_tokens
from embedline.documents import documents
from embedline.documents.documents import NO_VECTOR, Document, Vector
from embedline.documents.readability import Readability, mark_unreadable, readability
from embedline.errors import (
    EmbedlineError,
    InputRejected,
    InvalidVectors,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
    UnusableText,
)
from embedline.models import circuit, health_check, learning, request_size
from embedline.models.pool import embedder_for, let_cancel_through, wait_first
from embedline.models.request_size import Split
from embedline.models.sentence_embedder import sentence_embedder
from embedline.postgres.session import Session, sqlstate_of
from embedline.queue import inbox
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.spending import ledger
from embedline.worker.batch import Batch, Request, Unit, halved_requests, pack, unit_of, vector_memory
from embedline.worker.sources import VERSION_WORK, work_of

# Documents of one write: its transaction stays short.
_WRITE_DOCUMENTS = 2000
# A busy row is in an application's hands: look again soon, without charge.
_BUSY_SECONDS = 0.1
# Of rows that were changed while they were in work, beside a long queue.
_LONG_QUEUE_SECONDS = 5.0
# A provider that refuses everything, a closed account say, is asked so often whether it is well again.
_REFUSED_PAUSE_SECONDS = 10.0
_MONEY_SECONDS = 1.0
# A grant that is waited for is asked for so often: a limit may be lifted meanwhile.
_GRANT_SECONDS = 5.0
# Seconds until rows are tried again whose batch would have been one too many to be searched, and how long a search counts.
_PUT_OFF_SECONDS, _SEARCH_SECONDS = 1.0, 60.0
# What may be a moment's trouble is tried so often before a batch is split.
_ATTEMPTS_TOGETHER = 2
# A cancel is looked for so often.
_CANCEL_SECONDS = 0.1


class Engine:
    """Embeds batches for one session. `worker_id` is None inside embed_pending.

    `patience` is how many seconds a batch may wait for a grant of rate limit or budget before its rows go back.
    """

    def __init__(self, session: Session, worker_id: int | None, patience: float) -> None:
        self.session = session
        self.worker_id = worker_id
        self._patience = patience
        # Why requests were last refused a grant; None while none was.
        self.refusal: str | None = None
        # Batches in which the text that fails is looked for, and when that began.
        self._searched: dict[Batch, float] = {}

    def run(self, batch: Batch, is_over: Callable[[], bool] = lambda: False) -> None:
        """Take a batch through all steps inside the caller's transaction; the statement stays cancellable.

        `is_over` is asked whenever the provider is waited for: where it says so, what is not written goes back.
        """
        on_wait = let_cancel_through(self.session)
        self.read(batch)
        self.chunk(batch, now_and_then(on_wait))
        self.submit(batch)
        while batch.units:
            self.start(batch)
            if self.write_ready(batch):
                continue
            if is_over():
                self._give_up_waiting(batch)
                break
            if batch.futures:
                wait_first(batch.futures, on_wait, is_over)
                continue
            time.sleep(max(min(batch.grant_at - time.monotonic(), _CANCEL_SECONDS), 0.0))
            on_wait()
            if time.monotonic() >= batch.grant_at:
                self.grant(batch)
        self.finish(batch)

    def _give_up_waiting(self, batch: Batch) -> None:
        """Give back what is not written, uncounted. Its requests may yet be served: what was reserved for them stands."""
        for future in batch.futures:
            future.cancel()
        for reservation_id in batch.tokens_used:
            ledger.settle(self.session, reservation_id, None)
        batch.tokens_used = {}
        rows = [document.row for unit in batch.units for document in unit.documents]
        batch.units = []
        if rows:
            self._give_back(batch, rows, 0.0, charged=False, error=None)

    def read(self, batch: Batch) -> None:
        """Read and compare; settle at once what is gone or has not changed."""
        batch.readability = self._readability(batch)
        fatal = [row for row in batch.rows if row.crash_count >= MAX_CRASHES]
        self._bury(batch, [_fatal_letter(row) for row in fatal])
        pending = [row for row in batch.rows if row.crash_count < MAX_CRASHES]
        if batch.pipeline.is_lane:
            VERSION_WORK.read(self.session, batch, pending, batch.max_bytes)
            return
        absent: list[Document] = []
        settled: list[ClaimedRow] = []
        deferred: list[ClaimedRow] = []
        for row, read in self._read_all(batch, pending):
            if read is not None and read.deferred:
                deferred.append(row)
            elif read is None or not read.accepted:
                absent.append(Document(row))
            elif read.current or (read.given_up and batch.claimed_range is not None):
                # A backfill tries no dead letter again; a change of its row does, and so does requeue.
                settled.append(row)
            else:
                batch.found.append(Document(row, read.content_hash, read.content, read.prefix))
                batch.content_bytes += len(read.content or "")
        self._settle_current(batch, settled)
        batch.deferred_count = len(deferred)
        if deferred:
            self._give_back(batch, deferred, 0.0, charged=False, error=None)
            if batch.claim_id is not None:
                gone = {row.key for row in deferred}
                kept = [row.key for row in batch.rows if row.key not in gone]
                inbox.narrow_claim(self.session, batch.pipeline, batch.claim_id, kept, self.worker_id)
        self._settle_absent(batch, absent)
        if batch.pipeline.spec.method == "semantic" and batch.pipeline.metered and batch.found:
            self._reserve_sentences(batch)

    def chunk(self, batch: Batch, breathe: Callable[[], None]) -> None:
        """Repair and chunk what was read. Touches no table: the resident worker holds no transaction meanwhile."""
        if batch.found and not batch.pipeline.is_lane:
            self._chunk_documents(batch, breathe)
        if batch.readability is not None:
            mark_unreadable(batch.found, batch.readability, breathe)

    def _chunk_documents(self, batch: Batch, breathe: Callable[[], None]) -> None:
        chunker = self._chunker(batch, batch.pipeline.chunk_set)
        others = {chunk_set.number: self._chunker(batch, chunk_set) for chunk_set in batch.pipeline.other_sets}
        for document in batch.found:
            if document.content is not None:
                try:
                    text = repair_text(document.content)
                    document.chunks = chunker(text, breathe, document.prefix)
                    for number, other in others.items():
                        document.other_chunks[number] = other(text, breathe, document.prefix)
                except (UnusableText, ProviderError) as error:
                    document.problem = error
                document.content = None

    def submit(self, batch: Batch) -> None:
        """Give up what has nothing to embed, lend what is known already, and reserve the requests for the rest."""
        problems = [document for document in batch.found if document.problem is not None]
        unusable = [document for document in problems if isinstance(document.problem, UnusableText)]
        self._bury(batch, [_letter(document, "validate", document.problem) for document in unusable])
        for document in problems:
            if isinstance(document.problem, ProviderError):
                # The chunker asks the model where the meaning changes: a failure there is one of the model.
                now = time.monotonic()
                failed = Unit([document], error=document.problem, sent_at=now, failed_at=now)
                self._judge(batch, failed, document.problem)
        sound = [document for document in batch.found if document.problem is None]
        batch.found = []
        left = ledger.tokens_left(self.session, batch.pipeline) if batch.pipeline.metered else None
        sound, known = self._cut_long_texts(batch, sound)
        wanted = {chunk.digest for document in sound for chunk in document.chunks} - known.keys()
        trial = request_size.size_to_try(self.session, batch.pipeline.version.model, len(wanted))
        batch.units += pack(batch.pipeline, sound, known, left, trial)
        texts = sum(len(request.texts) for request in batch.requests)
        batch.vector_bytes = vector_memory(batch.pipeline, texts)
        self.grant(batch)

    def grant(self, batch: Batch) -> None:
        """Reserve what budget and rate limit allow; give the rest back where the wait would be long."""
        waiting = batch.ungranted
        if not waiting:
            return
        grant = ledger.Grant(len(waiting), None, None, None)
        if batch.pipeline.metered:
            estimates = [request.tokens for request in waiting]
            grant = ledger.reserve(self.session, batch.pipeline, estimates, self.worker_id)
        for request in waiting[: grant.count]:
            request.is_granted, request.reservation_id = True, grant.reservation_id
        if grant.count and grant.reservation_id is not None:
            batch.tokens_used[grant.reservation_id] = 0
        if grant.count < len(waiting):
            wait = grant.wait_seconds or 0.0
            batch.grant_at = time.monotonic() + min(wait, _GRANT_SECONDS)
            if wait > self._patience:
                self.give_back_waiting(batch, grant.reason or "the budget is used up")

    def give_back_waiting(self, batch: Batch, reason: str) -> None:
        """Give back the documents of units of which nothing is on its way: their grant is long in coming.

        They are soon due again, because a budget can be raised at any time; until then nobody claims them.
        """
        later = [unit for unit in batch.units if unit.requests and not any(r.is_granted for r in unit.requests)]
        batch.units = [unit for unit in batch.units if unit not in later]
        rows = [document.row for unit in later for document in unit.documents]
        self.refusal = reason
        if rows:
            work_of(batch).note_error(self.session, batch, reason)
            self._give_back(batch, rows, _MONEY_SECONDS, charged=False, error=reason)

    def has_search(self, batch: Batch) -> bool:
        """Return True if `end_search` would release something."""
        return any(_is_unsent_search(unit) for unit in batch.units)

    def end_search(self, batch: Batch) -> bool:
        """Release the units that are searched for a text that fails and of which nothing is sent; True if there were any.

        A search of 1,000 rows that all fail takes most of a minute, for which a worker that is to end would stay.
        """
        unsent = [unit for unit in batch.units if _is_unsent_search(unit)]
        batch.units = [unit for unit in batch.units if unit not in unsent]
        rows = [document.row for unit in unsent for document in unit.documents]
        if rows:
            self._give_back(batch, rows, 0.0, charged=False, error="the worker ended while it looked for what fails")
        return bool(unsent)

    def start(self, batch: Batch) -> None:
        """Send the requests that were granted; the transaction that reserved them is committed.

        Of a search a few at a time: they are asked for in the order in which they are sent, new rows after them.
        """
        granted = [
            r for unit in batch.units if not unit.failures for r in unit.requests if r.is_granted and not r.future
        ]
        searching = [request for unit in batch.units if unit.failures for request in unit.requests]
        sent = sum(request.future is not None and not request.is_answered for request in searching)
        places = max(batch.pipeline.version.model.config.concurrency, 1) - sent
        granted += [r for r in searching if r.is_granted and r.future is None][: max(places, 0)]
        embedder = embedder_for(self.session, batch.pipeline.version.model) if granted else None
        # One time for all: each says something about the provider that the others met.
        now = time.monotonic()
        for request in granted:
            if embedder is not None:
                request.sent_at = now
                request.future = embedder.submit(list(request.texts.values()), "document")

    def write_ready(self, batch: Batch) -> bool:
        """Write the units whose requests have all come back; False where there is none."""
        ready: list[Unit] = []
        count = 0
        for unit in batch.units:
            if unit.is_answered and (not ready or count + len(unit.documents) <= _WRITE_DOCUMENTS):
                ready.append(unit)
                count += len(unit.documents)
        if not ready:
            return False
        batch.units = [unit for unit in batch.units if unit not in ready]
        self._write_units(batch, ready)
        return True

    def _write_units(self, batch: Batch, ready: list[Unit]) -> None:
        known: dict[bytes, Vector] = {}
        sound: list[Document] = []
        # All first: an answer to one unit is evidence for the others.
        for unit in ready:
            self._collect(batch, unit)
        for unit in ready:
            if unit.error is None:
                known |= unit.vectors
                sound += self._without_faults(batch, unit)
            else:
                self._judge(batch, unit, unit.error)
        splits = {unit.split for unit in ready if unit.split is not None} - {unit.split for unit in batch.units}
        request_size.remember(self.session, batch.pipeline.version.model, splits)
        self._settle_reservations(batch)
        if sound:
            self._write(batch, sound, known)
        self.grant(batch)

    def finish(self, batch: Batch) -> None:
        """Give the claim back once all of its rows are settled."""
        work_of(batch).finish(self.session, batch, self.worker_id)

    # Reading

    def _read_all(self, batch: Batch, rows: list[ClaimedRow]) -> Iterable[tuple[ClaimedRow, documents.ReadRow | None]]:
        if not rows:
            return
        try:
            read = documents.read_rows(self.session, batch.pipeline, [row.key for row in rows], batch.max_bytes)
        except Exception as error:
            if not _is_row_fault(error):
                raise
            # Since the claim: a fault of the whole source, not of these rows.
            hidden = hidden_source(self.session, batch.pipeline.source_oid)
            if hidden is not None:
                raise hidden from error
            # Find the rows whose expression raises, by halves; those are given up, their neighbours go on.
            if len(rows) == 1:
                message = str(error).removeprefix("spiexceptions.")
                code = sqlstate_of(error) or "EL022"
                self._bury(batch, [DeadLetter(rows[0], "read", code, message, None)])
            else:
                middle = len(rows) // 2
                yield from self._read_all(batch, rows[:middle])
                yield from self._read_all(batch, rows[middle:])
            return
        for index, row in enumerate(rows):
            yield row, read.get(index)

    def _chunker(self, batch: Batch, chunk_set: ChunkSet) -> Chunker:
        pipeline = batch.pipeline
        cache: dict[object, Chunker] = self.session.cache.setdefault("embedline.chunkers", {})
        # Semantic chunks are cut where the serving version's model sees the meaning change.
        key = (chunk_set, pipeline.version.version_id if chunk_set.spec.method == "semantic" else None)
        if key not in cache:
            tokenizer = self.session.scalar(
                "SELECT tokenizer FROM embedline.chunk_set WHERE chunk_set_id = $1", ["bigint"], chunk_set.chunk_set_id
            )
            # The sentences' embedder is looked up at each use: the session's own may have been replaced.
            cache[key] = make_chunker(chunk_set.spec, tokenizer, sentence_embedder(self.session, pipeline.version))
        return cache[key]

    def _readability(self, batch: Batch) -> Readability | None:
        """Return how the batch's chunks are looked at before they are embedded, as the setting stands now."""
        model_id = batch.pipeline.version.model.model_id
        cache: dict[int, str | None] = self.session.cache.setdefault("embedline.tokenizers", {})
        if model_id not in cache:
            query = "SELECT tokenizer FROM embedline.model WHERE model_id = $1"
            cache[model_id] = self.session.scalar(query, ["bigint"], model_id)
        tokenizer = cache[model_id]
        return None if tokenizer is None else readability(tokenizer, load_settings(self.session).unknown_token_share)

    def _cut_long_texts(self, batch: Batch, found: list[Document]) -> tuple[list[Document], dict[bytes, Vector]]:
        """Return the documents and the vectors known of their chunks, with unknown chunks cut that would be refused as too long.

        What is known stays whole, so that an edit elsewhere in a document changes none of its chunks. What is given up needs
        no vector, so no provider is asked for it.
        """
        known = self._lend(batch, found) | {digest: NO_VECTOR for document in found for digest in document.unreadable}
        limit = batch.pipeline.version.model.text_size_refused
        while limit is not None and not batch.pipeline.is_lane:
            cut = {}
            for place, document in enumerate(found):
                unknown = (chunk for chunk in document.chunks if chunk.digest not in known)
                long = {c.digest for c in unknown if estimated_size(c.embedded_text) >= limit and halves(c)}
                if long:
                    cut[place] = replace(document, chunks=cut_chunks(document.chunks, long) or document.chunks)
            if not cut:
                break
            found = [cut.get(place, document) for place, document in enumerate(found)]
            known |= self._lend(batch, list(cut.values()))
        return found, known

    def _lend(self, batch: Batch, found: list[Document]) -> dict[bytes, Vector]:
        digests = list(dict.fromkeys(chunk.digest for document in found for chunk in document.chunks))
        return documents.lend_vectors(self.session, batch.pipeline, digests)

    def _reserve_sentences(self, batch: Batch) -> None:
        """Reserve what the semantic chunker will ask of the model, or give the batch back; the estimate stands as spent."""
        tokens = sum(likely_tokens(document.content or "") for document in batch.found)
        grant = ledger.reserve(self.session, batch.pipeline, [tokens], self.worker_id)
        if grant.count:
            if grant.reservation_id is not None:
                ledger.settle(self.session, grant.reservation_id, None)
            return
        self.refusal = grant.reason or "the budget is used up"
        rows, batch.found = [document.row for document in batch.found], []
        self._give_back(batch, rows, _MONEY_SECONDS, charged=False, error=self.refusal)

    # Answers

    def _collect(self, batch: Batch, unit: Unit) -> None:
        """Take over the vectors of a unit's answers, checked and normalised; note the error of a failed one."""
        if not unit.requests:
            # Nothing was asked, or the unit waits for the verdict on what has failed.
            return
        errors: list[tuple[Request, EmbedlineError]] = []
        for request in unit.requests:
            if request.future is None:
                continue
            error = request.future.exception()
            if error is not None and not isinstance(error, EmbedlineError):
                raise error
            self._count_tokens(batch, request)
            if error is None:
                error = self._take_over(batch, unit, request, request.future.result())
            if error is not None:
                errors.append((request, error))
        batch.answered_at = unit.failed_at = time.monotonic()
        if errors:
            unit.error = functools.reduce(_graver, [error for _, error in errors])
            unit.sent_at = max(request.sent_at for request, _ in errors)
            lacking = ({d: t for d, t in request.texts.items() if d not in unit.vectors} for request in unit.requests)
            unit.failed = [texts for texts in lacking if texts]
        else:
            model = batch.pipeline.version.model
            circuit.close_circuit(self.session, model.model_id)
            sizes = {len(request.texts) for request in unit.requests}
            request_size.note_passed(self.session, model, max(sizes))
            request_size.note_too_long(self.session, model, unit.cut_sizes)
            if unit.split is not None:
                unit.split.passed |= sizes

    def _take_over(self, batch: Batch, unit: Unit, request: Request, block: EmbeddingBlock) -> InvalidVectors | None:
        """Take over the vectors of an answer; return what is wrong with the answer as a whole."""
        from embedline.core import vectors

        version = batch.pipeline.version
        if remark := learning.keep(self.session, batch.pipeline, block.learned):
            work_of(batch).note_error(self.session, batch, remark)
        digests = list(request.texts)
        try:
            matrix = vectors.matrix_from_bytes(block.data, block.count, block.dimensions)
            vectors.check_shape(matrix, len(digests), version.dimensions)
        except InvalidVectors as invalid:
            return invalid
        normalise = version.distance != "l2"
        # A normalised vector fits float16 whatever the model's scale.
        usable, faults = vectors.usable_vectors(matrix, "vector" if normalise else version.column_type, normalise)
        unit.vectors.update(zip(digests, usable, strict=True))
        for index, reason in faults.items():
            unit.faults[digests[index]] = reason
            del unit.vectors[digests[index]]
        if len(faults) < len(digests):
            health_check.note_answer(self.session, version.model.model_id, request.sent_at)
        return None

    def _count_tokens(self, batch: Batch, request: Request) -> None:
        """Add up what the answers to a reservation say they cost; None once one does not say, or cannot be right."""
        if request.reservation_id is None or request.future is None:
            return
        error = request.future.exception()
        used: int | None
        if isinstance(error, EmbedlineError):
            # Refused requests cost nothing; one that timed out may have been served.
            used = 0 if getattr(error, "is_refusal", False) else request.tokens
        else:
            prefix = batch.pipeline.version.model.config.document_prefix
            counted = request.future.result().tokens if error is None else None
            used = plausible_tokens(counted, list(request.texts.values()), prefix)
        so_far = batch.tokens_used.get(request.reservation_id)
        batch.tokens_used[request.reservation_id] = None if so_far is None or used is None else so_far + used

    def _settle_reservations(self, batch: Batch) -> None:
        open_ids = {request.reservation_id for request in batch.requests}
        for reservation_id in [i for i in batch.tokens_used if i not in open_ids]:
            ledger.settle(self.session, reservation_id, batch.tokens_used.pop(reservation_id))

    def _without_faults(self, batch: Batch, unit: Unit) -> list[Document]:
        """Return the documents whose vectors are all usable; the others are asked for once more, then judged."""
        if not unit.faults:
            return unit.documents
        faulty = [d for d in unit.documents if any(chunk.digest in unit.faults for chunk in d.chunks)]
        if unit.failures:
            error = InvalidVectors(next(iter(unit.faults.values())))
            failed = replace(unit, documents=faulty, requests=[], error=error)
            self._judge(batch, failed, error)
        else:
            batch.units.append(self._again(batch, unit, faulty))
        return [document for document in unit.documents if document not in faulty]

    def _again(self, batch: Batch, unit: Unit, members: list[Document]) -> Unit:
        """Return a unit that asks once more for what the members lack."""
        again = unit_of(batch.pipeline, members, unit.vectors)
        again.failures, again.split, again.cut_sizes = unit.failures + 1, unit.split, unit.cut_sizes
        return again

    # Writing

    def _write(self, batch: Batch, sound: list[Document], known: dict[bytes, Vector]) -> None:
        result = work_of(batch).write(self.session, batch, sound, known)
        self._finish([sound[i].row for i in result.written], batch)
        if result.written and learning.is_error(batch.pipeline.last_error):
            work_of(batch).forget_error(self.session, batch)
        batch.embedded_count += sum(1 for i in result.written if sound[i].chunks)
        if not batch.pipeline.is_lane:
            self._settle_absent(batch, [sound[i] for i in result.absent])
        if result.busy:
            self._give_back(batch, [sound[i].row for i in result.busy], _BUSY_SECONDS, charged=False, error=None)
        self._give_back_stale(batch, [sound[i] for i in result.stale])

    def _give_back_stale(self, batch: Batch, stale: list[Document]) -> None:
        # A newer change has its own row in the queue, however often that happens. Only an expression that never gives the
        # same text twice is left.
        newer = documents.queued_anew(self.session, batch.pipeline, [d.row for d in stale]) if stale else set()
        if newer is None:
            # Whichever it is, it comes later: by then the queue has been worked off.
            self._give_back(batch, [d.row for d in stale], _LONG_QUEUE_SECONDS, charged=False, error=None)
            return
        self._finish([stale[i].row for i in newer], batch)
        stale = [document for i, document in enumerate(stale) if i not in newer]
        spent = [document for document in stale if document.row.attempts >= MAX_ATTEMPTS]
        message = "the content differs at every read; is the content expression volatile?"
        self._bury(batch, [DeadLetter(d.row, "write", "EL021", message, d.content_hash) for d in spent])
        rest = [document.row for document in stale if document.row.attempts < MAX_ATTEMPTS]
        if rest:
            self._give_back(batch, rest, 0.0, charged=True, error=None)

    def _settle_current(self, batch: Batch, rows: list[ClaimedRow]) -> None:
        if not rows:
            return
        current = documents.still_current(self.session, batch.pipeline, [row.key for row in rows])
        self._finish([row for i, row in enumerate(rows) if i in current], batch)
        again = [row for i, row in enumerate(rows) if i not in current]
        if again:
            self._give_back(batch, again, _BUSY_SECONDS, charged=False, error=None)

    def _settle_absent(self, batch: Batch, absent: list[Document]) -> None:
        if not absent:
            return
        again = set(documents.remove_absent(self.session, batch.pipeline, absent))
        self._finish([document.row for i, document in enumerate(absent) if i not in again], batch)
        if again:
            self._give_back(batch, [absent[i].row for i in again], _BUSY_SECONDS, charged=False, error=None)

    # Failures

    def _judge(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Decide whose fault a failure was: the provider's, which charges no row, or that of a text.

        That depends on whether the provider answers something else. Where this is not known the unit stays in the batch until
        a harmless text is answered. A row is given up only after an answer to what was sent after its last failure.
        """
        if _says_nothing_of_texts(error):
            self._rest(batch, unit, getattr(error, "retry_after", None))
            return
        since = unit.failed_at if self._is_last_try(unit, error) else unit.sent_at
        others = (request.future for request in batch.requests if request.future and request.sent_at >= since)
        hopeful = (future for future in others if not future.done() or future.exception() is None)
        verdict = health_check.ask(self.session, batch.pipeline.version, since, next(hopeful, None))
        if verdict.pending is not None:
            batch.units.append(replace(unit, requests=[], verdict=verdict.pending))
        elif verdict.health == "sound":
            self._blame_texts(batch, unit, error)
        elif isinstance(verdict.error, InputRejected | ProviderMisconfigured):
            self._rest(batch, unit, _REFUSED_PAUSE_SECONDS)
        else:
            wishes = [getattr(e, "retry_after", None) for e in (error, verdict.error)]
            self._rest(batch, unit, max((wish for wish in wishes if wish is not None), default=None))

    def _is_last_try(self, unit: Unit, error: EmbedlineError) -> bool:
        """Whether a row of the unit is given up if the provider is sound."""
        if unit.faults and unit.failures:
            return True
        is_alone = len(unit.documents) == 1 and not halved_requests(unit)
        return is_alone and _is_spent(unit, error)

    def _rest(self, batch: Batch, unit: Unit, seconds: float | None) -> None:
        """Leave the provider alone for a while: it fails whatever it is asked. No row is charged, and none waits longer."""
        message = _words(unit.error)
        _spoil(unit)
        work_of(batch).note_error(self.session, batch, message)
        circuit.open_circuit(self.session, batch.pipeline.version.model.model_id, message, seconds)
        rows = [document.row for document in unit.documents]
        self._give_back(batch, rows, 0.0, charged=False, error=message)

    def _blame_texts(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Look for the text that makes a sound provider fail.

        What may be a moment's trouble is tried once more together, later. What was refused, or fails again, is split by
        halves until the rows that are the cause stand alone. A text that is refused alone is given up at its second refusal,
        one that fails in another way after five tries.
        """
        if unit.faults and unit.error is not None and unit.failures and not unit.failed:
            self._bury(batch, [_letter_of_faults(document, unit.faults) for document in unit.documents])
        elif not _is_about_texts(error) and not unit.failures and _attempts(unit) < _ATTEMPTS_TOGETHER:
            self._retry(batch, unit, error)
        elif not unit.failures and not self._may_search(batch, unit):
            self._put_off(batch, unit, error)
        elif not self._halve(batch, unit):
            if _is_spent(unit, error) and self._cut(batch, unit, error):
                return
            if _is_spent(unit, error):
                _spoil(unit)
                work_of(batch).note_error(self.session, batch, _words(error))
                self._bury(batch, [_letter(unit.documents[0], "embed", error)])
            elif _is_about_texts(error) and unit.failed:
                batch.units.append(self._again(batch, unit, unit.documents))
            else:
                self._retry(batch, unit, error)

    def _may_search(self, batch: Batch, unit: Unit) -> bool:
        """Return True unless as many batches of the model are searched as a quarter of what it works on at a time.

        A search sends two requests for each text that fails, and rows that are new would wait behind them.
        """
        # Its requests are gone by now if it has waited for a verdict; what failed of them is not.
        if len(unit.documents) < 2 and sum(len(texts) for texts in unit.failed) < 2:
            return True
        now, model = time.monotonic(), batch.pipeline.version.model
        # What was abandoned in its search is forgotten after a while.
        self._searched = {
            other: at
            for other, at in self._searched.items()
            if now - at < _SEARCH_SECONDS and any(unit.failures for unit in other.units)
        }
        others = [b for b in self._searched if b.pipeline.version.model.model_id == model.model_id and b is not batch]
        if len(others) >= max(model.config.concurrency // 4, 1):
            return False
        self._searched[batch] = now
        return True

    def _put_off(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Put a unit's rows back to be searched later; nothing of it was paid for, and the try does not count."""
        message = _words(error)
        _spoil(unit)
        work_of(batch).note_error(self.session, batch, message)
        rows = [document.row for document in unit.documents]
        self._give_back(batch, rows, _PUT_OFF_SECONDS, charged=False, error=message)

    def _retry(self, batch: Batch, unit: Unit, error: EmbedlineError) -> None:
        """Put a unit's rows back to be tried together again, soon; the try counts."""
        message = _words(error)
        _spoil(unit)
        work_of(batch).note_error(self.session, batch, message)
        wish = getattr(error, "retry_after", None)
        if wish:
            # The provider's wait is the model's, not the rows': embedline.resume_model ends it.
            circuit.open_circuit(self.session, batch.pipeline.version.model.model_id, message, wish)
        rows = [document.row for document in unit.documents]
        self._give_back(batch, rows, backoff_seconds(_attempts(unit)), charged=True, error=message)

    def _cut(self, batch: Batch, unit: Unit, error: EmbedlineError) -> bool:
        """Ask for texts that were refused alone in halves, which become chunks of their own; return False if that cannot be.

        A version that is filled from the chunks takes them as they are: they are those of other versions, too.
        """
        if not isinstance(error, InputRejected) or not unit.failed or batch.pipeline.is_lane:
            return False
        refused = {digest: text for texts in unit.failed for digest, text in texts.items()}
        chunks = cut_chunks(unit.documents[0].chunks, refused)
        if chunks is None:
            return False
        # The requests around it were refused for this text and not for their size.
        _spoil(unit)
        document = replace(unit.documents[0], chunks=chunks)
        again = unit_of(batch.pipeline, [document], unit.vectors | self._lend(batch, [document]))
        again.failures, again.split = unit.failures + 1, unit.split
        sizes = {estimated_size(text) for text in refused.values()} if error.is_too_long else set()
        again.cut_sizes = unit.cut_sizes | sizes
        batch.units.append(again)
        return True

    def _halve(self, batch: Batch, unit: Unit) -> bool:
        """Split a unit that failed; return False if its only text cannot be split.

        The requests of one large document are halved, too: it may be their size that the provider rejects.
        """
        if isinstance(unit.error, InputRejected):
            split = unit.split or Split()
            split.refused |= {len(texts) for texts in unit.failed if len(texts) > 1}
            unit = replace(unit, split=split)
        if len(unit.documents) > 1:
            middle = len(unit.documents) // 2
            for part in (unit.documents[:middle], unit.documents[middle:]):
                batch.units.append(self._again(batch, unit, part))
        elif smaller := halved_requests(unit):
            failures = unit.failures + 1
            parts = Unit(unit.documents, unit.vectors, smaller, failures=failures, split=unit.split)
            parts.cut_sizes = unit.cut_sizes
            batch.units.append(parts)
        else:
            return False
        return True

    def _bury(self, batch: Batch, letters: Sequence[DeadLetter]) -> None:
        if not letters:
            return
        busy = work_of(batch).bury(self.session, batch, letters)
        self._finish([letter.row for letter in letters if letter not in busy], batch)
        if busy:
            self._give_back(batch, [letter.row for letter in busy], _BUSY_SECONDS, charged=False, error=None)

    def _give_back(
        self, batch: Batch, rows: Sequence[ClaimedRow], delay: float, *, charged: bool, error: str | None
    ) -> None:
        work_of(batch).give_back(self.session, batch, rows, delay, charged=charged, error=error)

    def _finish(self, rows: Sequence[ClaimedRow], batch: Batch) -> None:
        work_of(batch).settle(self.session, batch, rows, self.worker_id)


def now_and_then(breathe: Callable[[], None]) -> Callable[[], None]:
    """Return `breathe` as something that may be called as often as one likes."""
    last = time.monotonic()

    def rarely() -> None:
        nonlocal last
        if time.monotonic() - last >= _CANCEL_SECONDS:
            breathe()
            last = time.monotonic()

    return rarely


def _is_unsent_search(unit: Unit) -> bool:
    """Return True for a part of a failed unit that is to be asked for again and is not sent; one may wait for a verdict."""
    return unit.failures > 0 and unit.verdict is None and not any(request.future for request in unit.requests)


def _is_row_fault(error: Exception) -> bool:
    # Data exceptions, wrong text for a type, an error raised by a function of the expression, a missing right or function.
    return sqlstate_of(error)[:2] in ("21", "22", "23", "38", "39", "42", "P0")


def _fatal_letter(row: ClaimedRow) -> DeadLetter:
    message = f"the worker died {row.crash_count} times while it had this row"
    return DeadLetter(row, "claim", "EL020", message, None)


def _says_nothing_of_texts(error: EmbedlineError) -> bool:
    """Whether an error is the provider's for certain: it limits its rate, or there is no connection to it."""
    return isinstance(error, TransientProviderError) and (error.throttled or error.unreachable)


def _is_about_texts(error: EmbedlineError) -> bool:
    """Whether an error is told as one of the texts: from a provider that answers others it is not a moment's trouble."""
    return isinstance(error, InputRejected | InvalidVectors)


def _attempts(unit: Unit) -> int:
    return max((document.row.attempts for document in unit.documents), default=1)


def _spoil(unit: Unit) -> None:
    if unit.split is not None:
        unit.split.is_spoilt = True


def _is_spent(unit: Unit, error: EmbedlineError) -> bool:
    """Whether a text that fails alone has failed often enough: a refusal is meant the second time."""
    return _attempts(unit) >= MAX_ATTEMPTS or (_is_about_texts(error) and unit.failures > 0)


def _letter_of_faults(document: Document, faults: Mapping[bytes, str]) -> DeadLetter:
    reason = next(faults[chunk.digest] for chunk in document.chunks if chunk.digest in faults)
    return DeadLetter(document.row, "embed", InvalidVectors.sqlstate, reason, document.content_hash)


def _letter(document: Document, stage: str, error: EmbedlineError | None) -> DeadLetter:
    code = error.sqlstate if error is not None else EmbedlineError.sqlstate
    return DeadLetter(document.row, stage, code, _words(error), document.content_hash)


def _words(error: EmbedlineError | None) -> str:
    """What went wrong, with the provider's own words where it had some; these are free of keys."""
    detail = error.detail if isinstance(error, ProviderError) else None
    return f"{error}: {detail}" if detail else str(error)


def _graver(first: EmbedlineError | None, second: EmbedlineError) -> EmbedlineError:
    """Of two requests' errors of one unit, the one to act on: a provider that is away says nothing about the texts."""
    return second if first is None or isinstance(second, TransientProviderError | ProviderMisconfigured) else first
