"""Cut the images or recordings of a batch into segments."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from embedline.catalog.values import ChunkSet
from embedline.chunking import Chunk
from embedline.core.media import MAX_MEDIA_BYTES, MediaPart, media_digest
from embedline.core.text import repair_text
from embedline.documents.values import Document
from embedline.errors import ProviderError, UnreadableMedia, UnusableText
from embedline.models.media_segments import Place, find_segments
from embedline.postgres.session import Session
from embedline.worker.batch import Batch
from embedline.worker.stages.fetch import fetch_files


def chunk_media(session: Session, batch: Batch, check_interrupts: Callable[[], None]) -> None:
    """Give each document of a batch its chunks.

    A file that cannot be read is the document's problem. The model host finds the segments, because only it decodes
    files. No transaction is open meanwhile.
    """
    pipeline = batch.pipeline
    if pipeline.is_reference:
        fetch_files(session, batch, check_interrupts)
    wanted = [document for document in batch.found if isinstance(document.content, bytes) and _is_usable(document)]
    files = [document.content for document in wanted if isinstance(document.content, bytes)]
    for chunk_set in (pipeline.chunk_set, *pipeline.other_sets):
        try:
            found = find_segments(session, pipeline, chunk_set.spec, files, check_interrupts)
        except ProviderError as error:
            for document in wanted:
                document.problem = error
            break
        for document, places in zip(wanted, found, strict=True):
            _cut(batch, document, chunk_set, places)
    for document in batch.found:
        document.content = None


def _is_usable(document: Document) -> bool:
    content = document.content or b""
    if document.problem is not None:
        return False
    if not content:
        document.problem = UnreadableMedia("the file is empty")
    elif len(content) > MAX_MEDIA_BYTES:
        document.problem = UnreadableMedia(f"the file has more than {MAX_MEDIA_BYTES:,} bytes, which are read at most")
    return document.problem is None


def _cut(batch: Batch, document: Document, chunk_set: ChunkSet, places: Sequence[Place] | str) -> None:
    if isinstance(places, str):
        document.problem = document.problem or UnreadableMedia(places)
        return
    if document.problem is not None or not isinstance(document.content, bytes):
        return
    try:
        caption = repair_text(document.prefix) if document.prefix.strip() else ""
    except UnusableText:
        caption = ""
    pipeline, digest = batch.pipeline, hashlib.sha256(document.content).digest()
    chunks = [
        Chunk(
            sequence, start, end, caption, media_digest(digest, start, end),
            media=MediaPart(pipeline.modality, document.content, start, end),
        )
        for sequence, (start, end) in enumerate(places)
    ]  # fmt: skip
    if chunk_set.number == pipeline.chunk_set.number:
        document.chunks = chunks
    else:
        document.other_chunks[chunk_set.number] = chunks
