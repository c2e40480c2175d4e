"""Find cuts that do not tear a character as a reader sees it."""

from __future__ import annotations

import unicodedata

# Longest run of marks that is kept together, in characters. Runs in use are shorter.
_LONGEST = 32


def boundary_at_or_before(text: str, at: int) -> int:
    """Return the nearest place at or before `at` that tears no character.

    It is not before `at` by more than 32 characters.
    """
    for place in range(at, max(at - _LONGEST, 0), -1):
        if place >= len(text) or not _joined(text[place - 1], text[place]):
            return place
    return at if at > _LONGEST else 0


def _joined(before: str, after: str) -> bool:
    # CR LF, marks, characters after a zero width joiner, skin tones.
    return (
        (before == "\r" and after == "\n")
        or (not after.isascii() and (unicodedata.category(after)[0] == "M" or "\U0001f3fb" <= after <= "\U0001f3ff"))
        or "\u200d" in (before, after)
    )
