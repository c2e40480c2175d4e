"""Embed sentences for the semantic chunker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from embedline.catalog.values import Version
from embedline.postgres.session import Session

if TYPE_CHECKING:
    from embedline.chunking.semantic import EmbedSentences
    from embedline.core.vectors import FloatMatrix
from embedline.models.pool import embedder_for, wait_result


def sentence_embedder(session: Session, version: Version) -> EmbedSentences:
    """Return the function that embeds sentences for the semantic chunker.

    It returns one float32 row for each sentence, not normalised.
    """

    def embed(sentences: Sequence[str], on_wait: Callable[[], None]) -> FloatMatrix:
        from embedline.core import vectors

        embedder = embedder_for(session, version.model)
        size = version.model.request_items
        parts = [embedder.submit(sentences[i : i + size], "document") for i in range(0, len(sentences), size)]
        blocks = [wait_result(part, on_wait) for part in parts]
        data = b"".join(block.data for block in blocks)
        return vectors.matrix_from_bytes(data, len(sentences), version.dimensions)

    return embed
