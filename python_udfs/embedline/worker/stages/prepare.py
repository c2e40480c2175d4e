"""Read and chunk what was claimed, and pack what is not known into requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from embedline.catalog.settings import load_settings
from embedline.catalog.values import ChunkSet
from embedline.chunking.chunk import Chunker
from embedline.chunking.factory import make_chunker
from embedline.chunking.halves import cut_chunks, halves
from embedline.core.request_tokens import likely_tokens
from embedline.core.retry import MAX_CRASHES
from embedline.core.text import repair_text
from embedline.core.tokens import estimated_size
from embedline.documents.readability import Readability, mark_unreadable, readability
from embedline.documents.values import NO_VECTOR, Document, Vector
from embedline.errors import ProviderError, UnusableText
from embedline.models import request_size
from embedline.models.sentence_embedder import sentence_embedder
from embedline.postgres.session import Session
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.spending import ledger
from embedline.worker.batch import Batch, pack, vector_memory
from embedline.worker.meter import Stage
from embedline.worker.stages.defer import Defer
from embedline.worker.stages.embed import Embed
from embedline.worker.stages.failures import Failures, dead_letter


@dataclass(frozen=True)
class Prepare:
    """Turn claimed rows into requests."""

    session: Session
    embed: Embed
    failures: Failures
    defer: Defer

    def read(self, batch: Batch) -> None:
        """Read the rows; give up those that have ended too many workers."""
        with batch.meter.stage(Stage.READ):
            self._read(batch)

    def _read(self, batch: Batch) -> None:
        batch.readability = self._readability(batch)
        fatal = [row for row in batch.rows if row.crash_count >= MAX_CRASHES]
        batch.quarantine([_fatal_letter(row) for row in fatal])
        pending = [row for row in batch.rows if row.crash_count < MAX_CRASHES]
        reading = batch.source.read(batch.claim, pending, batch.max_bytes)
        batch.found += reading.documents
        batch.content_bytes += reading.content_bytes
        batch.deferred_count = reading.deferred_count
        if batch.pipeline.is_reference:
            from embedline.worker.stages.fetch import load_prefixes

            batch.media_prefixes = load_prefixes(self.session)
        if batch.pipeline.spec.method == "semantic" and batch.pipeline.metered:
            self._reserve_sentences(batch)

    def _reserve_sentences(self, batch: Batch) -> None:
        """Reserve the sentences that the chunker will embed, or requeue the batch.

        The estimate counts as spent.
        """
        contents = [document.content for document in batch.found if isinstance(document.content, str)]
        if not contents:
            return
        if not self.embed.reserve_at_once(batch, sum(map(likely_tokens, contents))):
            batch.found = []

    def chunk(self, batch: Batch, check_interrupts: Callable[[], None]) -> None:
        """Repair and chunk what was read.

        Touches no table: the resident worker holds no transaction meanwhile.
        """
        with batch.meter.stage(Stage.CHUNK):
            if batch.pipeline.modality != "text":
                # Loaded by workers of such pipelines alone.
                from embedline.worker.stages.media import chunk_media

                chunk_media(self.session, batch, check_interrupts)
            elif any(document.content is not None for document in batch.found):
                self._chunk_documents(batch, check_interrupts)
            if batch.readability is not None:
                mark_unreadable(batch.found, batch.readability, check_interrupts)

    def _chunk_documents(self, batch: Batch, check_interrupts: Callable[[], None]) -> None:
        chunker = self._chunker(batch, batch.pipeline.chunk_set)
        others = {chunk_set.number: self._chunker(batch, chunk_set) for chunk_set in batch.pipeline.other_sets}
        for document in batch.found:
            if isinstance(document.content, str):
                try:
                    text = repair_text(document.content)
                    document.chunks = chunker(text, check_interrupts, document.prefix)
                    for number, other in others.items():
                        document.other_chunks[number] = other(text, check_interrupts, document.prefix)
                except (UnusableText, ProviderError) as error:
                    document.problem = error
                document.content = None

    def submit(self, batch: Batch) -> None:
        """Reuse known vectors, and reserve the requests for the other chunks.

        Texts without anything to embed are given up.
        """
        if batch.pipeline.is_reference:
            from embedline.worker.stages.fetch import settle_problems

            settle_problems(batch)
        problems = [document for document in batch.found if document.problem is not None]
        unusable = [document for document in problems if isinstance(document.problem, UnusableText)]
        batch.quarantine([dead_letter(document, "validate", document.problem) for document in unusable])
        for document in problems:
            if isinstance(document.problem, ProviderError):
                # The chunker asks the model where the meaning changes: a failure there is one of the model.
                self.failures.judge_chunker(batch, document, document.problem)
        sound = [document for document in batch.found if document.problem is None]
        batch.found = []
        left = ledger.tokens_left(self.session, batch.pipeline) if batch.pipeline.metered else None
        sound, known = self._cut_long_texts(batch, sound)
        if batch.pipeline.version.model.config.provider == "openai":
            sound = self.defer.hold(batch, sound, known)
        wanted = {chunk.digest for document in sound for chunk in document.chunks} - known.keys()
        trial = request_size.size_to_try(self.session, batch.pipeline.version.model, len(wanted))
        batch.units += pack(batch.pipeline, sound, known, left, trial)
        texts = sum(len(request.texts) for request in batch.requests)
        batch.vector_bytes = vector_memory(batch.pipeline, texts)
        self.embed.grant(batch)

    def _chunker(self, batch: Batch, chunk_set: ChunkSet) -> Chunker:
        pipeline = batch.pipeline
        cache: dict[object, Chunker] = self.session.cache.setdefault("embedline.chunkers", {})
        # Semantic chunks are cut where the serving version's model sees the meaning change.
        key = (chunk_set, pipeline.version.version_id if chunk_set.spec.method == "semantic" else None)
        if key not in cache:
            tokenizer = self.session.scalar(
                "SELECT tokenizer FROM embedline.chunk_set WHERE chunk_set_id = $1", ["bigint"], chunk_set.chunk_set_id
            )
            # The sentences' embedder is found at each use: the session's own may have been replaced.
            cache[key] = make_chunker(chunk_set.spec, tokenizer, sentence_embedder(self.session, pipeline.version))
        return cache[key]

    def _readability(self, batch: Batch) -> Readability | None:
        """Return the check of the batch's chunks, as the setting is now."""
        if batch.pipeline.modality != "text":
            return None
        model_id = batch.pipeline.version.model.model_id
        cache: dict[int, str | None] = self.session.cache.setdefault("embedline.tokenizers", {})
        if model_id not in cache:
            query = "SELECT tokenizer FROM embedline.model WHERE model_id = $1"
            cache[model_id] = self.session.scalar(query, ["bigint"], model_id)
        tokenizer = cache[model_id]
        return None if tokenizer is None else readability(tokenizer, load_settings(self.session).unknown_token_share)

    def _cut_long_texts(self, batch: Batch, found: list[Document]) -> tuple[list[Document], dict[bytes, Vector]]:
        """Return the documents and the known vectors of their chunks.

        Cut unknown chunks that would be refused as too long. Known chunks stay whole, so that an edit elsewhere in a
        document changes none of its chunks. A chunk that is given up needs no vector, so no provider is asked for it.
        """
        known = batch.source.known_vectors(found)
        known |= {digest: NO_VECTOR for document in found for digest in document.unreadable}
        limit = batch.pipeline.version.model.text_size_refused
        while limit is not None and batch.source.may_cut:
            cut = {}
            for place, document in enumerate(found):
                unknown = (chunk for chunk in document.chunks if chunk.digest not in known)
                long = {c.digest for c in unknown if estimated_size(c.embedded_text) >= limit and halves(c)}
                if long:
                    cut[place] = replace(document, chunks=cut_chunks(document.chunks, long) or document.chunks)
            if not cut:
                break
            found = [cut.get(place, document) for place, document in enumerate(found)]
            known |= batch.source.known_vectors(list(cut.values()))
        return found, known


def _fatal_letter(row: ClaimedRow) -> DeadLetter:
    message = f"the worker died {row.crash_count} times while it had this row"
    return DeadLetter(row, "claim", "EL020", message, None)
