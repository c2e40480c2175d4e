"""Read an endpoint's errors: their texts without secrets, and the wait."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


_MAX_RETRY_AFTER = 86_400.0
# Names that the HTTP library gives to errors after which the request was never sent.
_UNREACHABLE = frozenset({"ConnectError", "ConnectTimeout"})
_MESSAGE_CHARACTERS = 500
_SECRETS = re.compile(r"\b[sp]k-[^\s\"',;}\])]+|(?i:bearer)\s+[^\s\"',;}]+|(?<=://)[^/\s@]+@")


def never_left(error: BaseException) -> bool:
    return type(error.__cause__).__name__ in _UNREACHABLE


def redact(text: str, key: str | None) -> str:
    """Return one bounded line of the text, without the key or lookalikes of one."""
    # Before the text is cut, because half a key would not be recognised.
    if key:
        text = text.replace(key, "[redacted]")
    return " ".join(_SECRETS.sub("[redacted]", text).split())[:_MESSAGE_CHARACTERS]


def error_text(body: str) -> str:
    """Return the provider's own words from an error's body.

    The parameter that they are about is appended.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return body
    parameter = None
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            parameter = answer.get("param") or parameter
            answer = answer[name]
    words = answer if isinstance(answer, str) else json.dumps(answer)
    return f"{words} ({parameter})" if isinstance(parameter, str) and parameter not in words else words


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the provider asks to wait, None if it names none.

    All forms of the headers in use are read.
    """
    wait = _number(headers.get("retry-after-ms"), 0.001)
    if wait is None:
        wait = _number(headers.get("retry-after"), 1.0)
    if wait is None and headers.get("retry-after"):
        try:
            wait = email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if wait is None else min(max(wait, 0.0), _MAX_RETRY_AFTER)


def _number(text: str | None, unit: float) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value * unit if math.isfinite(value) else None
