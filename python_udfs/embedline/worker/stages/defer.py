"""Leave texts to the provider's batch endpoint, and hold the rows that need them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from embedline.core.request_tokens import likely_tokens
from embedline.documents.reuse import late_vectors
from embedline.documents.values import Document, Vector
from embedline.postgres.session import Session
from embedline.providers.batches import LINE_BYTES, MOST_FILE_BYTES, MOST_TEXTS
from embedline.queue import provider_batches
from embedline.queue.provider_batches import HOLD_SECONDS, MOST_TRIES, NewText, TextState
from embedline.worker.batch import Batch


@dataclass
class Defer:
    """Decides which documents wait for a batch.

    Only a resident worker begins batches: a caller of embed_pending wants its rows now, and a remote worker has a model of
    its own. A text that is in a batch already waits for it in any case, so that it is not paid for twice.
    """

    session: Session
    begins_batches: bool

    def hold(self, batch: Batch, documents: list[Document], known: dict[bytes, Vector]) -> list[Document]:
        """Hold the documents that wait for a batch; return the others.

        Vectors that have come since the known ones were read become known: answers, and answers that are stored by now.
        """
        version = batch.pipeline.version
        # The files of batches hold texts alone.
        is_wanted = self.begins_batches and batch.pipeline.modality == "text"
        is_wanted = is_wanted and version.model.config.options.get("batch_api") is True
        if version.model.config.provider != "openai" or not documents:
            return documents
        if not is_wanted and not provider_batches.has_batches(self.session, version.version_id):
            return documents
        lacking = [[c for c in document.chunks if c.digest not in known] for document in documents]
        digests = {chunk.digest for chunks in lacking for chunk in chunks}
        states = provider_batches.states(self.session, version.version_id, digests) if digests else {}
        asked = [digest for digest in digests if digest not in states or states[digest].state != "pending"]
        known |= late_vectors(self.session, batch.pipeline, asked)
        lacking = [[chunk for chunk in chunks if chunk.digest not in known] for chunks in lacking]
        held = defaultdict[int, list[Document]](list)
        collected: list[tuple[Document, list[NewText]]] = []
        rest: list[Document] = []
        for document, chunks in zip(documents, lacking, strict=True):
            found = [states[chunk.digest] for chunk in chunks if chunk.digest in states]
            pending = [state.batch_id for state in found if state.state == "pending"]
            if pending:
                held[max(pending)].append(document)
            elif chunks and is_wanted and _may_wait(batch, document, found):
                texts = {chunk.digest: chunk.embedded_text for chunk in chunks}
                collected.append((document, [_new_text(digest, text) for digest, text in texts.items()]))
            else:
                rest.append(document)
        rest += self._collect(batch, collected, held)
        of_version = batch.source.key.kind == "version"
        for batch_id, members in held.items():
            rows = [document.row for document in members]
            if provider_batches.count_rows(self.session, batch_id, len(rows)):
                ids = batch.source.requeue(batch.claim, rows, HOLD_SECONDS, charged=False, error=None)
                provider_batches.hold(self.session, batch.pipeline, batch_id, ids, of_version=of_version)
            else:
                # It has made its rows due already, and would not know of these.
                batch.source.requeue(batch.claim, rows, 0.0, charged=False, error=None)
        return rest

    def _collect(
        self,
        batch: Batch,
        collected: Sequence[tuple[Document, list[NewText]]],
        held: defaultdict[int, list[Document]],
    ) -> list[Document]:
        """Put the texts of documents into batches.

        Return the documents that are too large for one. All texts of a document are in one batch.
        """
        if not collected:
            return []
        most = self._most_texts(batch)
        current, count, size, too_large = 0, most, 0, []
        if (found := provider_batches.collecting(self.session, batch.pipeline)) is not None:
            current, count, size = found
        added: dict[bytes, NewText] = {}
        for document, texts in collected:
            new = [text for text in texts if text.digest not in added]
            bytes_of = sum(text.size for text in new)
            if len(texts) > most or bytes_of > MOST_FILE_BYTES:
                too_large.append(document)
                continue
            if count + len(new) > most or size + bytes_of > MOST_FILE_BYTES:
                self._add(batch, current, added.values())
                current, count, size, added = provider_batches.begin(self.session, batch.pipeline), 0, 0, {}
                new, bytes_of = texts, sum(text.size for text in texts)
            added |= {text.digest: text for text in new}
            count, size = count + len(new), size + bytes_of
            held[current].append(document)
        self._add(batch, current, added.values())
        return too_large

    def _most_texts(self, batch: Batch) -> int:
        """Return the most texts of a batch.

        It is half of a number that was too many for the provider's limit of tokens.
        """
        _, _, refused = provider_batches.failures(self.session, batch.pipeline.version.model.model_id)
        return MOST_TEXTS if refused is None else max(1, min(MOST_TEXTS, refused // 2))

    def _add(self, batch: Batch, batch_id: int, texts: Collection[NewText]) -> None:
        if texts:
            ordered = sorted(texts, key=lambda text: text.digest)
            provider_batches.add_texts(self.session, batch.pipeline, batch_id, ordered)


def _may_wait(batch: Batch, document: Document, found: Sequence[TextState]) -> bool:
    """Return True if a document may wait for a batch.

    It is of a backfill or of a large change, or it was in a batch that has not answered it. What the provider refused in
    a batch goes to the ordinary endpoint, where it is found out whose fault that was.
    """
    if batch.claim.is_suspect or any(state.state == "refused" or state.tries >= MOST_TRIES for state in found):
        return False
    return batch.claim.of_backfill or document.row.may_wait or any(state.state == "unanswered" for state in found)


def _new_text(digest: bytes, text: str) -> NewText:
    size = len(json.dumps(text, ensure_ascii=False).encode()) + LINE_BYTES
    return NewText(digest, text, likely_tokens(text), size)
