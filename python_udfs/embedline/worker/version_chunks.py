"""The chunks that a version lacks, as a WorkSource.

A chunk never changes its content: it is there or it is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from embedline.catalog import health, keys
from embedline.catalog.values import Pipeline, WorkKey
from embedline.chunking import Chunk
from embedline.documents.copy import copy_vectors, stacked
from embedline.documents.files import StoredFiles, read_files
from embedline.documents.read import can_hold_source
from embedline.documents.reuse import known_vectors
from embedline.documents.values import Document, Vector
from embedline.postgres.claims import Claims
from embedline.postgres.locks import live_workers
from embedline.postgres.session import Session
from embedline.queue import chunk_queue, provider_batches
from embedline.queue.claim import Claim
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow, Retry
from embedline.queue.signals import Asked
from embedline.search.exact_rows import keep_late
from embedline.worker.unread import fail_unread
from embedline.worker.work_source import BUSY_SECONDS, Kind, Reading, Waiting

# The part of its pipeline's share of the workers that a version beside the serving one has.
_WEIGHT = 0.5


@dataclass(eq=False)
class VersionChunks:
    """Chunks on their way to the vectors of one version."""

    session: Session
    claims: Claims
    pipeline: Pipeline
    # The source of texts is not read, so its row-level security does not matter; writers leave no signals.
    is_hidden: bool = False
    has_signals: bool = False
    # The chunks are those of other versions, too.
    may_cut: bool = False

    @property
    def key(self) -> WorkKey:
        """Return the version's key."""
        return WorkKey("version", self.pipeline.version.version_id)

    @property
    def weight(self) -> float:
        """Return half of the pipeline's weight."""
        return self.pipeline.weight * _WEIGHT

    def can_claim(self) -> bool:
        """Return True if chunks can be claimed now.

        That is always so if the source is not read, because a TRUNCATE locks the chunks last.
        """
        return self.pipeline.modality == "text" or can_hold_source(self.session, self.pipeline)

    def has_work(self, live: Sequence[int]) -> bool:
        """Return True: to peek locks no table of the pipeline."""
        return True

    def peek(self, live: Sequence[int]) -> Waiting:
        """Return what the version's queue holds."""
        return Waiting(**chunk_queue.peek(self.session, self.pipeline, list(live)))

    def claim(self, kind: Kind, limit: int, waiting: Waiting) -> Claim | None:
        """Claim lists that are due, the front of a range, or suspected lists."""
        if kind is Kind.BACKFILL:
            return chunk_queue.claim_range(self.session, self.pipeline, limit, self.claims)
        if kind is Kind.CHANGES:
            return chunk_queue.claim_lists(self.session, self.pipeline, limit, self.claims)
        crashes = chunk_queue.most_crashes(self.session, self.pipeline)
        claim = chunk_queue.claim_lists(self.session, self.pipeline, limit, self.claims, crash_count=crashes)
        if claim is not None:
            claim.is_suspect = True
        return claim

    def reclaim_from_dead_workers(self) -> None:
        """Free the lists of workers that are gone."""
        # Who is alive is asked after the claims were seen: a worker that began in between is not taken for dead.
        chunk_queue.reclaim_from_dead_workers(self.session, self.pipeline, live_workers(self.session))

    def remove_deleted(self) -> bool:
        """Return False: the serving version's work removes what deleted rows leave."""
        return False

    def read(self, claim: Claim, rows: Sequence[ClaimedRow], max_bytes: int) -> Reading:
        """Turn chunks that still lack a vector into documents of one chunk each.

        The others need nothing. Contents beyond `max_bytes` go back to the queue, but for the first.
        """
        found = self.session.query(
            f"""
            SELECT r.* FROM (
                SELECT w.ordinality, c.content, c.prefix, uuid_send(c.content_hash) AS digest,
                    coalesce(sum(octet_length(c.content)::bigint) OVER (
                        ORDER BY w.ordinality ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
                FROM unnest($1::bigint[]) WITH ORDINALITY AS w (chunk_id, ordinality)
                JOIN {self.pipeline.chunk} AS c ON c.chunk_id = w.chunk_id
                WHERE NOT EXISTS (SELECT FROM {self.pipeline.vectors} AS v WHERE v.chunk_id = c.chunk_id)
            ) AS r
            """,
            ["text[]"],
            [row.key[0] for row in rows],
        )
        reading = Reading()
        chunks: dict[int, Chunk] = {}
        for row in found:
            if row["before"] < max_bytes:
                content, prefix = row["content"], row["prefix"] or ""
                chunks[row["ordinality"] - 1] = Chunk(0, 0, len(content), content, bytes(row["digest"]), prefix)
                reading.content_bytes += len(content)
        left = {row["ordinality"] - 1 for row in found if row["before"] >= max_bytes}
        if self.pipeline.modality != "text":
            files = self._read_files(claim, rows, list(chunks), max_bytes)
            chunks = {place: chunks[place]._replace(media=part) for place, part in files.parts.items()}
            reading.content_bytes += sum(len(part.data) for part in files.parts.values())
            left |= files.left
        reading.documents += [Document(rows[place], chunks=[chunk]) for place, chunk in chunks.items()]
        deferred = [rows[place] for place in sorted(left)]
        reading.deferred_count = len(deferred)
        if deferred:
            self.requeue(claim, deferred, 0.0, charged=False, error=None)
        return reading

    def _read_files(
        self, claim: Claim, rows: Sequence[ClaimedRow], places: Sequence[int], max_bytes: int
    ) -> StoredFiles:
        """Return the files of chunks by place of the row.

        A chunk whose row has another file by now is left out: it is replaced soon, and the new one is queued. Those whose
        row cannot be read are given up or requeued.
        """
        read = read_files(self.session, self.pipeline, [rows[place].key[0] for place in places], max_bytes)
        fail_unread(self, claim, [(rows[places[index]], error) for index, error in read.failed.items()])
        parts = {places[index]: part for index, part in read.parts.items()}
        return StoredFiles(parts, {places[index] for index in read.left})

    def known_vectors(self, documents: Sequence[Document]) -> dict[bytes, Vector]:
        """Return the vectors that are stored of the same chunks anywhere in the pipeline."""
        return known_vectors(self.session, self.pipeline, documents)

    def write(self, claim: Claim, documents: Sequence[Document], vectors: Mapping[bytes, Vector]) -> list[int]:
        """Write the vectors of chunks that are still there and lack one.

        The chunks are locked first, so that no other session writes the same; SKIP LOCKED, because an application may
        be deleting them. Only the chunks depend on the versions' state, so a cutover is no reason to wait.
        """
        ids = [int(document.key[0]) for document in documents]
        fingerprint = self._hold_fingerprint()
        if fingerprint is None:
            # Dropped. A later version may have its number, and the table of that name the vectors of another model.
            return []
        if fingerprint != self.pipeline.version.fingerprint:
            # alter_model has set another endpoint for a version without vectors: these come from the former one.
            self.requeue(claim, [document.row for document in documents], BUSY_SECONDS, charged=False, error=None)
            return []
        chunk, table = self.pipeline.chunk, self.pipeline.vectors
        locked = self._ids(
            f"SELECT chunk_id FROM {chunk} WHERE chunk_id = ANY ($1) ORDER BY 1 FOR NO KEY UPDATE SKIP LOCKED", ids
        )
        done = self._ids(f"SELECT chunk_id FROM {table} WHERE chunk_id = ANY ($1)", ids)
        others = [chunk_id for chunk_id in ids if chunk_id not in locked]
        held = self._ids(f"SELECT chunk_id FROM {chunk} WHERE chunk_id = ANY ($1)", others)
        written: list[int] = []
        busy: list[ClaimedRow] = []
        for index, chunk_id in enumerate(ids):
            if chunk_id in done or not (chunk_id in locked or chunk_id in held):
                continue
            if chunk_id in locked and documents[index].chunks[0].digest in vectors:
                written.append(index)
            else:
                busy.append(documents[index].row)
        if written:
            matrix = stacked([vectors[documents[i].chunks[0].digest] for i in written])
            written_ids = [ids[i] for i in written]
            copy_vectors(self.session, self.pipeline, np.asarray(written_ids, dtype=np.int64), matrix)
            keep_late(self.session, self.pipeline, written_ids)
            provider_batches.forget(self.session, self.pipeline, {documents[i].chunks[0].digest for i in written})
        if busy:
            self.requeue(claim, busy, BUSY_SECONDS, charged=False, error=None)
        return written

    def _hold_fingerprint(self) -> str | None:
        """Keep the version from being dropped to the end of the transaction.

        Return its fingerprint, None if it is gone.
        """
        query = "SELECT fingerprint FROM embedline.version WHERE version_id = $1 FOR KEY SHARE"
        found: str | None = self.session.scalar(query, ["bigint"], self.pipeline.version.version_id)
        return found

    def _ids(self, query: str, ids: Sequence[int]) -> set[int]:
        if not ids:
            return set()
        # One array: a row for each id would be a dictionary for each.
        return set(self.session.scalar(f"SELECT array(SELECT chunk_id FROM ({query}) AS q)", ["bigint[]"], list(ids)))

    def settle(self, rows: Sequence[ClaimedRow]) -> None:
        """Do nothing: the lists that hold the rows end with the claim."""

    def requeue(
        self, claim: Claim, rows: Sequence[ClaimedRow], delay: float, *, charged: bool, error: str | None
    ) -> list[int]:
        """Put chunks into a list of their own."""
        return chunk_queue.requeue(self.session, self.pipeline, rows, Retry(delay, charged, error, claim.of_backfill))

    def quarantine(self, claim: Claim, letters: Sequence[DeadLetter]) -> None:
        """Write dead letters of the version, but for chunks that are gone."""
        self.session.query(
            f"""
            INSERT INTO embedline.version_dead_letter (version_id, chunk_id, key, stage, error_code, message, attempts)
            SELECT $1, c.chunk_id, {keys.as_json(self.pipeline, "c")}, l.stage, l.error_code, l.message, l.attempts
            FROM unnest($2::bigint[], $3, $4, $5, $6) AS l (chunk_id, stage, error_code, message, attempts)
            JOIN {self.pipeline.chunk} AS c ON c.chunk_id = l.chunk_id
            ON CONFLICT (version_id, chunk_id) DO UPDATE SET stage = excluded.stage, error_code = excluded.error_code,
                message = excluded.message, attempts = excluded.attempts, created_at = now(), accepted_by = NULL
            """,
            ["bigint", "text[]", "text[]", "text[]", "text[]", "integer[]"],
            self.pipeline.version.version_id,
            [letter.row.key[0] for letter in letters],
            [letter.stage for letter in letters],
            [letter.error_code for letter in letters],
            [letter.message[: health.MAX_ERROR_CHARACTERS] for letter in letters],
            [letter.row.attempts for letter in letters],
        )
        self.record_error(f"chunk {letters[0].row.key[0]}: {letters[0].message}")

    def finish(self, claim: Claim) -> None:
        """Remove the lists."""
        chunk_queue.finish(self.session, claim.queue_ids, self.claims)

    def release(self, claim: Claim) -> None:
        """Free the lists."""
        if self.claims.worker_id is not None:
            chunk_queue.release(self.session, self.claims.worker_id, claim.queue_ids)

    def close(self) -> bool:
        """Mark the version complete if no chunk is missing.

        Return True if some were queued.
        """
        return chunk_queue.close(self.session, self.pipeline)

    def clear_signals(self, asked: Asked) -> None:
        """Do nothing: this queue has no signals."""

    def maintain(self) -> None:
        """Do nothing: the serving version's work maintains the pipeline's indexes."""

    def record_error(self, message: str) -> None:
        """Show the error in embedline.versions."""
        health.record_version_error(self.session, self.pipeline, message)

    def forget_error(self) -> None:
        """Remove the error from embedline.versions."""
        health.forget_version_error(self.session, self.pipeline)

    def record_fault(self, message: str) -> None:
        """Show the fault in embedline.versions."""
        health.record_version_fault(self.session, self.pipeline, message)

    def hidden_reason(self) -> str:
        """Return nothing: the source is not read."""
        return ""

    def likely_row_bytes(self) -> float | None:
        """Return None: the size of source rows says nothing about chunks."""
        return None
