"""Find the segments of images and recordings through the model host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from embedline.catalog.values import Pipeline
from embedline.chunking import ChunkingSpec
from embedline.core.media import MAX_MEDIA_BYTES
from embedline.models.pool import embedder_for, wait_result
from embedline.postgres.session import Session

# The start and the end of a segment; see core.media.MediaPart.
Place = tuple[int, int]
# Method that embeds each file whole, so that no host has to look into it first.
_WHOLE = "none"
# Files of one request.
_FILES = 64


def find_segments(
    session: Session, pipeline: Pipeline, spec: ChunkingSpec, files: Sequence[bytes], on_wait: Callable[[], None]
) -> list[list[Place] | str]:
    """Return the segments of each file, or the reason why it cannot be decoded.

    Calls `on_wait` about every 0.1 s. Raises ProviderError if the model host fails.
    """
    if spec.method == _WHOLE:
        return [[(0, 0)] for _ in files]
    embedder = embedder_for(session, pipeline.version.model)
    found: list[list[Place] | str] = []
    for part in _requests(files):
        answer: list[list[Place] | str] = wait_result(embedder.submit_segments(part, pipeline.modality, spec), on_wait)
        found += answer
    return found


def _requests(files: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Yield the files in parts that a request can carry."""
    part: list[bytes] = []
    size = 0
    for file in files:
        if part and (len(part) == _FILES or size + len(file) > MAX_MEDIA_BYTES):
            yield part
            part, size = [], 0
        part.append(file)
        size += len(file)
    if part:
        yield part
