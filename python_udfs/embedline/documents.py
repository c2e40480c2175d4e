"""Reading source rows and writing their chunks and vectors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt

from embedline import vectors
from embedline.catalog import Pipeline
from embedline.chunking import Chunk
from embedline.database import Session, quote_ident, quote_literal, vector_schema
from embedline.errors import UnusableText
from embedline.outbox import ClaimedRow, Key

Vector = npt.NDArray[np.float32]

_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


@dataclass
class Document:
    """A source row on its way: its claim, and what was read of it."""

    row: ClaimedRow
    content_hash: bytes | None = None
    content: str | None = None
    chunks: list[Chunk] = field(default_factory=list)
    problem: UnusableText | None = None

    @property
    def key(self) -> Key:
        """The row's key, each column as text."""
        return self.row.key


@dataclass(frozen=True)
class ReadRow:
    """What the source says of a key: `accepted` by the filter; `deferred` where the content was too much for one read."""

    accepted: bool
    deferred: bool
    content: str | None
    content_hash: bytes | None


@dataclass(frozen=True)
class StoredChunk:
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


def key_columns(keys: Sequence[Key], count: int) -> list[list[str]]:
    """Turn keys into one list for each key column, as array parameters take them."""
    return [[key[i] for key in keys] for i in range(count)]


def read_rows(session: Session, pipeline: Pipeline, keys: Sequence[Key], max_bytes: int) -> dict[int, ReadRow]:
    """Read the content of keys as the source's owner; a key that has no row is missing from the result."""
    count = len(pipeline.key_columns)
    rows = session.query(
        f"SELECT * FROM {pipeline.generated('read')}({pipeline.key_arrays()}, ${count + 1})",
        [*pipeline.key_parameter_types, "bigint"],
        *key_columns(keys, count),
        max_bytes,
    )
    return {
        int(row["ordinality"]) - 1: ReadRow(row["accepted"], row["deferred"], row["content"], row["content_hash"])
        for row in rows
    }


def stored_hashes(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> dict[int, tuple[str, bytes | None]]:
    """Return state and content hash of the keys that have a document row."""
    count = len(pipeline.key_columns)
    rows = session.query(
        f"""
        SELECT k.ordinality, d.state, d.content_hash
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
        """,
        pipeline.key_parameter_types,
        *key_columns(keys, count),
    )
    return {int(row["ordinality"]) - 1: (str(row["state"]), row["content_hash"]) for row in rows}


def lend_vectors(session: Session, pipeline: Pipeline, digests: Sequence[bytes]) -> dict[bytes, Vector]:
    """Return the vectors of chunks anywhere in the pipeline that have the same content: they are not paid for twice."""
    if not digests:
        return {}
    column = quote_ident(pipeline.version.column)
    schema = vector_schema(session)
    rows = session.query(
        f"""
        SELECT DISTINCT ON (c.content_hash) uuid_send(c.content_hash) AS digest,
            {schema}.{pipeline.version.column_type}_send(v.{column}) AS vector
        FROM unnest($1::uuid[]) AS w (content_hash)
        JOIN {pipeline.chunk} AS c ON c.content_hash = w.content_hash
        JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id
        """,
        ["text[]"],
        [str(UUID(bytes=digest)) for digest in digests],
    )
    if not rows:
        return {}
    matrix = vectors.vectors_from_send([row["vector"] for row in rows], pipeline.version.column_type)
    return {bytes(row["digest"]): matrix[i] for i, row in enumerate(rows)}


def write_documents(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], known: Mapping[bytes, Vector]
) -> WriteResult:
    """Write chunks, vectors and state of documents whose content has not changed since it was read.

    One transaction's work. The document rows are locked first, and only then is the source read again: so nobody can
    write a newer content between that look and this write. Source rows are locked KEY SHARE, so that a delete under way
    is seen. Both SKIP LOCKED: a worker waits for no application.
    """
    result = WriteResult()
    ready = _lock_unchanged(session, pipeline, documents, result)
    if not ready:
        _drop_placeholders(session, pipeline, documents, [])
        return result
    stored = _stored_chunks(session, pipeline, [documents[i].key for i in ready])
    removed: list[int] = []
    moved: list[tuple[int, Chunk]] = []
    added: list[tuple[Key, Chunk]] = []
    for position, index in enumerate(ready):
        document = documents[index]
        changes = _diff(stored.get(position, []), document.chunks)
        if any(chunk.digest not in known for chunk in changes[2]):
            # Another session took the chunk away that was to stay or to lend its vector: look again.
            result.busy.append(index)
            continue
        removed += changes[0]
        moved += changes[1]
        added += [(document.key, chunk) for chunk in changes[2]]
        result.written.append(index)
    _apply(session, pipeline, removed, moved, added, known)
    _write_state(session, pipeline, [documents[i] for i in result.written])
    _drop_placeholders(session, pipeline, documents, result.written)
    return result


def _lock_unchanged(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], result: WriteResult
) -> list[int]:
    keys = [document.key for document in documents]
    arrays = key_columns(keys, len(pipeline.key_columns))
    free = _lock_state_rows(session, pipeline, arrays)
    locked = {
        int(row["ordinality"]) - 1: (row["accepted"], row["content_hash"])
        for row in session.query(
            f"SELECT * FROM {pipeline.generated('lock')}({pipeline.key_arrays()})",
            pipeline.key_parameter_types,
            *arrays,
        )
    }
    unlocked = [i for i in range(len(documents)) if i not in locked]
    still_there = read_rows(session, pipeline, [keys[i] for i in unlocked], 0) if unlocked else {}
    for position, index in enumerate(unlocked):
        (result.busy if position in still_there else result.absent).append(index)
    ready = []
    for index, (accepted, content_hash) in sorted(locked.items()):
        if not accepted:
            result.absent.append(index)
        elif content_hash != documents[index].content_hash:
            result.stale.append(index)
        elif index not in free:
            result.busy.append(index)
        else:
            ready.append(index)
    return ready


def _lock_state_rows(session: Session, pipeline: Pipeline, arrays: list[list[str]]) -> set[int]:
    """Lock the document rows that can be had at once; return their indexes.

    A key that has none gets a placeholder, so that two writers of a new document meet at a row, too.
    """
    wanted = f"unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)"
    session.query(
        f"""
        INSERT INTO {pipeline.document} ({pipeline.key_list}, state, embedded_at)
        SELECT {pipeline.key_list}, 'empty', '-infinity' FROM {wanted} ORDER BY {pipeline.key_list}
        ON CONFLICT DO NOTHING
        """,
        pipeline.key_parameter_types,
        *arrays,
    )
    ordered = ", ".join(f"d.{quote_ident(column)}" for column in pipeline.key_columns)
    locked = session.query(
        f"SELECT k.ordinality FROM {wanted} JOIN {pipeline.document} AS d ON {pipeline.key_join('d', 'k')}"
        f" ORDER BY {ordered} FOR UPDATE OF d SKIP LOCKED",
        pipeline.key_parameter_types,
        *arrays,
    )
    return {int(row["ordinality"]) - 1 for row in locked}


def _drop_placeholders(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], written: Sequence[int]
) -> None:
    unused = [document.key for i, document in enumerate(documents) if i not in set(written)]
    if unused:
        session.query(
            f"DELETE FROM {pipeline.document} AS d USING unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
            f" WHERE {pipeline.key_join('d', 'k')} AND d.embedded_at = '-infinity'",
            pipeline.key_parameter_types,
            *key_columns(unused, len(pipeline.key_columns)),
        )


def _stored_chunks(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> dict[int, list[StoredChunk]]:
    rows = session.query(
        f"""
        SELECT k.ordinality, c.chunk_id, uuid_send(c.content_hash) AS digest, c.seq, c.start_offset, c.end_offset
        FROM unnest({pipeline.key_arrays()}) WITH ORDINALITY AS k ({pipeline.key_list}, ordinality)
        JOIN {pipeline.chunk} AS c ON {pipeline.key_join("c", "k")}
        JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id
        """,
        pipeline.key_parameter_types,
        *key_columns(keys, len(pipeline.key_columns)),
    )
    stored: dict[int, list[StoredChunk]] = {}
    for row in rows:
        chunk = StoredChunk(
            int(row["chunk_id"]), bytes(row["digest"]), (row["seq"], row["start_offset"], row["end_offset"])
        )
        stored.setdefault(int(row["ordinality"]) - 1, []).append(chunk)
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


def _apply(
    session: Session,
    pipeline: Pipeline,
    removed: list[int],
    moved: list[tuple[int, Chunk]],
    added: list[tuple[Key, Chunk]],
    known: Mapping[bytes, Vector],
) -> None:
    if removed:
        session.query(f"DELETE FROM {pipeline.chunk} WHERE chunk_id = ANY ($1)", ["bigint[]"], removed)
    if moved:
        session.query(
            f"""
            UPDATE {pipeline.chunk} AS c SET seq = m.seq, start_offset = m.start_offset, end_offset = m.end_offset
            FROM unnest($1, $2, $3, $4) AS m (chunk_id, seq, start_offset, end_offset) WHERE c.chunk_id = m.chunk_id
            """,
            ["bigint[]", "integer[]", "integer[]", "integer[]"],
            [chunk_id for chunk_id, _ in moved],
            [chunk.sequence for _, chunk in moved],
            [chunk.start for _, chunk in moved],
            [chunk.end for _, chunk in moved],
        )
    if added:
        ids = _next_chunk_ids(session, pipeline, len(added))
        copy_rows(session, pipeline, ids, added)
        copy_vectors(session, pipeline, ids, np.stack([known[chunk.digest] for _, chunk in added]))


def _next_chunk_ids(session: Session, pipeline: Pipeline, count: int) -> npt.NDArray[np.int64]:
    sequence = f"embedline_data.{quote_ident(pipeline.name + '_chunk_chunk_id_seq')}"
    rows = session.query(
        f"SELECT array_agg(nextval({quote_literal(sequence)}::regclass)) AS ids FROM generate_series(1, $1)",
        ["integer"],
        count,
    )
    return np.asarray(rows[0]["ids"], dtype=np.int64)


def copy_rows(
    session: Session, pipeline: Pipeline, chunk_ids: npt.NDArray[np.int64], added: Sequence[tuple[Key, Chunk]]
) -> None:
    """Write chunks with COPY in text format: keys go through their types' own input functions."""
    lines = [
        "\t".join((
            str(chunk_id),
            *(part.translate(_COPY_ESCAPES) for part in key),
            str(chunk.sequence), str(chunk.start), str(chunk.end), chunk.digest.hex(),
            chunk.content.translate(_COPY_ESCAPES),
        ))
        for chunk_id, (key, chunk) in zip(chunk_ids.tolist(), added, strict=True)
    ]  # fmt: skip
    with _server_file(("\n".join(lines) + "\n").encode()) as path:
        session.execute(
            f"COPY {pipeline.chunk} (chunk_id, {pipeline.key_list}, seq, start_offset, end_offset, content_hash, content)"
            f" FROM {quote_literal(path)} WITH (FORMAT text, ENCODING 'UTF8')"
        )


def copy_vectors(
    session: Session, pipeline: Pipeline, chunk_ids: npt.NDArray[np.int64], matrix: vectors.FloatMatrix
) -> None:
    """Write vectors with COPY BINARY, the only fast way from PL/Python into a vector column."""
    with _server_file(vectors.copy_binary(chunk_ids, matrix, pipeline.version.column_type)) as path:
        session.execute(
            f"COPY {pipeline.vectors} (chunk_id, {quote_ident(pipeline.version.column)})"
            f" FROM {quote_literal(path)} WITH (FORMAT binary)"
        )


@contextmanager
def _server_file(data: bytes | bytearray) -> Iterator[str]:
    """Hold `data` in a file that only the server's user can read, in memory where the system has such a place."""
    directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - mkstemp makes a 0600 file of a new name
    descriptor, path = tempfile.mkstemp(prefix="embedline-copy-", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield path
    finally:
        Path(path).unlink()


def _write_state(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> None:
    if not documents:
        return
    count = len(pipeline.key_columns)
    keys = [document.key for document in documents]
    session.query(
        f"""
        INSERT INTO {pipeline.document} AS d ({pipeline.key_list}, content_hash, state, embedded_at)
        SELECT {", ".join(f"k.{quote_ident(c)}" for c in pipeline.key_columns)}, k.content_hash,
            CASE WHEN k.content_hash IS NULL THEN 'empty' ELSE 'embedded' END, clock_timestamp()
        FROM unnest({pipeline.key_arrays()}, ${count + 1}) AS k ({pipeline.key_list}, content_hash)
        ORDER BY {pipeline.key_list}
        ON CONFLICT ({pipeline.key_list}) DO UPDATE
        SET content_hash = excluded.content_hash, state = excluded.state, embedded_at = excluded.embedded_at
        """,
        [*pipeline.key_parameter_types, "bytea[]"],
        *key_columns(keys, count),
        [document.content_hash for document in documents],
    )
    forget_dead_letters(session, pipeline, keys)


def forget_dead_letters(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> None:
    """Remove the dead letters of keys that are embedded or gone."""
    from embedline.outbox import key_json

    if session.scalar(
        "SELECT 1 FROM embedline.dead_letter WHERE pipeline_id = $1 LIMIT 1", ["bigint"], pipeline.pipeline_id
    ):
        session.query(
            "DELETE FROM embedline.dead_letter WHERE pipeline_id = $1 AND key = ANY ($2::text[]::jsonb[])",
            ["bigint", "text[]"],
            pipeline.pipeline_id,
            [key_json(pipeline, key) for key in keys],
        )


def remove_absent(session: Session, pipeline: Pipeline, documents: Sequence[Document]) -> list[int]:
    """Remove chunks and state of keys whose row is gone or filtered out; return the indexes that are still there after all."""
    keys = [document.key for document in documents]
    arrays = key_columns(keys, len(pipeline.key_columns))
    free = _lock_state_rows(session, pipeline, arrays)
    present = {i for i, row in read_rows(session, pipeline, keys, 0).items() if row.accepted}
    gone = [i for i in range(len(keys)) if i in free and i not in present]
    gone_arrays = key_columns([keys[i] for i in gone], len(pipeline.key_columns))
    for table in (pipeline.chunk, pipeline.document):
        session.query(
            f"DELETE FROM {table} AS t USING unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
            f" WHERE {pipeline.key_join('t', 'k')}",
            pipeline.key_parameter_types,
            *gone_arrays,
        )
    _drop_placeholders(session, pipeline, documents, gone)
    if gone:
        forget_dead_letters(session, pipeline, [keys[i] for i in gone])
    return [i for i in range(len(keys)) if i not in set(gone)]
