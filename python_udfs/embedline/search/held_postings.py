"""Keep what a keyword ranking reads where no SQL can read it.

Postings tell which chunks have a word. A dictionary's words would tell most of a hidden row's text. So a caller is given a
number, and the ranking takes the postings of that number out of the session's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedline.postgres.session import Plpy, Session, SessionCache

_COLUMNS = ("segment_id", "word", "chunk_count", "total_length", "heads", "postings", "counts")
# Keys in GD of the postings by number, and of the last number.
_HELD, _LAST = "embedline.postings", "embedline.postings.last"
# Postings that are kept for rankings that did not take them, such as those of a call by hand.
_MOST_HELD = 2


def hold_postings(plpy: Plpy, cache: SessionCache, columns: Sequence[Sequence[Any]]) -> int:
    """Keep rows, given column by column, and return their number."""
    held: dict[int, list[dict[str, Any]]] = cache.setdefault(_HELD, {})
    number = cache[_LAST] = int(cache.get(_LAST, 0)) + 1
    held[number] = [dict(zip(_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
    while len(held) > _MOST_HELD:
        del held[min(held)]
    return number


def take_postings(session: Session, number: int) -> list[dict[str, Any]]:
    """Return the rows of a number, and forget them."""
    held: dict[int, list[dict[str, Any]]] = session.cache[_HELD]
    return held.pop(number)
