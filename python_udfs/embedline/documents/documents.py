"""Reading source rows and writing their chunks and vectors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedline.catalog.health import note_error
from embedline.catalog.keys import as_json, key_json
from embedline.catalog.load import ChunkSet, Pipeline, chunk_table_suffix, load_versions
from embedline.chunking import Chunk
from embedline.core import vectors
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.documents.readability import message_of
from embedline.errors import EmbedlineError, UnreadableText
from embedline.postgres.session import (
    LOCK_NOT_AVAILABLE,
    VERSIONS_LOCK_CLASS,
    Session,
    read_and_release,
    sqlstate_of,
    vector_schema,
)
from embedline.queue.dead_letters import forget_dead_letters
from embedline.queue.outbox import ClaimedRow, Key, key_columns

Vector = npt.NDArray[np.float32]

# Stands for the vector of a chunk that is given up, where it has to have one.
NO_VECTOR: Vector = np.empty(0, dtype=np.float32)

_ALL_BYTES = 1 << 62
# So much of a key is shown before an error's words.
_SHOWN_KEY_CHARACTERS = 100
# Below this a plan that reads whole tables costs nothing.
_GROWN_ROWS = 2000
# Looking one key up among 870,000 that wait took 0.6 to 1.0 s of a write.
_QUEUED_KEYS_LOOKED_AT = 20_000
_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})
_COPY_NULL = "\\N"


@dataclass(slots=True)
class Document:
    """A source row on its way: its claim, and what was read of it. `prefix` stands before each chunk when it is embedded.

    `other_chunks` are its chunks as the other chunk sets have them, by set: other versions embed them.
    """

    row: ClaimedRow
    content_hash: bytes | None = None
    content: str | None = None
    prefix: str = ""
    chunks: list[Chunk] = field(default_factory=list)
    other_chunks: dict[int, list[Chunk]] = field(default_factory=dict)
    problem: EmbedlineError | None = None
    # Chunks that are given up because the model cannot read them, by digest: the share of their tokens that it does not know.
    unreadable: dict[bytes, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """The row's key, each column as text."""
        return self.row.key


class ReadRow(NamedTuple):
    """What the source says of a key.

    `accepted` by the filter; `deferred` where the content was too much for one read; `current` where exactly this content
    was embedded by this recipe already, so that it is not handed over again; `given_up` where it is a dead letter.
    """

    accepted: bool
    deferred: bool
    current: bool
    given_up: bool
    content: str | None
    content_hash: bytes | None
    prefix: str


class StoredChunk(NamedTuple):
    """A chunk that is in the table."""

    chunk_id: int
    digest: bytes
    position: tuple[int, int, int]


@dataclass
class WriteResult:
    """What became of the documents of one write: by index into the documents given."""

    written: list[int] = field(default_factory=list)
    stale: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)


def read_rows(session: Session, pipeline: Pipeline, keys: Sequence[Key], max_bytes: int) -> dict[int, ReadRow]:
    """Read the content of keys as the source's owner; a key that has no row is missing from the result."""
    count = len(pipeline.key_columns)
    query = f"""
        SELECT r.ordinality, r.accepted, r.deferred, c.current, c.given_up, r.content_hash, r.prefix,
            CASE WHEN NOT c.current THEN r.content END AS content
        FROM {pipeline.generated("read")}({pipeline.key_arrays()}, ${count + 1}) AS r
        LEFT JOIN (
            SELECT k.ordinality, d.state, d.content_hash, d.recipe, d.embedded_at
            FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
            JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
        ) AS s ON s.ordinality = r.ordinality
        CROSS JOIN LATERAL (
            SELECT r.accepted AND NOT r.deferred AND s.content_hash IS NOT DISTINCT FROM r.content_hash
                AND coalesce(s.recipe = ${count + 2}, true)
                AND coalesce(s.embedded_at >= ${count + 3}::timestamptz, true) AS same
        ) AS m
        CROSS JOIN LATERAL (
            SELECT coalesce(m.same AND s.state = CASE WHEN r.content_hash IS NULL THEN 'empty' ELSE 'embedded' END, false)
                AS current, coalesce(m.same AND s.state = 'dead' AND s.content_hash IS NOT NULL, false) AS given_up
        ) AS c
        """
    values = [*key_columns(keys, count), max_bytes, pipeline.recipe, pipeline.version.vectors_valid_from]
    types = [*pipeline.key_parameter_types, "bigint", "integer", "text"]
    rows = read_and_release(session, lambda: session.query(query, types, *values))
    return {
        row["ordinality"] - 1: ReadRow(
            row["accepted"],
            row["deferred"],
            row["current"],
            row["given_up"],
            row["content"],
            row["content_hash"],
            row["prefix"] or "",
        )
        for row in rows
    }


def still_current(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> set[int]:
    """Return the indexes of the keys whose documents nobody is writing now and that still are what the source says, or dead.

    Without the lock another session's write of an older content could be under way: it would follow, unseen.
    """
    arrays = key_columns(keys, len(pipeline.key_columns))
    locked = session.query(
        f"""
        SELECT k.ordinality FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
        ORDER BY {pipeline.key_list_of("d")} FOR SHARE OF d SKIP LOCKED
        """,
        pipeline.key_parameter_types,
        *arrays,
    )
    free = {row["ordinality"] - 1 for row in locked}
    marks = hidden_marks(session, pipeline, keys)
    read = read_rows(session, pipeline, keys, _ALL_BYTES)
    current = {index for index, row in read.items() if (row.current or row.given_up) and index in free}
    show_again(session, pipeline, marks, current)
    return current


def lend_vectors(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    """Return the vectors of chunks anywhere in the pipeline that have the same content: they are not paid for twice.

    A version whose model gives the same vectors lends, too: a change of the column type or of the chunking costs only what
    is new.
    """
    found: dict[bytes, Vector] = {}
    for lender in _lenders(session, pipeline) if digests else ():
        missing = [digest for digest in digests if digest not in found]
        if missing:
            found |= _lend(session, lender, missing)
    missing = [digest for digest in digests if digest not in found]
    if missing and session.scalar(f"SELECT EXISTS (SELECT FROM {pipeline.generated('lent')})"):
        for lender in _lenders(session, pipeline):
            found = _lend_kept(session, lender, missing) | found
    return found


def _lend_kept(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    """Return vectors of chunks that are replaced already but may be asked for under another key."""
    if pipeline.version.vectors_valid_from is not None:
        return {}
    rows = session.query(
        f"""
        SELECT DISTINCT ON (l.content_hash) uuid_send(l.content_hash) AS digest, l.vector
        FROM unnest($1::uuid[]) AS w (content_hash) JOIN {pipeline.generated("lent")} AS l USING (content_hash)
        WHERE l.version_id = $2
        """,
        ["text[]", "bigint"],
        [digest.hex() for digest in digests],
        pipeline.version.version_id,
    )
    if not rows:
        return {}
    matrix = vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
    return {bytes(row["digest"]): matrix[i] for i, row in enumerate(rows)}


def _keep_vectors(session: Session, pipeline: Pipeline, chunk_set: ChunkSet, chunk_ids: Sequence[int]) -> None:
    """Keep the vectors of chunks that are about to go: keys were moved, and another row may ask for these texts."""
    if not chunk_ids:
        return
    schema = vector_schema(session)
    for version in load_versions(session, pipeline.name):
        if version.chunk_set.number == chunk_set.number:
            sent = f"{schema}.{version.version.column_type}_send(v.{quote_ident(version.version.column)})"
            session.query(
                f"""
                INSERT INTO {pipeline.generated("lent")} (version_id, content_hash, vector)
                SELECT $2, c.content_hash, {sent} FROM {version.chunk} AS c
                JOIN {version.vectors} AS v ON v.chunk_id = c.chunk_id WHERE c.chunk_id = ANY ($1)
                """,
                ["bigint[]", "bigint"],
                list(chunk_ids),
                version.version.version_id,
            )


def _lenders(session: Session, pipeline: Pipeline) -> list[Pipeline]:
    """Return the version itself and those beside it that can lend it vectors."""
    if len(pipeline.versions) == 1:
        return [pipeline]
    cache: dict[int, tuple[int, list[Pipeline]]] = session.cache.setdefault("embedline.lenders", {})
    generation, lenders = cache.get(pipeline.version.version_id, (0, []))
    if generation != pipeline.generation or not lenders:
        lenders = [other for other in load_versions(session, pipeline.name) if _can_lend(other, pipeline)]
        cache[pipeline.version.version_id] = pipeline.generation, lenders
    others = [lender for lender in lenders if lender.version.version_id != pipeline.version.version_id]
    return [pipeline, *others]


def _can_lend(lender: Pipeline, pipeline: Pipeline) -> bool:
    ours, theirs = pipeline.version, lender.version
    same_model = (ours.model.fingerprint, ours.model.config.document_prefix, ours.dimensions) == (
        theirs.model.fingerprint,
        theirs.model.config.document_prefix,
        theirs.dimensions,
    )
    # What was rounded to float16 or normalised cannot be had back.
    is_exact = theirs.column_type in ("vector", ours.column_type)
    is_normalised = (ours.distance != "l2", theirs.distance != "l2")
    return same_model and is_exact and is_normalised in ((True, True), (False, False))


def _lend(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    column = quote_ident(pipeline.version.column)
    schema = vector_schema(session)
    rows = session.query(
        f"""
        SELECT DISTINCT ON (c.content_hash) uuid_send(c.content_hash) AS digest,
            {schema}.{pipeline.version.column_type}_send(v.{column}) AS vector
        FROM unnest($1::uuid[]) AS w (content_hash)
        JOIN {pipeline.chunk} AS c ON c.content_hash = w.content_hash
        JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id
        {_valid_join(pipeline, "$2")}
        """,
        ["text[]", "text"],
        [digest.hex() for digest in digests],
        pipeline.version.vectors_valid_from,
    )
    if not rows:
        return {}
    matrix = vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
    return {bytes(row["digest"]): matrix[i] for i, row in enumerate(rows)}


def _valid_join(pipeline: Pipeline, valid_from: str) -> str:
    """Return the join that leaves out vectors of before a change of the model that was found out; none in common life."""
    if pipeline.version.vectors_valid_from is None:
        return f"AND {valid_from}::text IS NULL"
    return (
        f"JOIN {pipeline.document} AS d ON {pipeline.key_join('d', 'c')} AND d.embedded_at >= {valid_from}::timestamptz"
    )


_ROW_BYTES = """
    SELECT sum(pg_relation_size(c.oid) + 3 * CASE WHEN c.reltoastrelid = 0 THEN 0 ELSE pg_relation_size(c.reltoastrelid) END)
        / nullif(sum(greatest(c.reltuples::double precision, pg_stat_get_live_tuples(c.oid), 0)), 0) AS bytes
    FROM (SELECT $1::oid AS relid UNION SELECT relid FROM pg_partition_tree($1::oid::regclass) WHERE isleaf) AS leaf
    JOIN pg_class AS c ON c.oid = leaf.relid AND c.relkind = 'r'
"""


def can_hold_source(session: Session, pipeline: Pipeline) -> bool:
    """Lock the source as its readers do, to the end of the transaction; False where an application is about to change it.

    TRUNCATE locks the source first and then our tables. Whoever locks them in another order deadlocks with it, and the
    application may be the one that fails: so a worker begins each transaction with this. It waits for no application.
    """
    name = session.scalar("SELECT $1::oid::regclass::text", ["bigint"], pipeline.source_oid)
    try:
        session.execute(f"LOCK TABLE ONLY {name} IN ROW SHARE MODE NOWAIT")
    except Exception as error:
        if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
            raise
        return False
    return True


def likely_row_bytes(session: Session, pipeline: Pipeline) -> float | None:
    """Return how many bytes a row of the source likely has, None where nothing tells; takes 0.2 ms on any table.

    By the files' sizes and the counts that VACUUM, ANALYZE and the statistics keep. No value is read. Values out of line
    are compressed, texts to about a third.
    """
    size: float | None = session.scalar(_ROW_BYTES, ["bigint"], pipeline.source_oid)
    return size


def write_documents(
    session: Session,
    pipeline: Pipeline,
    documents: Sequence[Document],
    known: Mapping[bytes, Vector],
    *,
    of_backfill: bool = False,
) -> WriteResult:
    """Write chunks, vectors and state of documents whose content has not changed since it was read.

    One transaction's work. The document rows are locked first, and only then is the source read again: so nobody can
    write a newer content between that look and this write. Source rows are locked KEY SHARE, so that a delete under way
    is seen. Both SKIP LOCKED: a worker waits for no application. A change of the pipeline's versions, which takes
    milliseconds, is not waited for either.
    """
    result = WriteResult()
    fresh, free = _place_documents(session, pipeline, documents)
    marks = hidden_marks(session, pipeline, [document.key for document in documents])
    ready = _unchanged(session, pipeline, documents, fresh | free, result)
    # Of new documents, too: a chunk whose document row was lost must not stay beside the new one.
    stored = _stored_chunks(session, pipeline, documents, ready, pipeline.chunk_set)
    changes, replaced = _Changes(), list[int]()
    for index in ready:
        document = documents[index]
        change = _diff(stored[index], document.chunks) if stored[index] else ([], [], document.chunks)
        if any(chunk.digest not in known for chunk in change[2]):
            # Another session took the chunk away that was to stay or to lend its vector: look again.
            result.busy.append(index)
            continue
        changes.add(document.key, change)
        result.written.append(index)
        if index in marks:
            replaced += change[0]
    _keep_vectors(session, pipeline, pipeline.chunk_set, replaced)
    ids = _apply(session, pipeline, pipeline.chunk_set, changes)
    if ids.size:
        _write_vectors(session, pipeline, ids, [known[chunk.digest] for _, chunk in changes.added])
        _give_up_chunks(session, pipeline, ids, changes.added, [documents[i] for i in result.written])
        enqueue_chunks(session, pipeline.other_versions(pipeline.chunk_set.number), ids, of_backfill=of_backfill)
    for chunk_set in pipeline.other_sets:
        _write_other_set(session, pipeline, chunk_set, documents, result.written, set(marks), of_backfill=of_backfill)
    written = set(result.written)
    _update_state(session, pipeline, [documents[i] for i in result.written if i in free])
    _take_back(session, pipeline, [documents[i] for i in sorted(fresh - written)])
    if written:
        forget_dead_letters(session, pipeline, [documents[i].key for i in result.written])
        show_again(session, pipeline, marks, written)
    return result


def hidden_marks(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> dict[int, list[str]]:
    """Lock the marks that hide the chunks of keys; return their places, by index of the key.

    The marks must be collected before the source is read: one that comes after belongs to a row which that reading did not
    see, and its chunks must stay hidden.
    """
    hidden = pipeline.generated("hidden")
    if not session.scalar(f"SELECT EXISTS (SELECT FROM {hidden})"):
        return {}
    rows = session.query(
        f"""
        SELECT k.ordinality, h.ctid::text AS place
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {hidden} AS h ON {pipeline.key_join("h", "k")} FOR UPDATE OF h SKIP LOCKED
        """,
        pipeline.key_parameter_types,
        *key_columns(keys, len(pipeline.key_columns)),
    )
    marks: dict[int, list[str]] = {}
    for row in rows:
        marks.setdefault(int(row["ordinality"]) - 1, []).append(row["place"])
    return marks


def show_again(session: Session, pipeline: Pipeline, marks: Mapping[int, list[str]], indexes: Collection[int]) -> None:
    """Take marks away: the chunks of these keys are those of their rows."""
    places = [place for index in indexes for place in marks.get(index, ())]
    if places:
        hidden = pipeline.generated("hidden")
        session.query(f"DELETE FROM {hidden} WHERE ctid = ANY ($1::text[]::tid[])", ["text[]"], places)


def _write_vectors(session: Session, pipeline: Pipeline, ids: npt.NDArray[np.int64], found: Sequence[Vector]) -> None:
    """Write the vectors of new chunks, but for those that have none."""
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
    """Write dead letters of the serving version for new chunks that its model cannot read; the row's others are embedded.

    The chunks stay: a version of another model may read them. An index or a cutover needs no one's consent for them,
    because the setting has decided.
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
    note_error(
        session,
        pipeline,
        f"{key_json(pipeline, first.key)[:_SHOWN_KEY_CHARACTERS]}: {len(first.unreadable)} of"
        f" {len(first.chunks)} chunks: {message_of(min(first.unreadable.values()))}",
    )


def _share_versions(session: Session, pipeline: Pipeline) -> bool:
    """Keep the pipeline's versions as they are to the end of the transaction; False where they are, or were, changed.

    The second statement has a snapshot of its own, taken under the lock: a change committed before is seen.
    """
    row = session.query(
        "SELECT pg_try_advisory_xact_lock_shared($1, $2) AS shared, current_setting('transaction_isolation') AS isolation",
        ["integer", "integer"],
        VERSIONS_LOCK_CLASS,
        pipeline.pipeline_id,
    )[0]
    if not row["shared"]:
        return False
    # An older snapshot would show the generation of then; locking the row raises a serialization failure instead.
    lock = "" if row["isolation"] == "read committed" else " FOR SHARE"
    query = f"SELECT generation FROM embedline.pipeline WHERE pipeline_id = $1{lock}"
    return bool(pipeline.generation == session.scalar(query, ["bigint"], pipeline.pipeline_id))


def _write_other_set(
    session: Session,
    pipeline: Pipeline,
    chunk_set: ChunkSet,
    documents: Sequence[Document],
    written: Sequence[int],
    marked: Collection[int],
    *,
    of_backfill: bool,
) -> None:
    """Write the documents' chunks of another set; the versions that embed them are left to their own time."""
    stored = _stored_chunks(session, pipeline, documents, written, chunk_set)
    changes, replaced = _Changes(), list[int]()
    for index in written:
        document = documents[index]
        change = _diff(stored[index], document.other_chunks.get(chunk_set.number, []))
        changes.add(document.key, change)
        if index in marked:
            replaced += change[0]
    _keep_vectors(session, pipeline, chunk_set, replaced)
    ids = _apply(session, pipeline, chunk_set, changes)
    if ids.size:
        enqueue_chunks(session, pipeline.other_versions(chunk_set.number), ids, of_backfill=of_backfill)


def enqueue_chunks(
    session: Session, version_ids: Iterable[int], chunk_ids: npt.NDArray[np.int64], *, of_backfill: bool
) -> None:
    """Let versions know of new chunks, in the transaction that writes these: so none is missed."""
    for version_id in version_ids:
        session.query(
            "INSERT INTO embedline.version_queue (version_id, chunk_ids, of_backfill) VALUES ($1, $2, $3)",
            ["bigint", "bigint[]", "boolean"],
            version_id,
            chunk_ids.tolist(),
            of_backfill,
        )


def _place_documents(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> tuple[set[int], set[int]]:
    """Insert the document rows that there are none of yet, and lock the others as far as that can be had at once.

    Return the indexes of (inserted, locked). An inserted row is a lock, too: two writers of a new document meet at it.
    None could be had where the recipe was altered, or another version serves, since this batch was read.
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
    """Lock the documents' rows, inserting those that there are none of; return the indexes of those that could be had.

    Of those in `were_read` the source rows are locked, too, as in write_documents: a row may be deleted while it is in work,
    and what is written of it after that nobody would take away.
    """
    fresh, free = _place_documents(session, pipeline, documents)
    looked_for = sorted((fresh | free) & set(were_read))
    without_row = {looked_for[i] for i in _unlocked(session, pipeline, [documents[i].key for i in looked_for])}
    _take_back(session, pipeline, [documents[i] for i in sorted(fresh & without_row)])
    return (fresh | free) - without_row


def queued_anew(session: Session, pipeline: Pipeline, rows: Sequence[ClaimedRow]) -> set[int] | None:
    """Return the indexes of the rows of which a newer change waits in the queue; None where that is too long to look.

    A row that is changed while it is in work comes back here, and the keys that wait have no index.
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
        # Inside embed_pending these bear no mark.
        [outbox_id for row in rows for outbox_id in row.outbox_ids],
    )
    return {row["ordinality"] - 1 for row in found}


def _unchanged(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], ours: set[int], result: WriteResult
) -> list[int]:
    """Lock the source rows and look at them again; return the indexes of the documents that can be written.

    Only the exceptions come back from the server: most rows are as they were. The lock must last and the owner's expressions
    must leave nothing behind: so these are two statements.
    """
    keys = [document.key for document in documents]
    count = len(pipeline.key_columns)
    columns, types = key_columns(keys, count), pipeline.key_parameter_types
    unlocked = _unlocked(session, pipeline, keys)
    looking = f"""
        SELECT w.ordinality, l.accepted
        FROM unnest(${count + 1}::bytea[]) WITH ORDINALITY AS w (content_hash, ordinality)
        LEFT JOIN {pipeline.generated("look")}({pipeline.key_arrays()}) AS l ON l.ordinality = w.ordinality
        WHERE l.accepted IS NOT TRUE OR l.content_hash IS DISTINCT FROM w.content_hash
        """
    hashes = [document.content_hash for document in documents]
    found = read_and_release(session, lambda: session.query(looking, [*types, "bytea[]"], *columns, hashes))
    changed = {row["ordinality"] - 1: row["accepted"] for row in found} | dict.fromkeys(unlocked)
    still_there = read_rows(session, pipeline, [keys[i] for i in unlocked], 0) if unlocked else {}
    for position, index in enumerate(unlocked):
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


def _unlocked(session: Session, pipeline: Pipeline, keys: Sequence[tuple[str, ...]]) -> list[int]:
    """Lock source rows KEY SHARE; return the indexes of those that are gone, or in an application's hands."""
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


def _take_back(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> None:
    """Remove document rows that this transaction inserted and does not stand by."""
    if documents:
        session.query(
            f"DELETE FROM {pipeline.document} AS d USING unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
            f" WHERE {pipeline.key_join('d', 'k')}",
            pipeline.key_parameter_types,
            *key_columns([document.key for document in documents], len(pipeline.key_columns)),
        )


def _stored_chunks(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], wanted: Sequence[int], chunk_set: ChunkSet
) -> dict[int, list[StoredChunk]]:
    """Return the documents' chunks of a set, by index; each document wanted has an entry.

    A chunk of the version's own set must have its vector; those of other sets get theirs later.
    """
    if not wanted:
        return {}
    count = len(pipeline.key_columns)
    is_own = chunk_set.number == pipeline.chunk_set.number
    usable = f"v.chunk_id IS NOT NULL AND coalesce(d.embedded_at >= ${count + 1}::timestamptz, true)"
    rows = session.query(
        f"""
        SELECT k.ordinality, c.chunk_id, uuid_send(c.content_hash) AS digest, c.seq, c.start_offset, c.end_offset,
            {usable if is_own else f"${count + 1}::text IS NOT DISTINCT FROM ${count + 1}"} AS usable
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
        JOIN {pipeline.chunk_table(chunk_set.number)} AS c ON {pipeline.key_join("c", "k")}
        {f"LEFT JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id" if is_own else ""}
        """,
        [*pipeline.key_parameter_types, "text"],
        *key_columns([documents[i].key for i in wanted], count),
        pipeline.version.vectors_valid_from,
    )
    stored: dict[int, list[StoredChunk]] = {index: [] for index in wanted}
    for row in rows:
        position = (row["seq"], row["start_offset"], row["end_offset"])
        # A chunk without a usable vector is no match for anything: it goes, and its content is added anew.
        digest = row["digest"] if row["usable"] else b""
        stored[wanted[row["ordinality"] - 1]].append(StoredChunk(row["chunk_id"], digest, position))
    return stored


def _diff(
    stored: Sequence[StoredChunk], wanted: Sequence[Chunk]
) -> tuple[list[int], list[tuple[int, Chunk]], list[Chunk]]:
    """Return (chunk ids to delete, stored chunks that only moved, chunks to add), matched by content."""
    by_digest: dict[bytes, list[StoredChunk]] = {}
    for candidate in sorted(stored, key=lambda c: c.position, reverse=True):
        by_digest.setdefault(candidate.digest, []).append(candidate)
    moved: list[tuple[int, Chunk]] = []
    added: list[Chunk] = []
    for chunk in wanted:
        candidates = by_digest.get(chunk.digest)
        if not candidates:
            added.append(chunk)
            continue
        kept = candidates.pop()
        if kept.position != (chunk.sequence, chunk.start, chunk.end):
            moved.append((kept.chunk_id, chunk))
    removed = [left.chunk_id for candidates in by_digest.values() for left in candidates]
    return removed, moved, added


@dataclass
class _Changes:
    """What a write does to one chunk set: chunk ids to delete, chunks that only moved, chunks to add."""

    removed: list[int] = field(default_factory=list)
    moved: list[tuple[int, Chunk]] = field(default_factory=list)
    added: list[tuple[Key, Chunk]] = field(default_factory=list)

    def add(self, key: Key, change: tuple[list[int], list[tuple[int, Chunk]], list[Chunk]]) -> None:
        """Take in what `_diff` says of one document."""
        removed, moved, added = change
        self.removed += removed
        self.moved += moved
        self.added += [(key, chunk) for chunk in added]


def _apply(session: Session, pipeline: Pipeline, chunk_set: ChunkSet, changes: _Changes) -> npt.NDArray[np.int64]:
    """Write the changes into the set's table; return the ids of the chunks added, in their order."""
    table = pipeline.chunk_table(chunk_set.number)
    if changes.removed:
        session.query(f"DELETE FROM {table} WHERE chunk_id = ANY ($1)", ["bigint[]"], changes.removed)
    if changes.moved:
        session.query(
            f"""
            UPDATE {table} AS c SET seq = m.seq, start_offset = m.start_offset, end_offset = m.end_offset
            FROM unnest($1, $2, $3, $4) AS m (chunk_id, seq, start_offset, end_offset) WHERE c.chunk_id = m.chunk_id
            """,
            ["bigint[]", "integer[]", "integer[]", "integer[]"],
            [chunk_id for chunk_id, _ in changes.moved],
            [chunk.sequence for _, chunk in changes.moved],
            [chunk.start for _, chunk in changes.moved],
            [chunk.end for _, chunk in changes.moved],
        )
    if not changes.added:
        return np.empty(0, dtype=np.int64)
    ids = _next_chunk_ids(session, pipeline, chunk_set, len(changes.added))
    copy_rows(session, pipeline, table, ids, changes.added)
    return ids


def stacked(rows: list[Vector]) -> vectors.FloatMatrix:
    """Return vectors as one matrix: what np.stack returns, without its work on each row."""
    return np.concatenate(rows).reshape(len(rows), -1)


def _next_chunk_ids(session: Session, pipeline: Pipeline, chunk_set: ChunkSet, count: int) -> npt.NDArray[np.int64]:
    sequence = pipeline.generated(f"{chunk_table_suffix(chunk_set.number)}_chunk_id_seq")
    rows = session.query(
        f"SELECT array_agg(nextval({quote_literal(sequence)}::regclass)) AS ids FROM generate_series(1, $1)",
        ["integer"],
        count,
    )
    return np.asarray(rows[0]["ids"], dtype=np.int64)


def copy_rows(
    session: Session,
    pipeline: Pipeline,
    table: str,
    chunk_ids: npt.NDArray[np.int64],
    added: Sequence[tuple[Key, Chunk]],
) -> None:
    """Write chunks with COPY in text format: keys go through their types' own input functions."""
    lines = [
        f"{chunk_id}\t{_copy_key(key)}\t{chunk.sequence}\t{chunk.start}\t{chunk.end}\t{chunk.digest.hex()}"
        f"\t{chunk.content.translate(_COPY_ESCAPES)}\t{chunk.prefix.translate(_COPY_ESCAPES) if chunk.prefix else _COPY_NULL}\n"
        for chunk_id, (key, chunk) in zip(chunk_ids.tolist(), added, strict=True)
    ]
    with _server_file("".join(lines).encode()) as path:
        session.execute(
            f"COPY {table} (chunk_id, {pipeline.key_list}, seq, start_offset, end_offset, content_hash, content, prefix)"
            f" FROM {quote_literal(path)} WITH (FORMAT text, ENCODING 'UTF8')"
        )


@contextmanager
def foreign_keys_by_index(session: Session) -> Iterator[None]:
    """Have PostgreSQL plan its checks of foreign keys for the index, however small the tables are now.

    A session keeps these plans. Made for 50 chunks, the plan read the whole table for each of the 35,000 chunks of a document
    of 50 MB, which took more than a minute.
    """
    setting = "SELECT current_setting('enable_seqscan') AS before, set_config('enable_seqscan', 'off', true)"
    before = session.query(setting)[0]["before"]
    yield
    session.query("SELECT set_config('enable_seqscan', $1, true)", ["text"], before)


def _copy_key(key: Key) -> str:
    return (
        key[0].translate(_COPY_ESCAPES) if len(key) == 1 else "\t".join(part.translate(_COPY_ESCAPES) for part in key)
    )


def copy_vectors(
    session: Session, pipeline: Pipeline, chunk_ids: npt.NDArray[np.int64], matrix: vectors.FloatMatrix
) -> None:
    """Write vectors with COPY BINARY, the only fast way from PL/Python into a vector column."""
    data = vectors.copy_binary(chunk_ids, matrix, pipeline.version.column_type)
    with _server_file(data) as path, foreign_keys_by_index(session):
        session.execute(
            f"COPY {pipeline.vectors} (chunk_id, {quote_ident(pipeline.version.column)})"
            f" FROM {quote_literal(path)} WITH (FORMAT binary)"
        )


@contextmanager
def _server_file(data: bytes | bytearray) -> Iterator[str]:
    """Hold `data` in a file in memory that nobody else can open and that goes with the process, however it ends.

    COPY opens it by its descriptor's name, in the same process. Where a system has no such files it is one of mode 0600 in
    the server's temporary directory.
    """
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        with os.fdopen(os.memfd_create("embedline-copy"), "wb") as file:
            file.write(data)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
        return
    descriptor, path = tempfile.mkstemp(prefix="embedline-copy-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield path
    finally:
        Path(path).unlink()


def analyze_grown(session: Session, pipeline: Pipeline, written: int) -> bool:
    """ANALYZE the pipeline's tables once `written` new rows make them three times what the planner knows; True if so.

    Plans that were made while the tables were empty read them whole: without this the rate fell from 10,000 rows/s to
    2,000 by 220,000 rows. Autovacuum comes a minute later. Only keys are looked at: a sample of vectors would be large.
    """
    if written < _GROWN_ROWS:
        return False
    known = session.scalar("SELECT reltuples FROM pg_class WHERE oid = to_regclass($1)", ["text"], pipeline.document)
    if known is None or written < 2 * known:
        return False
    session.execute(f"ANALYZE (SKIP_LOCKED) {pipeline.document} ({pipeline.key_list})")
    session.execute(f"ANALYZE (SKIP_LOCKED) {pipeline.chunk} (chunk_id, content_hash, {pipeline.key_list})")
    session.execute(f"ANALYZE (SKIP_LOCKED) {pipeline.vectors} (chunk_id)")
    return True


def _update_state(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> None:
    """Note what is embedded now of documents that were there before; their rows are locked."""
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


def remove_absent(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> list[int]:
    """Remove chunks and state of keys that the filter refuses; return the indexes that are to be embedded after all.

    What is stored of keys without a row is left to `deletions`, which waits for those that could use its vectors.
    """
    keys = [document.key for document in documents]
    # A row of ours first, as in write_documents: a writer who is about to bring the key back has to wait for it.
    fresh, free = _place_documents(session, pipeline, [Document(ClaimedRow(key)) for key in keys])
    read = read_rows(session, pipeline, keys, 0)
    missing = set(range(len(keys))) - set(read)
    present = {i for i, row in read.items() if row.accepted}
    gone = sorted((fresh | free) - present - missing)
    _take_back(session, pipeline, [documents[i] for i in sorted(fresh & (present | missing))])
    queue_deleted(session, pipeline, [keys[i] for i in sorted(missing)])
    forget_keys(session, pipeline, [keys[i] for i in gone])
    return [i for i in range(len(keys)) if i not in missing and i not in set(gone)]


def remove_deleted(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> list[Key]:
    """Remove chunks and state of keys that have no row; return those that another session has locked.

    A key that has a row again is left alone: its insertion has queued it.
    """
    stored = _with_storage(session, pipeline, keys)
    if not stored:
        return []
    documents = [Document(ClaimedRow(key)) for key in stored]
    fresh, free = _place_documents(session, pipeline, documents)
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
    _take_back(session, pipeline, [documents[i] for i in sorted(fresh & present)])
    forget_keys(session, pipeline, [stored[i] for i in sorted((fresh | free) - present)])
    return [key for i, key in enumerate(stored) if i not in fresh | free | present]


def queue_deleted(session: Session, pipeline: Pipeline, keys: Sequence[Key], enqueued_at: str | None = None) -> None:
    """Queue keys as those of deleted rows, if something is stored of them."""
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
    """Return those of the keys that have a document, chunks or a mark."""
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
    """Remove all that is stored of keys whose document rows are locked. Without chunks there is nothing left to hide."""
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
