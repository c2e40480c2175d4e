"""Write documents: chunks, vectors, and entries for other versions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from embedline.catalog.health import record_error
from embedline.catalog.keys import as_json, key_json
from embedline.catalog.values import ChunkSet, Pipeline
from embedline.chunking import Chunk
from embedline.documents.copy import copy_vectors, stacked
from embedline.documents.diff import Changes, apply, diff, stored_chunks
from embedline.documents.keys import place_documents, take_back, unlocked
from embedline.documents.read import hidden_marks, read_rows, show_again
from embedline.documents.readability import message_of
from embedline.documents.reuse import keep_answers, keep_vectors
from embedline.documents.values import Document, Vector, WriteResult
from embedline.errors import UnreadableText
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.queue import provider_batches
from embedline.queue.dead_letters import forget_dead_letters
from embedline.queue.outbox import Key, key_columns

# Most characters of a key that are shown before an error's text.
_SHOWN_KEY_CHARACTERS = 100


def write_documents(
    session: Session,
    pipeline: Pipeline,
    documents: Sequence[Document],
    known: Mapping[bytes, Vector],
    *,
    of_backfill: bool = False,
) -> WriteResult:
    """Write chunks, vectors and state of documents that are unchanged since the read.

    One transaction's work. The document rows are locked first, and only then is the source read again. So no other
    session can write a newer content between that read and this write. Source rows are locked KEY SHARE, so that a
    delete in progress is seen.

    Both locks use SKIP LOCKED, so a worker waits for no application. It does not wait for a change of the pipeline's
    versions either, which takes milliseconds.
    """
    result = WriteResult()
    fresh, free = place_documents(session, pipeline, documents)
    marks = hidden_marks(session, pipeline, [document.key for document in documents])
    ready = _unchanged(session, pipeline, documents, fresh | free, result)
    # Of new documents, too, because a chunk whose document row was lost must not stay beside the new one.
    stored = stored_chunks(session, pipeline, documents, ready, pipeline.chunk_set)
    changes, replaced = Changes(), list[int]()
    for index in ready:
        document = documents[index]
        change = diff(stored[index], document.chunks) if stored[index] else ([], [], document.chunks)
        if any(chunk.digest not in known for chunk in change[2]):
            # Another session deleted the chunk that was to stay or to lend its vector, so the row is tried again.
            result.busy.append(index)
            continue
        changes.add(document.key, change)
        result.written.append(index)
        if index in marks or pipeline.modality != "text":
            # A file with another caption keeps its vectors.
            replaced += change[0]
    keep_vectors(session, pipeline, pipeline.chunk_set, replaced)
    # Of a text that was changed some chunks may be the same, if it has several. Without any place, the recipe or the
    # endpoint was altered meanwhile, and these are not its vectors.
    later = [documents[i] for i in result.busy] + [documents[i] for i in result.stale if len(documents[i].chunks) > 1]
    if not (fresh or free):
        later = []
    keep_answers(session, pipeline, [chunk for document in later for chunk in document.chunks], known)
    ids = apply(session, pipeline, pipeline.chunk_set, changes)
    if ids.size:
        _write_vectors(session, pipeline, ids, [known[chunk.digest] for _, chunk in changes.added])
        _give_up_chunks(session, pipeline, ids, changes.added, [documents[i] for i in result.written])
        enqueue_chunks(session, pipeline.other_versions(pipeline.chunk_set.number), ids, of_backfill=of_backfill)
    for chunk_set in pipeline.other_sets:
        ids = _write_other_set(session, pipeline, chunk_set, documents, result.written, set(marks))
        if ids.size:
            enqueue_chunks(session, pipeline.other_versions(chunk_set.number), ids, of_backfill=of_backfill)
    written = set(result.written)
    _update_state(session, pipeline, [documents[i] for i in result.written if i in free])
    take_back(session, pipeline, [documents[i] for i in sorted(fresh - written)])
    if written:
        forget_dead_letters(session, pipeline, [documents[i].key for i in result.written])
        provider_batches.forget(session, pipeline, {c.digest for i in written for c in documents[i].chunks})
        show_again(session, pipeline, marks, written)
    return result


def _write_vectors(session: Session, pipeline: Pipeline, ids: npt.NDArray[np.int64], found: Sequence[Vector]) -> None:
    """Write the vectors of new chunks, except those that have none."""
    has_vector = np.fromiter((vector.size > 0 for vector in found), dtype=bool, count=len(found))
    if has_vector.any():
        copy_vectors(session, pipeline, ids[has_vector], stacked([vector for vector in found if vector.size]))


def _give_up_chunks(
    session: Session,
    pipeline: Pipeline,
    ids: npt.NDArray[np.int64],
    added: Sequence[tuple[Key, Chunk]],
    written: Sequence[Document],
) -> None:
    """Write dead letters for new chunks that the serving version's model cannot read.

    The row's other chunks are embedded. These chunks stay, because a version of another model may read them. They need
    no one's consent for an index or a cutover, because the setting has decided.
    """
    unreadable = {digest: share for document in written for digest, share in document.unreadable.items()}
    given_up = [
        (int(ids[i]), unreadable[chunk.digest]) for i, (_, chunk) in enumerate(added) if chunk.digest in unreadable
    ]
    if not given_up:
        return
    session.query(
        f"""
        INSERT INTO embedline.version_dead_letter (version_id, chunk_id, key, stage, error_code, message, attempts, accepted_by)
        SELECT $1, c.chunk_id, {as_json(pipeline, "c")}, 'validate', $4, l.message, 1, 'unknown_token_share'
        FROM unnest($2, $3) AS l (chunk_id, message) JOIN {pipeline.chunk} AS c ON c.chunk_id = l.chunk_id
        """,
        ["bigint", "bigint[]", "text[]", "text"],
        pipeline.version.version_id,
        [chunk_id for chunk_id, _ in given_up],
        [message_of(share) for _, share in given_up],
        UnreadableText.sqlstate,
    )
    first = next(document for document in written if document.unreadable)
    record_error(
        session,
        pipeline,
        f"{key_json(pipeline, first.key)[:_SHOWN_KEY_CHARACTERS]}: {len(first.unreadable)} of"
        f" {len(first.chunks)} chunks: {message_of(min(first.unreadable.values()))}",
    )


def _write_other_set(
    session: Session,
    pipeline: Pipeline,
    chunk_set: ChunkSet,
    documents: Sequence[Document],
    written: Sequence[int],
    marked: Collection[int],
) -> npt.NDArray[np.int64]:
    """Write the documents' chunks of another set; return the ids of new ones.

    The versions that embed them do so later.
    """
    stored = stored_chunks(session, pipeline, documents, written, chunk_set)
    changes, replaced = Changes(), list[int]()
    for index in written:
        document = documents[index]
        change = diff(stored[index], document.other_chunks.get(chunk_set.number, []))
        changes.add(document.key, change)
        if index in marked or pipeline.modality != "text":
            replaced += change[0]
    keep_vectors(session, pipeline, chunk_set, replaced)
    return apply(session, pipeline, chunk_set, changes)


def enqueue_chunks(
    session: Session, version_ids: Iterable[int], chunk_ids: npt.NDArray[np.int64], *, of_backfill: bool
) -> None:
    """Tell versions about new chunks, in the transaction that writes these.

    No chunk is missed this way.
    """
    for version_id in version_ids:
        session.query(
            "INSERT INTO embedline.version_queue (version_id, chunk_ids, of_backfill) VALUES ($1, $2, $3)",
            ["bigint", "bigint[]", "boolean"],
            version_id,
            chunk_ids.tolist(),
            of_backfill,
        )


def _unchanged(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], ours: set[int], result: WriteResult
) -> list[int]:
    """Lock the source rows and read them again.

    Returns the indexes of the documents that can be written. The server returns only the exceptions, because most rows
    have not changed. These are two statements, because the lock must last, but the owner's expressions must leave
    nothing behind.
    """
    keys = [document.key for document in documents]
    count = len(pipeline.key_columns)
    columns, types = key_columns(keys, count), pipeline.key_parameter_types
    free = unlocked(session, pipeline, keys)
    looking = f"""
        SELECT w.ordinality, l.accepted
        FROM unnest(${count + 1}::bytea[]) WITH ORDINALITY AS w (content_hash, ordinality)
        LEFT JOIN {pipeline.generated("look")}({pipeline.key_arrays()}) AS l ON l.ordinality = w.ordinality
        WHERE l.accepted IS NOT TRUE OR l.content_hash IS DISTINCT FROM w.content_hash
        """
    hashes = [document.content_hash for document in documents]
    found = read_and_release(session, lambda: session.query(looking, [*types, "bytea[]"], *columns, hashes))
    changed = {row["ordinality"] - 1: row["accepted"] for row in found} | dict.fromkeys(free)
    still_there = read_rows(session, pipeline, [keys[i] for i in free], 0) if free else {}
    for position, index in enumerate(free):
        (result.busy if position in still_there else result.absent).append(index)
    ready: list[int] = []
    for index in range(len(documents)):
        accepted = changed.get(index)
        if index not in changed:
            (ready if index in ours else result.busy).append(index)
        elif accepted is False:
            result.absent.append(index)
        elif accepted:
            result.stale.append(index)
    return ready


def _update_state(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> None:
    """Record the new content of documents that existed before; their rows are locked."""
    if not documents:
        return
    count = len(pipeline.key_columns)
    session.query(
        f"""
        UPDATE {pipeline.document} AS d SET content_hash = k.content_hash, recipe = ${count + 2},
            state = CASE WHEN k.content_hash IS NULL THEN 'empty' ELSE 'embedded' END, embedded_at = clock_timestamp()
        FROM unnest({pipeline.key_arrays()}, ${count + 1}) AS k ({pipeline.key_list}, content_hash)
        WHERE {pipeline.key_join("d", "k")}
        """,
        [*pipeline.key_parameter_types, "bytea[]", "integer"],
        *key_columns([document.key for document in documents], count),
        [document.content_hash for document in documents],
        pipeline.recipe,
    )
