"""Define a source row on its way to chunks and vectors, and stored chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedline.chunking import Chunk
from embedline.errors import EmbedlineError
from embedline.queue.outbox import ClaimedRow, Key

Vector = npt.NDArray[np.float32]
# Stands for the vector of a chunk that is not embedded, in lists that need a vector for each chunk.
NO_VECTOR: Vector = np.empty(0, dtype=np.float32)


@dataclass(slots=True)
class Document:
    """A source row on its way: its claim, and the content read from it.

    `prefix` stands before each chunk of a text when it is embedded; of a file it is the caption. `other_chunks` are its
    chunks in the other chunk sets, by set; other versions embed them.
    """

    row: ClaimedRow
    content_hash: bytes | None = None
    content: str | bytes | None = None
    prefix: str = ""
    chunks: list[Chunk] = field(default_factory=list)
    other_chunks: dict[int, list[Chunk]] = field(default_factory=dict)
    problem: EmbedlineError | None = None
    # Share of unknown tokens of the chunks that the model cannot read, by digest. They are not embedded.
    unreadable: dict[bytes, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Return the row's key, each column as text."""
        return self.row.key


class ReadRow(NamedTuple):
    """The content of a key in the source.

    `accepted` if the filter accepts it; `deferred` if the content was too much for one read; `given_up` if it is a dead
    letter. `current` if this recipe embedded exactly this content already, so that the content is not returned again.
    """

    accepted: bool
    deferred: bool
    current: bool
    given_up: bool
    content: str | bytes | None
    content_hash: bytes | None
    prefix: str


class StoredChunk(NamedTuple):
    """A chunk that is in the table; `caption` is that of a segment of media."""

    chunk_id: int
    digest: bytes
    position: tuple[int, int, int]
    caption: str | None = None


@dataclass
class WriteResult:
    """The results of one write, by index into the documents given."""

    written: list[int] = field(default_factory=list)
    stale: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)
