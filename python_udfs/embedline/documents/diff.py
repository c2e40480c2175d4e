"""Compare stored chunks with wanted ones, and write the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedline.catalog.values import ChunkSet, Pipeline
from embedline.chunking import Chunk
from embedline.core import names
from embedline.core.sql_text import quote_literal
from embedline.documents.copy import copy_rows
from embedline.documents.values import Document, StoredChunk
from embedline.keywords.entries import add_entries, remove_entries
from embedline.keywords.segments import pack_when_many
from embedline.postgres.session import Session
from embedline.queue.outbox import Key, key_columns


def stored_chunks(
    session: Session, pipeline: Pipeline, documents: Sequence[Document], wanted: Sequence[int], chunk_set: ChunkSet
) -> dict[int, list[StoredChunk]]:
    """Return the documents' chunks of a set, by index.

    Each document in `wanted` has an entry. A chunk of the version's own set must have its vector; those of other sets
    get theirs later.
    """
    if not wanted:
        return {}
    count = len(pipeline.key_columns)
    is_own = chunk_set.number == pipeline.chunk_set.number
    usable = f"v.chunk_id IS NOT NULL AND coalesce(d.embedded_at >= ${count + 1}::timestamptz, true)"
    rows = session.query(
        f"""
        SELECT k.ordinality, c.chunk_id, uuid_send(c.content_hash) AS digest, c.seq, c.start_offset, c.end_offset,
            {"c.content" if pipeline.modality != "text" else "NULL::text"} AS caption,
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
        # A chunk without a usable vector matches nothing, so it is deleted and its content is added again.
        digest = row["digest"] if row["usable"] else b""
        stored[wanted[row["ordinality"] - 1]].append(StoredChunk(row["chunk_id"], digest, position, row["caption"]))
    return stored


def diff(
    stored: Sequence[StoredChunk], wanted: Sequence[Chunk]
) -> tuple[list[int], list[tuple[int, Chunk]], list[Chunk]]:
    """Return (chunk ids to delete, stored chunks that only moved, chunks to add).

    Chunks are matched by content, segments of media by their caption, too: a keyword index knows a chunk by its id.
    """
    by_content: dict[tuple[bytes, str | None], list[StoredChunk]] = {}
    for candidate in sorted(stored, key=lambda c: c.position, reverse=True):
        by_content.setdefault((candidate.digest, candidate.caption), []).append(candidate)
    moved: list[tuple[int, Chunk]] = []
    added: list[Chunk] = []
    for chunk in wanted:
        candidates = by_content.get((chunk.digest, None if chunk.media is None else chunk.content))
        if not candidates:
            added.append(chunk)
            continue
        kept = candidates.pop()
        if kept.position != (chunk.sequence, chunk.start, chunk.end):
            moved.append((kept.chunk_id, chunk))
    removed = [left.chunk_id for candidates in by_content.values() for left in candidates]
    return removed, moved, added


@dataclass
class Changes:
    """The changes of a write to one chunk set.

    They are chunk ids to delete, chunks that only moved, and chunks to add.
    """

    removed: list[int] = field(default_factory=list)
    moved: list[tuple[int, Chunk]] = field(default_factory=list)
    added: list[tuple[Key, Chunk]] = field(default_factory=list)

    def add(self, key: Key, change: tuple[list[int], list[tuple[int, Chunk]], list[Chunk]]) -> None:
        """Add the difference of one document, as `diff` returns it."""
        removed, moved, added = change
        self.removed += removed
        self.moved += moved
        self.added += [(key, chunk) for chunk in added]


def apply(session: Session, pipeline: Pipeline, chunk_set: ChunkSet, changes: Changes) -> npt.NDArray[np.int64]:
    """Write the changes into the set's table.

    Returns the ids of the chunks added, in their order.
    """
    table = pipeline.chunk_table(chunk_set.number)
    if changes.removed:
        session.query(f"DELETE FROM {table} WHERE chunk_id = ANY ($1)", ["bigint[]"], changes.removed)
        if pipeline.keyword is not None:
            remove_entries(session, pipeline, chunk_set.number, changes.removed)
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
    if pipeline.keyword is not None:
        add_entries(session, pipeline, chunk_set.number, ids.tolist())
        pack_when_many(session, pipeline, chunk_set.number, len(ids))
    return ids


def _next_chunk_ids(session: Session, pipeline: Pipeline, chunk_set: ChunkSet, count: int) -> npt.NDArray[np.int64]:
    sequence = pipeline.generated(f"{names.chunk_suffix(chunk_set.number)}_chunk_id_seq")
    rows = session.query(
        f"SELECT array_agg(nextval({quote_literal(sequence)}::regclass)) AS ids FROM generate_series(1, $1)",
        ["integer"],
        count,
    )
    return np.asarray(rows[0]["ids"], dtype=np.int64)
