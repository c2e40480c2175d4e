"""Write many rows by COPY from a file, with vectors in binary form.

The file is the server's; the binary form is pgvector's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedline.catalog.values import Pipeline
from embedline.chunking import Chunk
from embedline.core import vectors
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.documents.values import Vector
from embedline.errors import InsufficientDisk
from embedline.postgres.session import Session
from embedline.queue.outbox import Key

_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})
_COPY_NULL = "\\N"


def stacked(rows: list[Vector]) -> vectors.FloatMatrix:
    """Return vectors as one matrix.

    The result is that of np.stack, without its work on each row.
    """
    return np.concatenate(rows).reshape(len(rows), -1)


def copy_rows(
    session: Session,
    pipeline: Pipeline,
    table: str,
    chunk_ids: npt.NDArray[np.int64],
    added: Sequence[tuple[Key, Chunk]],
) -> None:
    """Write chunks with COPY in text format.

    Keys go through their types' own input functions.
    """
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
    """Make PostgreSQL plan its checks of foreign keys with the index.

    A session keeps these plans, so they must not depend on the present size of the tables. A plan made for 50 chunks
    read the whole table for each of the 35,000 chunks of a document of 50 MB. That took more than a minute.
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
    """Write vectors with COPY BINARY.

    It is the only fast way from PL/Python into a vector column.
    """
    data = vectors.copy_binary(chunk_ids, matrix, pipeline.version.column_type)
    with _server_file(data) as path, foreign_keys_by_index(session):
        session.execute(
            f"COPY {pipeline.vectors} (chunk_id, {quote_ident(pipeline.version.column)})"
            f" FROM {quote_literal(path)} WITH (FORMAT binary)"
        )


def copy_matrix(session: Session, table: str, ids: npt.NDArray[np.int64], matrix: vectors.FloatMatrix) -> None:
    """Write rows (id, vector) into a table of these two columns with COPY BINARY."""
    with _server_file(vectors.copy_binary(ids, matrix, "vector")) as path, foreign_keys_by_index(session):
        session.execute(f"COPY {table} FROM {quote_literal(path)} WITH (FORMAT binary)")


@contextmanager
def _server_file(data: bytes | bytearray) -> Iterator[str]:
    """Hold `data` in a file in memory that no other process can open.

    It ends with the process, however that ends. COPY opens it by its descriptor's name, in the same process. A system
    without such files gets one of mode 0600 in the server's temporary directory.
    """
    in_memory = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")
    descriptor, path = _create_file(in_memory)
    try:
        try:
            _write_all(descriptor, data)
            yield f"/proc/self/fd/{descriptor}" if in_memory else path
        finally:
            os.close(descriptor)
    finally:
        if not in_memory:
            Path(path).unlink()


@contextmanager
def _no_room() -> Iterator[None]:
    """Raise InsufficientDisk for a failure to write.

    That error passes, so a worker keeps its answers and tries again.
    """
    try:
        yield
    except OSError as error:
        raise InsufficientDisk(
            f"the file for COPY cannot be written: {error.strerror}",
            hint="Free memory, or space in the server's temporary directory.",
        ) from error


def _create_file(in_memory: bool) -> tuple[int, str]:
    """Return descriptor and path of a new file."""
    with _no_room():
        return (os.memfd_create("embedline-copy"), "") if in_memory else tempfile.mkstemp(prefix="embedline-copy-")


def _write_all(descriptor: int, data: bytes | bytearray) -> None:
    rest = memoryview(data)
    with _no_room():
        while rest:
            rest = rest[os.write(descriptor, rest) :]
