"""A source row on its way to chunks and vectors, and what is stored of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedline.chunking import Chunk
from embedline.errors import EmbedlineError
from embedline.queue.outbox import ClaimedRow, Key

Vector = npt.NDArray[np.float32]
# Stands for the vector of a chunk that is given up, where it has to have one.
NO_VECTOR: Vector = np.empty(0, dtype=np.float32)


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
