"""The exception tree of Embedline.

Each class carries the SQLSTATE that the database reports. The first line of its docstring is the message that stands when
nothing more exact is known. `detail` tells the circumstances, `hint` names the statement or command to run.
`embedline.postgres.session.postgres_error` turns any of them into a PostgreSQL error.
"""

from __future__ import annotations

import inspect


class EmbedlineError(Exception):
    """Embedline failed."""

    sqlstate = "EL000"

    def __init__(self, message: str | None = None, *, detail: str | None = None, hint: str | None = None) -> None:
        self.message = message or inspect.cleandoc(type(self).__doc__ or "Embedline failed.").partition("\n")[0]
        self.detail = detail
        self.hint = hint
        super().__init__(self.message)


class InvalidParameter(EmbedlineError):
    """A parameter has a value that cannot be used."""

    sqlstate = "22023"


class NotPermitted(EmbedlineError):
    """The role may not do that."""

    sqlstate = "42501"


class AlreadyExists(EmbedlineError):
    """An object of that name exists already."""

    sqlstate = "42710"


class NotFound(EmbedlineError):
    """There is no object of that name."""

    sqlstate = "42704"


class DependentObjects(EmbedlineError):
    """Other objects depend on it."""

    sqlstate = "2BP01"


class NotReady(EmbedlineError):
    """What this needs is not done yet."""

    sqlstate = "55000"


class InsufficientDisk(EmbedlineError):
    """There is not enough room on the disk."""

    sqlstate = "53100"


class InsufficientMemory(EmbedlineError):
    """There is not enough memory."""

    sqlstate = "53200"


class VersionSkew(EmbedlineError):
    """The Python package and the installed schema are of different versions."""

    sqlstate = "EL001"


class UnusableText(EmbedlineError):
    """The text has nothing in it that can be embedded."""

    sqlstate = "EL002"


class UnreadableText(UnusableText):
    """The model does not know most of the text."""

    sqlstate = "EL003"


class UnreadableMedia(UnusableText):
    """The file is no image or recording that can be decoded."""

    sqlstate = "EL005"


class FileUnavailable(EmbedlineError):
    """The file cannot be fetched for now."""

    sqlstate = "EL006"


class ProviderError(EmbedlineError):
    """The embedding provider failed."""

    sqlstate = "EL010"
    # True if the provider refused before it did any work, so that nothing was paid for.
    is_refusal = False
    # The HTTP status of the answer; None if there was none.
    status: int | None = None


class TransientProviderError(ProviderError):
    """The embedding provider is unavailable for now.

    The same request may succeed later. `retry_after` is the wait in seconds that the provider asked for, if it named
    one. `throttled` marks a rate limit, `unreachable` a missing connection: neither is about the texts. For any other
    failure the answer to a harmless text decides whether the texts are the cause.
    """

    sqlstate = "EL011"
    # True if a gateway or an overloaded server answered. It would refuse any request, so another form of it changes
    # nothing.
    is_gateway = False

    def __init__(
        self,
        message: str | None = None,
        *,
        detail: str | None = None,
        hint: str | None = None,
        retry_after: float | None = None,
        throttled: bool = False,
        unreachable: bool = False,
    ) -> None:
        super().__init__(message, detail=detail, hint=hint)
        self.retry_after = retry_after
        self.throttled = throttled
        self.unreachable = unreachable


class InputRejected(ProviderError):
    """The embedding provider rejected the input; a smaller part of it may be accepted."""

    sqlstate = "EL012"
    # True if the provider says that the input is too long.
    is_too_long = False


class ProviderMisconfigured(ProviderError):
    """The embedding provider refuses the request: wrong address, key or model name."""

    sqlstate = "EL013"


class InvalidVectors(ProviderError):
    """The provider's answer is not a set of usable vectors."""

    sqlstate = "EL014"


class DimensionMismatch(InvalidVectors):
    """The model returned vectors of another dimension than its column."""

    sqlstate = "EL004"


class ModelHostUnavailable(TransientProviderError):
    """The model host did not start or went away."""

    sqlstate = "EL015"


class InvalidScores(ProviderError):
    """The reranker's answer is not one usable score for each text."""

    sqlstate = "EL016"


class ModelChanged(EmbedlineError):
    """The model is not the one that this session embeds with."""

    sqlstate = "EL017"
