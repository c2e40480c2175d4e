"""Cache the vectors of recent queries, within bounds of bytes and of age.

Pure: there is no clock and no socket here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from embedline.core.embedding import EmbeddingBlock

# Bytes of all entries: about 5,000 vectors of 1,536 dimensions.
MAX_BYTES = 32 << 20
# Seconds for which a vector is used, because a provider may change a model behind its name. Stored vectors are compared
# with the model each night, and a cached query should not be older than the answer to that comparison.
MAX_AGE_SECONDS = 600.0
# Bytes that Python takes for an entry beside the vector: the key, the block and the places in the dictionary.
_ENTRY_BYTES = 400


@dataclass(frozen=True)
class _Entry:
    block: EmbeddingBlock
    since: float

    @property
    def size(self) -> int:
        return len(self.block.data) + _ENTRY_BYTES


def cache_key(identity: str, text: str) -> bytes:
    """Return the key of a query's vector.

    It is a hash, so that no text outlives its request. `identity` is everything that decides the vector of a text: the
    model's fingerprint, and the options sent with the text.
    """
    return hashlib.sha256(f"{identity}\0{text}".encode(errors="surrogatepass")).digest()


class QueryCache:
    """Query vectors by `cache_key`; the least recently used is removed first.

    Times are seconds of any one clock.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_age_seconds: float = MAX_AGE_SECONDS) -> None:
        self._max_bytes, self._max_age = max_bytes, max_age_seconds
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.size = 0

    def get(self, key: bytes, now: float) -> EmbeddingBlock | None:
        """Return the vector of a key, None if there is none or it is too old."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now - entry.since > self._max_age:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.block

    def put(self, key: bytes, block: EmbeddingBlock, now: float) -> None:
        """Keep a vector, unless it alone is larger than the bound."""
        self._remove(key)
        entry = _Entry(block, now)
        if entry.size > self._max_bytes:
            return
        self._entries[key] = entry
        self.size += entry.size
        while self.size > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def __len__(self) -> int:
        return len(self._entries)

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= entry.size
