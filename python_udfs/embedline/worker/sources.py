"""What a batch's rows are: source rows on their way to chunks and vectors, or chunks on their way to another version's vectors.

The engine moves both through the same requests, retries, halvings, budgets and breakers; here is what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from embedline.catalog import health, keys
from embedline.chunking import Chunk
from embedline.documents import documents
from embedline.documents.documents import Document, Vector, WriteResult
from embedline.postgres.session import Session
from embedline.queue import backfill, chunk_queue, dead_letters, inbox, outbox
from embedline.queue.dead_letters import DeadLetter
from embedline.queue.outbox import ClaimedRow
from embedline.search.exact_rows import keep_late

if TYPE_CHECKING:
    from embedline.catalog.load import Pipeline
    from embedline.worker.batch import Batch

_MAX_ERROR_CHARACTERS = 500


class Work(Protocol):
    """The storage of one kind of batch."""

    def write(
        self, session: Session, batch: Batch, sound: Sequence[Document], known: Mapping[bytes, Vector]
    ) -> WriteResult:
        """Write vectors of documents whose content has not changed."""

    def settle(self, session: Session, batch: Batch, rows: Sequence[ClaimedRow], worker_id: int | None) -> None:
        """Take rows that are through out of the queue."""

    def give_back(
        self,
        session: Session,
        batch: Batch,
        rows: Sequence[ClaimedRow],
        delay: float,
        *,
        charged: bool,
        error: str | None,
    ) -> None:
        """Put rows back into the queue, to be tried again after a delay."""

    def bury(self, session: Session, batch: Batch, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Write dead letters; return those whose rows another session has in hand, which are left as they are."""

    def note_error(self, session: Session, batch: Batch, message: str) -> None:
        """Show an error where the people on call look."""

    def forget_error(self, session: Session, batch: Batch) -> None:
        """Show the error no more that was there when the batch was claimed."""

    def finish(self, session: Session, batch: Batch, worker_id: int | None) -> None:
        """Give the claim back once all of its rows are settled."""

    def release(self, session: Session, batch: Batch, worker_id: int) -> None:
        """Give the claim back with whatever is not settled; the tries are not counted."""


class SourceWork:
    """Source rows, from the inbox, the outbox, or a range of the backfill."""

    def write(
        self, session: Session, batch: Batch, sound: Sequence[Document], known: Mapping[bytes, Vector]
    ) -> WriteResult:
        """Write chunks, vectors and state."""
        of_backfill = batch.claimed_range is not None
        return documents.write_documents(session, batch.pipeline, sound, known, of_backfill=of_backfill)

    def settle(self, session: Session, batch: Batch, rows: Sequence[ClaimedRow], worker_id: int | None) -> None:
        """Take rows that are through out of the outbox; those of an inbox claim or a range go with it."""
        outbox.finish(session, batch.pipeline, rows, worker_id)

    def give_back(
        self,
        session: Session,
        batch: Batch,
        rows: Sequence[ClaimedRow],
        delay: float,
        *,
        charged: bool,
        error: str | None,
    ) -> None:
        """Put rows into the outbox."""
        of_backfill = batch.claimed_range is not None
        outbox.give_back(
            session, batch.pipeline, rows, delay, charged=charged, error=error, of_backfill=of_backfill,
            enqueued_at=batch.enqueued_at,
        )  # fmt: skip

    def bury(self, session: Session, batch: Batch, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Write dead letters of rows whose documents can be had."""
        wanted = [Document(letter.row, letter.content_hash) for letter in letters]
        # A row that cannot be read, or ends its worker, is given up without another look at it.
        were_read = [i for i, letter in enumerate(letters) if letter.stage not in ("claim", "read")]
        had = documents.take_documents(session, batch.pipeline, wanted, were_read)
        given_up = [letter for i, letter in enumerate(letters) if i in had]
        if given_up:
            dead_letters.bury(session, batch.pipeline, given_up)
        return [letter for i, letter in enumerate(letters) if i not in had]

    def note_error(self, session: Session, batch: Batch, message: str) -> None:
        """Show the error in embedline.status."""
        health.note_error(session, batch.pipeline, message)

    def forget_error(self, session: Session, batch: Batch) -> None:
        """Take it out of embedline.status."""
        health.forget_error(session, batch.pipeline)

    def finish(self, session: Session, batch: Batch, worker_id: int | None) -> None:
        """Note the range as read, or take the inbox claim away."""
        if batch.claimed_range is not None:
            backfill.finish_range(session, batch.claimed_range, worker_id)
        if batch.claim_id is not None:
            inbox.finish_claim(session, batch.pipeline, batch.claim_id, worker_id)

    def release(self, session: Session, batch: Batch, worker_id: int) -> None:
        """Give back the claim, marks and range."""
        if batch.claim_id is not None:
            inbox.break_claims(session, batch.pipeline, "claim_id = ANY ($1)", [batch.claim_id], crash_count=0)
        ids = [outbox_id for row in batch.rows for outbox_id in row.outbox_ids]
        if ids:
            outbox.release(session, batch.pipeline, worker_id, ids)
        if batch.claimed_range is not None:
            backfill.release(session, batch.pipeline, worker_id, batch.claimed_range.range_id)


class VersionWork:
    """Chunks, from the queue of a version. A chunk never changes its content: it is there or it is gone."""

    def read(self, session: Session, batch: Batch, rows: Sequence[ClaimedRow], max_bytes: int) -> None:
        """Turn chunks that still lack a vector into documents of one chunk each; what is gone or done needs nothing.

        Contents of up to `max_bytes` in all; what is beyond goes back to the queue, but for the first.
        """
        lane = batch.pipeline
        found = session.query(
            f"""
            SELECT r.* FROM (
                SELECT w.ordinality, c.content, c.prefix, uuid_send(c.content_hash) AS digest,
                    coalesce(sum(octet_length(c.content)::bigint) OVER (
                        ORDER BY w.ordinality ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
                FROM unnest($1::bigint[]) WITH ORDINALITY AS w (chunk_id, ordinality)
                JOIN {lane.chunk} AS c ON c.chunk_id = w.chunk_id
                WHERE NOT EXISTS (SELECT FROM {lane.vectors} AS v WHERE v.chunk_id = c.chunk_id)
            ) AS r
            """,
            ["text[]"],
            [row.key[0] for row in rows],
        )
        deferred = [rows[row["ordinality"] - 1] for row in found if row["before"] >= max_bytes]
        for row in found:
            if row["before"] < max_bytes:
                content, prefix = row["content"], row["prefix"] or ""
                chunk = Chunk(0, 0, len(content), content, bytes(row["digest"]), prefix)
                batch.found.append(Document(rows[row["ordinality"] - 1], chunks=[chunk]))
                batch.content_bytes += len(content)
        batch.deferred_count = len(deferred)
        if deferred:
            self.give_back(session, batch, deferred, 0.0, charged=False, error=None)

    def write(
        self, session: Session, batch: Batch, sound: Sequence[Document], known: Mapping[bytes, Vector]
    ) -> WriteResult:
        """Write the vectors of chunks that are still there and lack one.

        The chunks are locked first, so that no other session writes the same; SKIP LOCKED: an application may be deleting
        them. What depends on the versions' state is the chunks alone, so a cutover is no reason to wait.
        """
        lane = batch.pipeline
        ids = [int(document.key[0]) for document in sound]
        fingerprint = self._held_fingerprint(session, lane)
        if fingerprint is None:
            # Dropped; a later version may have its number, and the table of that name another model's vectors.
            return WriteResult(absent=list(range(len(sound))))
        if fingerprint != lane.version.fingerprint:
            # alter_model has set another endpoint for a version without vectors: these are of the one before.
            return WriteResult(busy=list(range(len(sound))))
        locked = self._ids(
            session,
            f"SELECT chunk_id FROM {lane.chunk} WHERE chunk_id = ANY ($1) ORDER BY 1 FOR NO KEY UPDATE SKIP LOCKED",
            ids,
        )
        done = self._ids(session, f"SELECT chunk_id FROM {lane.vectors} WHERE chunk_id = ANY ($1)", ids)
        others = [chunk_id for chunk_id in ids if chunk_id not in locked]
        held = self._ids(session, f"SELECT chunk_id FROM {lane.chunk} WHERE chunk_id = ANY ($1)", others)
        result = WriteResult()
        for index, chunk_id in enumerate(ids):
            if chunk_id in done or not (chunk_id in locked or chunk_id in held):
                result.absent.append(index)
            elif chunk_id in locked and sound[index].chunks[0].digest in known:
                result.written.append(index)
            else:
                result.busy.append(index)
        if result.written:
            vectors = [known[sound[i].chunks[0].digest] for i in result.written]
            written = [ids[i] for i in result.written]
            documents.copy_vectors(session, lane, np.asarray(written, dtype=np.int64), documents.stacked(vectors))
            keep_late(session, lane, written)
        return result

    @staticmethod
    def _held_fingerprint(session: Session, lane: Pipeline) -> str | None:
        """Keep the version from being dropped to the end of the transaction, return its fingerprint; None if it is gone."""
        query = "SELECT fingerprint FROM embedline.version WHERE version_id = $1 FOR KEY SHARE"
        found: str | None = session.scalar(query, ["bigint"], lane.version.version_id)
        return found

    @staticmethod
    def _ids(session: Session, query: str, ids: Sequence[int]) -> set[int]:
        if not ids:
            return set()
        # One array: a row for each would be a dictionary for each.
        return set(session.scalar(f"SELECT array(SELECT chunk_id FROM ({query}) AS q)", ["bigint[]"], list(ids)))

    def settle(self, session: Session, batch: Batch, rows: Sequence[ClaimedRow], worker_id: int | None) -> None:
        """Do nothing: the lists that hold the rows go with the claim."""

    def give_back(
        self,
        session: Session,
        batch: Batch,
        rows: Sequence[ClaimedRow],
        delay: float,
        *,
        charged: bool,
        error: str | None,
    ) -> None:
        """Put chunks into a list of their own."""
        chunk_queue.give_back(
            session, batch.pipeline, rows, delay, charged=charged, error=error, of_backfill=batch.of_backfill
        )

    def bury(self, session: Session, batch: Batch, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Write dead letters of the version; those of chunks that are gone are nothing to keep."""
        lane = batch.pipeline
        session.query(
            f"""
            INSERT INTO embedline.version_dead_letter (version_id, chunk_id, key, stage, error_code, message, attempts)
            SELECT $1, c.chunk_id, {keys.as_json(lane, "c")}, l.stage, l.error_code, l.message, l.attempts
            FROM unnest($2::bigint[], $3, $4, $5, $6) AS l (chunk_id, stage, error_code, message, attempts)
            JOIN {lane.chunk} AS c ON c.chunk_id = l.chunk_id
            ON CONFLICT (version_id, chunk_id) DO UPDATE SET stage = excluded.stage, error_code = excluded.error_code,
                message = excluded.message, attempts = excluded.attempts, created_at = now(), accepted_by = NULL
            """,
            ["bigint", "text[]", "text[]", "text[]", "text[]", "integer[]"],
            lane.version.version_id,
            [letter.row.key[0] for letter in letters],
            [letter.stage for letter in letters],
            [letter.error_code for letter in letters],
            [letter.message[:_MAX_ERROR_CHARACTERS] for letter in letters],
            [letter.row.attempts for letter in letters],
        )
        self.note_error(session, batch, f"chunk {letters[0].row.key[0]}: {letters[0].message}")
        return []

    def note_error(self, session: Session, batch: Batch, message: str) -> None:
        """Show the error in embedline.versions: it is none of the serving version's."""
        session.query(
            "UPDATE embedline.version SET last_error = $2 WHERE version_id = $1",
            ["bigint", "text"],
            batch.pipeline.version.version_id,
            message[:_MAX_ERROR_CHARACTERS],
        )

    def forget_error(self, session: Session, batch: Batch) -> None:
        """Take it out of embedline.versions, unless another has come since; waits for nobody."""
        session.query(
            """
            UPDATE embedline.version SET last_error = NULL WHERE version_id IN (
                SELECT version_id FROM embedline.version WHERE version_id = $1 AND last_error = $2
                FOR NO KEY UPDATE SKIP LOCKED)
            """,
            ["bigint", "text"],
            batch.pipeline.version.version_id,
            batch.pipeline.last_error,
        )

    def finish(self, session: Session, batch: Batch, worker_id: int | None) -> None:
        """Take the lists away."""
        chunk_queue.finish(session, batch.queue_ids, worker_id)

    def release(self, session: Session, batch: Batch, worker_id: int) -> None:
        """Free the lists."""
        chunk_queue.release(session, worker_id, batch.queue_ids)


SOURCE_WORK = SourceWork()
VERSION_WORK = VersionWork()


def work_of(batch: Batch) -> Work:
    """Return the storage of a batch."""
    return VERSION_WORK if batch.pipeline.is_lane else SOURCE_WORK
