"""Lend vectors to a version, and have its chunks take them.

An import and an adoption differ only in the origin of hashes and vectors. Workers find what was lent before they ask the
model. So a chunk with the same content costs nothing. Any other is embedded as usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np

from embedline.client.connection import Connection
from embedline.client.transfer.recipe import VersionRecipe
from embedline.core.vectors import FloatMatrix

# Bytes of vectors sent in one statement, and the most vectors.
BATCH_BYTES, BATCH_ROWS = 4_000_000, 2_000
# Rows of one call of embed_pending: a second or two of work, so that the progress moves.
_EMBED_ROWS = 2_000
# Seconds between two questions while other workers have the rest, and without any progress before that is given up.
_POLL_SECONDS, _PATIENCE_SECONDS = 0.5, 30.0
_ADD = "SELECT embedline.add_loan(%s, %s, %s::uuid[], %s::bytea[])"
_END = "SELECT lent, taken, chunks, lent_chunks FROM embedline.end_loan(%s, %s)"
_EMBED = "SELECT embedline.embed_pending(%s, %s)"
_LEFT = """
    SELECT p.state, v.state = 'complete' AS is_complete, w.vectors, w.queued, s.pending
    FROM embedline.pipeline AS p
    JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id AND v.number = %s
    JOIN embedline.versions AS w ON w.pipeline = p.name AND w.version = v.number
    JOIN embedline.status AS s ON s.pipeline = p.name
    WHERE p.name = %s
"""

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Lent:
    """The result of a loan.

    `given` vectors were read, of which `lent` differ in their text. Of these `taken` were taken by chunks. `embedded`
    chunks of the version have a vector of the model itself. `is_done` is False if something still waits; then the loan goes
    on, and `taken` is None.
    """

    given: int
    lent: int
    taken: int | None
    chunks: int | None
    embedded: int | None
    is_done: bool
    is_paused: bool

    @property
    def unmatched(self) -> int | None:
        """Return the number of lent vectors that no chunk took."""
        return None if self.taken is None else self.lent - self.taken

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for a program."""
        return {
            "given": self.given, "lent": self.lent, "taken": self.taken, "unmatched": self.unmatched,
            "chunks": self.chunks, "embedded": self.embedded, "done": self.is_done, "paused": self.is_paused,
        }  # fmt: skip


def batch_rows(dimensions: int) -> int:
    """Return the vectors of one statement."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // (4 * dimensions)))


def send_form(matrix: FloatMatrix, column_type: str) -> list[bytes]:
    """Return vectors in the binary form of their column.

    That is the dimensions, a zero, and big-endian floats.
    """
    element = ">f4" if column_type == "vector" else ">f2"
    count, dimensions = matrix.shape
    layout = np.dtype([("dimensions", ">i2"), ("unused", ">i2"), ("values", element, (dimensions,))])
    rows = np.zeros(count, dtype=layout)
    rows["dimensions"], rows["values"] = dimensions, matrix
    data, size = rows.tobytes(), layout.itemsize
    return [data[i : i + size] for i in range(0, len(data), size)]


def lend(
    connection: Connection,
    recipe: VersionRecipe,
    batches: Iterable[tuple[list[bytes], FloatMatrix]],
    total: int | None,
    progress: Progress,
) -> tuple[int, int]:
    """Add vectors to the version's loan.

    Returns how many were given, and how many of them were new.
    Outside a transaction each batch has one of its own, and after a failure a second run goes on.
    """
    given = added = 0
    for hashes, matrix in batches:
        if not hashes:
            continue
        digests = [UUID(bytes=found) for found in hashes]
        sent = send_form(matrix, recipe.column_type)
        row = connection.execute(_ADD, (recipe.pipeline, recipe.version, digests, sent), binary=True).fetchone()
        given += len(hashes)
        added += int(row[0]) if row else 0
        progress("lending", given, total)
    return given, added


def take(connection: Connection, recipe: VersionRecipe, progress: Progress) -> tuple[bool, bool]:
    """Have the version's chunks take what was lent, until nothing waits.

    Returns whether all is done, and whether the pipeline is paused. What finds no lent vector is embedded by the model.
    """
    progressed_at, last = time.monotonic(), None
    while True:
        state, is_complete, vectors, queued, pending = _left(connection, recipe)
        # The queue of the source feeds every version.
        if is_complete and not queued and not pending:
            progress("taking", vectors, vectors)
            return True, False
        if state == "paused":
            return False, True
        if (vectors, queued, pending) != last:
            progressed_at, last = time.monotonic(), (vectors, queued, pending)
        elif time.monotonic() - progressed_at > _PATIENCE_SECONDS:
            return False, False
        progress("taking", vectors, None)
        row = connection.execute(_EMBED, (_EMBED_ROWS, recipe.pipeline)).fetchone()
        if not (row and row[0]):
            time.sleep(_POLL_SECONDS)


def _left(connection: Connection, recipe: VersionRecipe) -> tuple[str, bool, int, int, int]:
    row = connection.execute(_LEFT, (recipe.version, recipe.pipeline)).fetchone()
    assert row is not None, "the version was there a moment ago"
    return str(row[0]), bool(row[1]), int(row[2]), int(row[3]), int(row[4])


def settle(
    connection: Connection, recipe: VersionRecipe, given: int, lent: int, progress: Progress, *, waits: bool
) -> Lent:
    """Wait until the chunks have taken what they can, and end the loan.

    If something still waits, the loan goes on: workers take from it, for a week.
    """
    is_done, is_paused = (
        take(connection, recipe, progress) if waits else (False, _left(connection, recipe)[0] == "paused")
    )
    if not is_done:
        return Lent(given, lent, None, None, None, is_done=False, is_paused=is_paused)
    row = connection.execute(_END, (recipe.pipeline, recipe.version)).fetchone()
    assert row is not None
    all_lent, taken, chunks, lent_chunks = map(int, row)
    return Lent(given, all_lent, taken, chunks, chunks - lent_chunks, is_done=True, is_paused=False)
