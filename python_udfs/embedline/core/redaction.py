"""Take keys out of the words of a service.

A service may repeat the key that it was sent: as it is, in part, or as base64, percent-encoded, escaped or in capitals.
"""

from __future__ import annotations

import base64
import html
import re
import string
from collections.abc import Iterator
from urllib.parse import unquote

_MESSAGE_CHARACTERS = 500
# Characters that are read. A search for a key in all its forms takes 5 ms for so many.
_READ_CHARACTERS = 4000
_REDACTED = "[redacted]"
_SECRETS = re.compile(r"\b[sp]k-[^\s\"',;}\])]+|(?i:bearer)\s+[^\s\"',;}]+|(?<=://)[^/\s@]+@")
# Letters and digits in a row that are no accident: shorter parts of a key are words, too.
_PART = 12
# Letters and digits of a key that is looked for in other forms as a whole, if it is shorter than a part.
_SHORT_KEY = 8
_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_OTHER = re.compile(r"[^a-z0-9]+")
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})")


def redact(text: str, key: str | None) -> str:
    """Return one bounded line of the text, without the key or lookalikes of one.

    If the text holds a part of the key, or the key in another form, nothing of it is returned.
    """
    text = text[:_READ_CHARACTERS]
    if key:
        text = text.replace(key, _REDACTED)
        if _holds_other_form(text, key):
            return _REDACTED
    # Before the text is cut, because half a key would not be recognised.
    return " ".join(_SECRETS.sub(_REDACTED, text).split())[:_MESSAGE_CHARACTERS]


def _holds_other_form(text: str, key: str) -> bool:
    wanted = [_letters(form) for form in _forms(key) if len(_letters(form)) >= _SHORT_KEY]
    parts = {part for form in wanted for part in _parts(form)}
    short = [form for form in wanted if len(form) < _PART]
    readings = (_letters(reading) for reading in _readings(text))
    return any(not parts.isdisjoint(_parts(found)) or any(form in found for form in short) for found in readings)


def _forms(key: str) -> Iterator[str]:
    yield key
    sent = key.encode(errors="replace")
    yield sent.hex()
    # What goes before the key decides how its bytes are cut into groups of six bits.
    for before in range(3):
        yield base64.b64encode(b"\0" * before + sent).decode()[before + 1 if before else 0 :]


def _readings(text: str) -> Iterator[str]:
    """Yield the text as it is, and with what stands for other characters undone."""
    yield text
    yield unquote(text)
    yield html.unescape(text)
    yield _ESCAPED.sub(lambda found: chr(int(found[1] or found[2], 16)), text)


def _letters(text: str) -> str:
    """Return letters and digits alone: keys are also broken into lines or groups."""
    return _OTHER.sub("", text.translate(_SMALL))


def _parts(text: str) -> set[str]:
    return {text[start : start + _PART] for start in range(len(text) - _PART + 1)}
