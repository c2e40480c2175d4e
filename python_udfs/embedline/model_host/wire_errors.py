"""Send errors of a provider from a host to a session.

An error keeps its class, its texts and its other plain attributes.
"""

from __future__ import annotations

from typing import Any

from embedline import errors
from embedline.errors import ProviderError

_WORDS = ("message", "detail", "hint")


def error_fields(error: ProviderError) -> dict[str, Any]:
    """Return the fields of an answer that is an error."""
    fields: dict[str, Any] = {"class": type(error).__name__} | {name: getattr(error, name) for name in _WORDS}
    # For example the seconds to wait, and whether anything was paid for.
    besides = {name: value for name, value in vars(error).items() if name not in _WORDS and _is_plain(value)}
    return {"error": fields | ({"besides": besides} if besides else {})}


def read_error(header: dict[str, Any]) -> ProviderError | None:
    """Return the error in an answer's header, None if there is none.

    An unknown class becomes a ProviderError.
    """
    fields = header.get("error")
    if fields is None:
        return None
    kind = getattr(errors, str(fields["class"]), None)
    if not (isinstance(kind, type) and issubclass(kind, ProviderError)):
        kind = ProviderError
    error = kind(fields["message"], detail=fields["detail"], hint=fields["hint"])
    for name, value in fields.get("besides", {}).items():
        # Attributes that only a newer host knows are left out.
        if hasattr(error, name) and _is_plain(value):
            setattr(error, name, value)
    return error


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
