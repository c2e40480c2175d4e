"""Read the files of stored segments from the source again.

A chunk's table holds the place of a segment and its caption, never the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedline.catalog.values import Pipeline
from embedline.core.media import MediaPart, ModelInput, media_digest
from embedline.documents.read import read_contents, read_isolated
from embedline.postgres.session import Session
from embedline.queue.outbox import Key

# Bytes that one read returns whatever the limit is, so that a single large file is read.
_LEAST_BYTES = 1
# Bytes of files that are read to compare stored vectors with the model's.
_SAMPLE_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredFiles:
    """What was read of stored segments, by index of the chunk.

    Chunks that are gone are in none of the three, nor are those whose row has another file by now.
    """

    parts: dict[int, MediaPart] = field(default_factory=dict)
    # Chunks that are left for another read.
    left: set[int] = field(default_factory=set)
    # Chunks of rows whose expressions raise.
    failed: dict[int, Exception] = field(default_factory=dict)


def read_files(session: Session, pipeline: Pipeline, chunk_ids: Sequence[int | str], max_bytes: int) -> StoredFiles:
    """Return the segments of chunks with their files.

    If rows hold addresses, these stand in the place of the files. Files beyond `max_bytes` are left, but for the first.
    """
    keys = ", ".join(f"c.{column}::text" for column in pipeline.quoted_key_columns)
    rows = session.query(
        f"""
        SELECT w.ordinality, ARRAY[{keys}] AS key, c.start_offset, c.end_offset, uuid_send(c.content_hash) AS digest
        FROM unnest($1::bigint[]) WITH ORDINALITY AS w (chunk_id, ordinality)
        JOIN {pipeline.chunk} AS c ON c.chunk_id = w.chunk_id
        """,
        ["text[]"],
        [str(chunk_id) for chunk_id in chunk_ids],
    )
    wanted: dict[Key, list[int]] = {}
    for place, row in enumerate(rows):
        wanted.setdefault(tuple(row["key"]), []).append(place)
    most = max(max_bytes, _LEAST_BYTES)
    contents, failed = read_isolated(
        session, pipeline, list(wanted), lambda keys: read_contents(session, pipeline, keys, most)
    )
    found = StoredFiles()
    for position, places in enumerate(wanted.values()):
        if position in failed:
            found.failed.update({int(rows[place]["ordinality"]) - 1: failed[position] for place in places})
        read = contents.get(position)
        if read is None or (not read.deferred and read.content is None):
            continue
        digest = hashlib.sha256(read.content).digest() if isinstance(read.content, bytes) else b""
        for place in places:
            row = rows[place]
            index, start, end = int(row["ordinality"]) - 1, int(row["start_offset"]), int(row["end_offset"])
            if read.deferred:
                found.left.add(index)
            elif isinstance(read.content, str):
                address = read.content.encode()
                found.parts[index] = MediaPart(pipeline.modality, address, start, end, is_address=True)
            elif isinstance(read.content, bytes) and media_digest(digest, start, end) == bytes(row["digest"]):
                found.parts[index] = MediaPart(pipeline.modality, read.content, start, end)
    return found


def stored_inputs(
    session: Session, pipeline: Pipeline, rows: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], ModelInput]]:
    """Return stored chunks with what their model reads.

    They are rows of chunk_id, prefix and content. Segments whose row has another file by now, or cannot be read, are left
    out, as are those beyond 64 MiB in all. Files that would have to be fetched are left out, too.
    """
    if pipeline.modality == "text":
        return [(row, (row["prefix"] or "") + row["content"].strip()) for row in rows]
    if pipeline.is_reference:
        # A transaction is open, and must not wait for another machine.
        return []
    files = read_files(session, pipeline, [row["chunk_id"] for row in rows], _SAMPLE_BYTES).parts
    return [(row, files[place]) for place, row in enumerate(rows) if place in files]
