"""Lock the rows of the key table, one for each document.

A writer locks a document's row while it works on the document.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from embedline.catalog.values import Pipeline
from embedline.core.sql_text import quote_ident
from embedline.documents.values import Document
from embedline.postgres.locks import VERSIONS_LOCK_CLASS
from embedline.postgres.session import Session
from embedline.queue.outbox import ClaimedRow, key_columns

# Queued keys above which the queue is not searched. Among 870,000 the search for one key took 0.6 to 1.0 s of a write.
_QUEUED_KEYS_LOOKED_AT = 20_000


def _share_versions(session: Session, pipeline: Pipeline) -> bool:
    """Keep the pipeline's versions unchanged until the end of the transaction.

    Returns False if they are being changed, or were. The second statement has a snapshot of its own, taken under the
    lock, so it sees a change committed before.
    """
    row = session.query(
        "SELECT pg_try_advisory_xact_lock_shared($1, $2) AS shared, current_setting('transaction_isolation') AS isolation",
        ["integer", "integer"],
        VERSIONS_LOCK_CLASS,
        pipeline.pipeline_id,
    )[0]
    if not row["shared"]:
        return False
    # An older snapshot would show an older generation. Locking the row raises a serialization failure instead.
    lock = "" if row["isolation"] == "read committed" else " FOR SHARE"
    query = f"SELECT generation FROM embedline.pipeline WHERE pipeline_id = $1{lock}"
    return bool(pipeline.generation == session.scalar(query, ["bigint"], pipeline.pipeline_id))


def place_documents(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> tuple[set[int], set[int]]:
    """Insert missing document rows, and lock the others if that needs no wait.

    Returns the indexes of (inserted, locked). An inserted row is a lock, too, because two writers of a new document
    meet at it. Both are empty if the recipe was altered, or another version serves, since this batch was read.
    """
    if not _share_versions(session, pipeline):
        return set(), set()
    count = len(pipeline.key_columns)
    arrays = key_columns([document.key for document in documents], count)
    placed = session.query(
        f"""
        WITH placed AS (
            INSERT INTO {pipeline.document} ({pipeline.key_list}, content_hash, state, recipe, embedded_at)
            SELECT {pipeline.key_list_of("k")}, k.content_hash,
                CASE WHEN k.content_hash IS NULL THEN 'empty' ELSE 'embedded' END, ${count + 2}, clock_timestamp()
            FROM unnest({pipeline.key_arrays()}, ${count + 1}) AS k ({pipeline.key_list}, content_hash)
            -- Not left to ON CONFLICT, which waits for the transaction that is deleting the row.
            WHERE NOT EXISTS (SELECT FROM {pipeline.document} AS d WHERE {pipeline.key_join("d", "k")})
            ORDER BY {pipeline.key_list_of("k")}
            ON CONFLICT DO NOTHING
            RETURNING {pipeline.key_list}
        )
        SELECT {", ".join(f"array_agg({column}::text) AS {column}" for column in pipeline.quoted_key_columns)} FROM placed
        """,
        [*pipeline.key_parameter_types, "bytea[]", "integer"],
        *arrays,
        [document.content_hash for document in documents],
        pipeline.recipe,
    )[0]
    new_keys = set(zip(*(placed[column] or () for column in pipeline.key_columns), strict=True))
    fresh = {index for index, document in enumerate(documents) if document.key in new_keys}
    if len(fresh) == len(documents):
        return fresh, set()
    locked = session.query(
        f"""
        SELECT k.ordinality FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
        ORDER BY {pipeline.key_list_of("d")} FOR UPDATE OF d SKIP LOCKED
        """,
        pipeline.key_parameter_types,
        *arrays,
    )
    return fresh, {row["ordinality"] - 1 for row in locked} - fresh


def take_documents(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], were_read: Collection[int]
) -> set[int]:
    """Lock the documents' rows, inserting missing ones; return the locked indexes.

    For those in `were_read` the source rows are locked, too, as in write_documents. A row may be deleted while it is in
    flight, and its later vectors would never be removed.
    """
    fresh, free = place_documents(session, pipeline, documents)
    looked_for = sorted((fresh | free) & set(were_read))
    without_row = {looked_for[i] for i in unlocked(session, pipeline, [documents[i].key for i in looked_for])}
    take_back(session, pipeline, [documents[i] for i in sorted(fresh & without_row)])
    return (fresh | free) - without_row


def queued_anew(session: Session, pipeline: Pipeline, rows: Sequence[ClaimedRow]) -> set[int] | None:
    """Return the indexes of the rows for which a newer change is queued.

    None if the queue is too long to search, because its keys have no index. A row that changes while it is in flight is
    such a row.
    """
    count = len(pipeline.key_columns)
    length = session.scalar(
        f"""
        SELECT (SELECT coalesce(sum(cardinality(i.key)), 0) FROM (
                SELECT {pipeline.quoted_key_columns[0]} AS key FROM {pipeline.generated("inbox")} LIMIT $1) AS i)
            + (SELECT count(*) FROM (SELECT FROM {pipeline.outbox} WHERE claimed_by IS NULL LIMIT $1) AS o)
        """,
        ["bigint"],
        _QUEUED_KEYS_LOOKED_AT,
    )
    if length >= _QUEUED_KEYS_LOOKED_AT:
        return None
    keys = ", ".join(f"i.{quote_ident(column)}" for column in pipeline.key_columns)
    found = session.query(
        f"""
        SELECT k.ordinality FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        WHERE ({pipeline.key_list_of("k")}) IN (
            SELECT {pipeline.key_list_of("w")} FROM {pipeline.generated("inbox")} AS i
                CROSS JOIN LATERAL unnest({keys}) AS w ({pipeline.key_list})
            UNION ALL SELECT {pipeline.key_list_of("o")} FROM {pipeline.outbox} AS o
                WHERE o.claimed_by IS NULL AND o.outbox_id <> ALL (${count + 1}))
        """,
        [*pipeline.key_parameter_types, "bigint[]"],
        *key_columns([row.key for row in rows], count),
        # Inside embed_pending these rows have no mark.
        [outbox_id for row in rows for outbox_id in row.outbox_ids],
    )
    return {row["ordinality"] - 1 for row in found}


def unlocked(session: Session, pipeline: Pipeline, keys: Sequence[tuple[str, ...]]) -> list[int]:
    """Lock source rows KEY SHARE; return the indexes of those that are gone or locked.

    An application holds the locked ones.
    """
    if not keys:
        return []
    count = len(pipeline.key_columns)
    rows = session.query(
        f"""
        SELECT w.ordinality FROM generate_series(1, ${count + 1}) AS w (ordinality)
        LEFT JOIN {pipeline.generated("lock")}({pipeline.key_arrays()}) AS l ON l.ordinality = w.ordinality
        WHERE l.ordinality IS NULL
        """,
        [*pipeline.key_parameter_types, "bigint"],
        *key_columns(keys, count),
        len(keys),
    )
    return [int(row["ordinality"]) - 1 for row in rows]


def take_back(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> None:
    """Remove document rows that this transaction inserted and does not need."""
    if documents:
        session.query(
            f"DELETE FROM {pipeline.document} AS d USING unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
            f" WHERE {pipeline.key_join('d', 'k')}",
            pipeline.key_parameter_types,
            *key_columns([document.key for document in documents], len(pipeline.key_columns)),
        )
