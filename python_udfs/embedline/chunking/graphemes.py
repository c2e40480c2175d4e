"""Where a text may be cut without tearing what a reader sees as one character."""

from __future__ import annotations

import unicodedata

# A run of marks that is longer than any in use is cut all the same.
_LONGEST = 32


def boundary_at_or_before(text: str, at: int) -> int:
    """Return the nearest place at or before `at`, not before it by more than 32 characters, that tears no character."""
    for place in range(at, max(at - _LONGEST, 0), -1):
        if place >= len(text) or not _joined(text[place - 1], text[place]):
            return place
    return at if at > _LONGEST else 0


def _joined(before: str, after: str) -> bool:
    # CR LF, marks, what a zero width joiner joins, skin tones.
    return (
        (before == "\r" and after == "\n")
        or (not after.isascii() and (unicodedata.category(after)[0] == "M" or "\U0001f3fb" <= after <= "\U0001f3ff"))
        or "\u200d" in (before, after)
    )
