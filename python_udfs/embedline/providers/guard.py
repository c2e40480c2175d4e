"""Watch where an HTTP client connects, and how large its answers are."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from embedline.core.endpoints import is_forbidden_address
from embedline.core.redaction import redact
from embedline.errors import ProviderMisconfigured, TransientProviderError
from embedline.providers.allowed import forbidden

# Bytes that the answer to this task's request may have.
MOST_BYTES: ContextVar[int] = ContextVar("embedline_most_bytes")
# Bytes of an answer that is an error or whose size no request announced.
_USUAL_BYTES = 1 << 20
# Endings of the events that the HTTP library reports once it has connected, to the endpoint or to a proxy.
_CONNECTED = ("connect_tcp.complete", "connect_unix_socket.complete")


class _Request(Protocol):
    """The part of a request that is used.

    The client's HTTP library has changed before.
    """

    extensions: dict[str, Any]


class _Response(Protocol):
    stream: Any

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...


class Refused(Exception):
    """A connection or an answer was refused here."""


class ForbiddenAddress(Refused):
    """A connection leads to an address that is never asked.

    It is closed, and nothing was sent.
    """


class AnswerTooLarge(Refused):
    """An answer holds more than its request can mean."""


def event_hooks() -> Mapping[str, list[Callable[..., Any]]]:
    """Return the hooks of an HTTP client that refuse addresses and sizes."""

    async def watch_connection(request: _Request) -> None:
        request.extensions = {**request.extensions, "trace": _check_connection}

    async def bound_answer(response: _Response) -> None:
        if (coding := response.headers.get("content-encoding", "identity").lower()) != "identity":
            # What a compressed answer holds is known only once it fills the memory. None was asked for.
            raise AnswerTooLarge(f"the answer is compressed ({coding[:20]}), which was not asked for")
        most = MOST_BYTES.get(_USUAL_BYTES) if response.status_code < 300 else _USUAL_BYTES
        stream: Any = response.stream
        base: Any = type(stream)
        # The library's own stream with a bound, because others are refused by the library, or lack what it asks of them.
        stream.__class__ = _bounded(base)
        stream.embedline_most = most

    return {"request": [watch_connection], "response": [bound_answer]}


async def _check_connection(event: str, info: Mapping[str, Any]) -> None:
    """Close a connection to a forbidden address.

    The address itself is checked, because a name may be resolved again for each connection.
    """
    if not event.endswith(_CONNECTED):
        return
    stream = info["return_value"]
    peer = stream.get_extra_info("server_addr")
    if isinstance(peer, tuple) and is_forbidden_address(str(peer[0])):
        await stream.aclose()
        raise ForbiddenAddress(str(peer[0]))


@functools.cache
def _bounded(base: Callable[..., Any]) -> Any:
    """Return a class of answers' bodies with a bound.

    They end with an error after `embedline_most` bytes.
    """

    class Bounded(base):  # type: ignore[valid-type, misc]
        embedline_most: int

        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = self.embedline_most
            async for part in super().__aiter__():
                left -= len(part)
                if left < 0:
                    raise AnswerTooLarge(f"the answer has more than {self.embedline_most} bytes")
                yield part

    return Bounded


def refused(
    address: str, error: BaseException, key: str | None
) -> ProviderMisconfigured | TransientProviderError | None:
    """Return the error for what a hook refused, without the key, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ForbiddenAddress):
            return forbidden(address, str(cause))
        if isinstance(cause, AnswerTooLarge):
            return TransientProviderError(f"the answer of {address} cannot be used", detail=redact(str(cause), key))
        cause = cause.__cause__
    return None
