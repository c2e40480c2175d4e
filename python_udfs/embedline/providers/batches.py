"""Define the state, the answers and the limits of a provider's batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from embedline.core.embedding import EmbeddingBlock
from embedline.errors import InputRejected, ProviderError

# Texts of one batch, and bytes of its file: OpenAI takes 50,000 texts and 200 MB. The file is built in a backend's memory.
MOST_TEXTS, MOST_FILE_BYTES = 50_000, 48 << 20
# Bytes of a line beside its text.
LINE_BYTES = 400
# States of a batch after which nothing more comes. "expired" and "cancelled" ones have the answers that were ready.
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class BatchState:
    """What the provider tells of a batch."""

    provider_id: str
    status: str
    files: tuple[str, ...] = ()
    input_file: str | None = None
    # (code, message, number of the line) of each reason why the batch was refused.
    errors: tuple[tuple[str, str, int | None], ...] = ()


@dataclass(frozen=True)
class BatchAnswer:
    """One line of the answers: a text's vector, or why there is none.

    `is_refused` if the provider has refused the text. Otherwise it was not asked for it: the batch expired.
    """

    custom_id: str
    block: EmbeddingBlock | None
    detail: str = ""
    is_refused: bool = False


@dataclass
class BatchFiles:
    """The files of answers, as they were downloaded."""

    parts: list[IO[bytes]] = field(default_factory=list)

    def lines(self) -> Iterator[bytes]:
        """Yield all lines."""
        for part in self.parts:
            part.seek(0)
            yield from part

    def close(self) -> None:
        """Remove them."""
        for part in self.parts:
            part.close()


def is_lost(error: BaseException) -> bool:
    """Return True if the provider knows nothing of a batch."""
    return isinstance(error, ProviderError) and not isinstance(error, InputRejected) and error.status == 404
