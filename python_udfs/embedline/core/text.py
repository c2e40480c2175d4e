"""Repair and check texts before they reach a model."""

from __future__ import annotations

import unicodedata

from embedline.errors import UnusableText

# Characters that are repaired at a time, because ftfy walks a text several times.
_REPAIR_PIECE_CHARACTERS = 1_000_000


def repair_text(text: str) -> str:
    """Return `text` with mojibake and HTML entities repaired.

    Control characters are removed. Raises UnusableText if nothing printable is left, because such a text has no meaning
    to embed.
    """
    is_plain = text.isascii() and "&" not in text and text.isprintable()
    repaired = text if is_plain else _repair(text)
    if not any(map(_is_visible, repaired)):
        raise UnusableText(
            "the content is empty or has nothing printable in it",
            detail=f"{len(text)} characters, none of them visible after repair.",
        )
    return repaired


def _is_visible(character: str) -> bool:
    # Z: separators, C: control, format, unassigned. U+FFFD stands for bytes that were not text.
    return character != "\ufffd" and unicodedata.category(character)[0] not in "ZC"


def _repair(text: str) -> str:
    import ftfy

    # unescape_html=True repairs entities even next to a "<", because sources often hold fragments of HTML. NFC keeps
    # the text as its writer sees it. Quotes and dashes carry meaning, so they stay.
    config = ftfy.TextFixerConfig(unescape_html=True, uncurl_quotes=False, explain=False)
    pieces = (text[i : i + _REPAIR_PIECE_CHARACTERS] for i in range(0, len(text), _REPAIR_PIECE_CHARACTERS))
    return "".join(ftfy.fix_text(piece, config) for piece in pieces)
