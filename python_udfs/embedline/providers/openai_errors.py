"""Read an endpoint's errors: whose fault, the words without secrets, the wait."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Protocol

from embedline.core.redaction import redact
from embedline.errors import InputRejected, ProviderError, ProviderMisconfigured, TransientProviderError

_MAX_RETRY_AFTER = 86_400.0
# Names that the HTTP library gives to errors after which the request was never sent.
_UNREACHABLE = frozenset({"ConnectError", "ConnectTimeout"})
# Characters of an error's body that are read.
_READ_CHARACTERS = 4000
_TRANSIENT = frozenset({408, 409, 425, 429})
_REJECTED = frozenset({400, 413, 422})
# Statuses of gateways and overloaded servers, whatever the request is. A 500 may be about one text.
_AWAY = frozenset({502, 503, 504})
# Phrases for a text that is too long, some of them with status 500: vLLM, TEI, Ollama, llama.cpp, OpenAI.
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|sequence length|too (?:long|large|many tokens)|token limit|physical batch size"
    r"|(?:max|limit|exceed|less than|longer|at most)[^.]{0,40}\b(?:tokens|length)|tokens[^.]{0,40}(?:max|limit|exceed)",
    re.IGNORECASE,
)


class _Response(Protocol):
    """The parts of an HTTP response that are read.

    The client's HTTP library is its own affair and has changed before.
    """

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def text(self) -> str: ...


def never_left(error: BaseException) -> bool:
    """Return True if the request was never sent."""
    return type(error.__cause__).__name__ in _UNREACHABLE


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


def status_error(address: str, response: _Response, key: str | None) -> ProviderError:
    """Return the error that an answer with a status of failure means.

    `address` is the endpoint as messages name it.
    """
    error = _error_of_status(address, response, key)
    error.status = response.status_code
    return error


def _error_of_status(address: str, response: _Response, key: str | None) -> ProviderError:
    status = response.status_code
    message = f"{address} answered with HTTP status {status}"
    detail = redact(error_text(response.text), key) or None
    if status == 429 and "insufficient_quota" in response.text:
        # OpenAI reports so when the account is out of money. Waiting a second does not help.
        hint = "Top up the provider's account, or raise its spending limit."
        return ProviderMisconfigured(message, detail=detail, hint=hint)
    is_too_long = status == 413 or (
        (status in _REJECTED or status >= 500) and _TOO_LONG.search(response.text[:_READ_CHARACTERS]) is not None
    )
    if is_too_long:
        rejected = InputRejected(message, detail=detail)
        rejected.is_too_long = True
        return rejected
    if status in _TRANSIENT or status >= 500:
        error = TransientProviderError(
            message,
            detail=detail,
            retry_after=retry_after(response.headers),
            throttled=status == 429,
        )
        error.is_gateway = status in _AWAY
        return error
    if status in _REJECTED:
        return InputRejected(message, detail=detail)
    if 300 <= status < 400:
        hint = "Redirects are refused; register the model with the final base URL."
        return ProviderMisconfigured(message, detail=detail, hint=hint)
    hint = "Check the base URL, the model's name and the API key in the server's environment."
    return ProviderMisconfigured(message, detail=detail, hint=hint)
