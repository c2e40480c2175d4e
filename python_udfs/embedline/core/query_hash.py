"""Tell which queries count as the same."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# What stands between words: spaces, punctuation, symbols, and the underscore.
_BETWEEN = re.compile(r"[\W_]+")


def query_hash(query: str) -> str:
    """Return the SHA-256 (hex) of a query's words in lower case.

    Queries that differ only in case, punctuation, spaces or Unicode's forms of a character have the same. A query without
    a word is hashed as it is.
    """
    folded = unicodedata.normalize("NFKC", query).casefold()
    words = " ".join(_BETWEEN.sub(" ", folded).split())
    return hashlib.sha256((words or folded).encode("utf-8", "surrogatepass")).hexdigest()
