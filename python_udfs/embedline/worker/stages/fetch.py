"""Fetch the files of rows that hold addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from embedline.core.file_addresses import address_of
from embedline.core.media import media_digest
from embedline.core.retry import MAX_ATTEMPTS, backoff_seconds
from embedline.documents.values import Document
from embedline.errors import FileUnavailable, InputRejected, UnreadableMedia
from embedline.models.pool import wait_result
from embedline.postgres.session import Session
from embedline.providers.files import FileFetcher
from embedline.queue.dead_letters import DeadLetter
from embedline.worker.batch import Batch, Unit

_CACHE_KEY = "embedline.file_fetcher"
_PREFIXES = "SELECT array(SELECT prefix FROM embedline.media_source ORDER BY prefix)"
# Files that are asked for before the first has come, so that a batch holds few more bytes than it may.
_AHEAD = 8


def load_prefixes(session: Session) -> tuple[str, ...]:
    """Return the beginnings of addresses under which files may be fetched."""
    return tuple(session.scalar(_PREFIXES))


def fetch_files(session: Session, batch: Batch, check_interrupts: Callable[[], None]) -> None:
    """Put the files of a batch in the place of their addresses.

    What cannot be fetched is the document's problem. Files beyond the batch's bytes are left to a later batch. No
    transaction is open meanwhile.
    """
    wanted = [document for document in batch.found if document.problem is None and _address(document) is not None]
    futures: dict[int, Future[bytes]] = {}
    size = 0
    try:
        for place, document in enumerate(wanted):
            if size >= batch.max_bytes:
                batch.postponed.append(document)
                continue
            for ahead in range(place, min(place + _AHEAD, len(wanted))):
                if ahead not in futures:
                    futures[ahead] = _fetcher(session).submit(_address(wanted[ahead]) or "", batch.media_prefixes)
            size += _take(document, futures.pop(place), check_interrupts)
    finally:
        for future in futures.values():
            future.cancel()
    batch.content_bytes += size
    batch.deferred_count += len(batch.postponed)
    batch.found = [document for document in batch.found if document not in batch.postponed]


def settle_problems(batch: Batch) -> None:
    """Requeue the documents whose files wait.

    Those that waited too often are given up.
    """
    batch.requeue([Unit([document]) for document in batch.postponed], 0.0, charged=False, error=None)
    batch.postponed = []
    for document in [document for document in batch.found if isinstance(document.problem, FileUnavailable)]:
        message, row = str(document.problem), document.row
        if row.attempts >= MAX_ATTEMPTS:
            letter = DeadLetter(row, "read", FileUnavailable.sqlstate, message, document.content_hash)
            batch.quarantine([letter])
        else:
            batch.requeue([Unit([document])], backoff_seconds(row.attempts), charged=True, error=message)
            batch.source.record_error(message)
        batch.found.remove(document)


def _address(document: Document) -> str | None:
    """Return the address of a document, or of the segment that a version lacks.

    None if there is nothing to fetch.
    """
    if isinstance(document.content, str):
        return address_of(document.content)
    part = document.chunks[0].media if document.chunks else None
    return address_of(part.data.decode()) if part is not None and part.is_address else None


def _take(document: Document, future: Future[bytes], check_interrupts: Callable[[], None]) -> int:
    try:
        file = wait_result(future, check_interrupts)
    except InputRejected as error:
        document.problem = UnreadableMedia(error.message, detail=error.detail, hint=error.hint)
        return 0
    except FileUnavailable as error:
        document.problem = error
        return 0
    if document.chunks:
        _put_into_chunk(document, file)
    else:
        document.content = file
    return len(file)


def _put_into_chunk(document: Document, file: bytes) -> None:
    """Give a chunk of a version its file.

    The file must not have changed since the chunk was cut.
    """
    chunk = document.chunks[0]
    part = chunk.media
    if part is None or media_digest(hashlib.sha256(file).digest(), part.start, part.end) != chunk.digest:
        document.problem = UnreadableMedia(
            "the file has changed, and what its row says of it has not",
            hint="Change the row as well: what changed_by names must change with the file.",
        )
        return
    document.chunks = [chunk._replace(media=replace(part, data=file, is_address=False))]


def _fetcher(session: Session) -> FileFetcher:
    fetcher: FileFetcher = session.cache.setdefault(_CACHE_KEY, FileFetcher())
    return fetcher
