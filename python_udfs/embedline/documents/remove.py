"""Remove the documents and chunks of rows that are gone."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.catalog.values import Pipeline
from embedline.documents.copy import foreign_keys_by_index
from embedline.documents.keys import place_documents, take_back
from embedline.documents.read import read_rows
from embedline.documents.values import Document
from embedline.postgres.session import Session
from embedline.queue.dead_letters import forget_dead_letters
from embedline.queue.outbox import ClaimedRow, Key, key_columns


def remove_absent(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> list[int]:
    """Remove chunks and state of keys that the filter refuses.

    Returns the indexes of the documents to embed after all. Keys without a row are left to `deletions`, which waits for
    changes that could use their vectors.
    """
    keys = [document.key for document in documents]
    # Lock our row first, as in write_documents, so that a writer who is about to restore the key waits for it.
    fresh, free = place_documents(session, pipeline, [Document(ClaimedRow(key)) for key in keys])
    read = read_rows(session, pipeline, keys, 0)
    missing = set(range(len(keys))) - set(read)
    present = {i for i, row in read.items() if row.accepted}
    gone = sorted((fresh | free) - present - missing)
    take_back(session, pipeline, [documents[i] for i in sorted(fresh & (present | missing))])
    queue_deleted(session, pipeline, [keys[i] for i in sorted(missing)])
    forget_keys(session, pipeline, [keys[i] for i in gone])
    return [i for i in range(len(keys)) if i not in missing and i not in set(gone)]


def remove_deleted(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> list[Key]:
    """Remove chunks and state of keys that have no row.

    Returns the keys that another session has locked. A key that has a row again is skipped, because its insertion has
    queued it.
    """
    stored = _with_storage(session, pipeline, keys)
    if not stored:
        return []
    documents = [Document(ClaimedRow(key)) for key in stored]
    fresh, free = place_documents(session, pipeline, documents)
    rows = session.query(
        f"""
        SELECT k.ordinality
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {pipeline.generated("present")}({pipeline.key_arrays()}) AS p ({pipeline.key_list})
            ON {pipeline.key_join("p", "k")}
        """,
        pipeline.key_parameter_types,
        *key_columns(stored, len(pipeline.key_columns)),
    )
    present = {int(row["ordinality"]) - 1 for row in rows}
    take_back(session, pipeline, [documents[i] for i in sorted(fresh & present)])
    forget_keys(session, pipeline, [stored[i] for i in sorted((fresh | free) - present)])
    return [key for i, key in enumerate(stored) if i not in fresh | free | present]


def queue_deleted(session: Session, pipeline: Pipeline, keys: Sequence[Key], enqueued_at: str | None = None) -> None:
    """Queue keys of deleted rows, if they have stored data."""
    stored = _with_storage(session, pipeline, keys)
    if stored:
        count = len(pipeline.key_columns)
        session.query(
            f"INSERT INTO {pipeline.generated('deleted')} ({pipeline.key_list}, enqueued_at)"
            f" VALUES ({pipeline.key_arrays()}, coalesce(${count + 1}::timestamptz, now()))",
            [*pipeline.key_parameter_types, "text"],
            *key_columns(stored, count),
            enqueued_at,
        )


def _with_storage(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> list[Key]:
    """Return the keys that have a document, chunks or a mark."""
    if not keys:
        return []
    held = " OR ".join(
        f"EXISTS (SELECT FROM {table} AS t WHERE {pipeline.key_join('t', 'k')})"
        for table in (pipeline.document, *pipeline.chunk_tables, pipeline.generated("hidden"))
    )
    rows = session.query(
        f"SELECT k.ordinality FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)"
        f" WHERE {held} ORDER BY 1",
        pipeline.key_parameter_types,
        *key_columns(keys, len(pipeline.key_columns)),
    )
    return [keys[int(row["ordinality"]) - 1] for row in rows]


def forget_keys(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> None:
    """Remove all stored data of keys whose document rows are locked.

    Their marks are removed, too, because there are no chunks left to hide.
    """
    if not keys:
        return
    arrays = key_columns(keys, len(pipeline.key_columns))
    with foreign_keys_by_index(session):
        for table in (*pipeline.chunk_tables, pipeline.document, pipeline.generated("hidden")):
            session.query(
                f"DELETE FROM {table} AS t USING unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
                f" WHERE {pipeline.key_join('t', 'k')}",
                pipeline.key_parameter_types,
                *arrays,
            )
    forget_dead_letters(session, pipeline, keys)
