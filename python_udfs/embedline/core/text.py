"""Text repair and validation before anything reaches a model."""

from __future__ import annotations

import unicodedata

from embedline.errors import UnusableText

# ftfy's detection walks the text several times; a text beyond this many characters is repaired in pieces of it.
_REPAIR_PIECE_CHARACTERS = 1_000_000


def repair_text(text: str) -> str:
    """Return `text` with mojibake and HTML entities repaired and control characters taken out.

    Raises UnusableText where nothing printable is left: such a text has no meaning to embed.
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
    # Z: separators, C: control, format, unassigned. U+FFFD is what is left of bytes that were no text.
    return character != "\ufffd" and unicodedata.category(character)[0] not in "ZC"


def _repair(text: str) -> str:
    import ftfy

    # unescape_html=True: entities are repaired even next to a "<", because sources often hold fragments of HTML.
    # NFC keeps the text as its writer sees it; quotes and dashes are meaning, so they stay.
    config = ftfy.TextFixerConfig(unescape_html=True, uncurl_quotes=False, explain=False)
    pieces = (text[i : i + _REPAIR_PIECE_CHARACTERS] for i in range(0, len(text), _REPAIR_PIECE_CHARACTERS))
    return "".join(ftfy.fix_text(piece, config) for piece in pieces)
