"""Name the class of a failure as fail_batch knows it."""

from __future__ import annotations

from embedline.errors import (
    EmbedlineError,
    InputRejected,
    InvalidVectors,
    ProviderMisconfigured,
    TransientProviderError,
)


def failure_class(error: BaseException) -> str:
    """Return the class of an embedder's error; anything unknown is transient."""
    if isinstance(error, InputRejected):
        return "too_long" if error.is_too_long else "rejected"
    if isinstance(error, InvalidVectors):
        return "invalid_vectors"
    if isinstance(error, ProviderMisconfigured):
        return "misconfigured"
    if isinstance(error, TransientProviderError):
        if error.throttled:
            return "throttled"
        return "unreachable" if error.unreachable else "transient"
    return "transient"


def told(error: BaseException) -> str:
    """Return the error in words, with the provider's own."""
    detail = error.detail if isinstance(error, EmbedlineError) else None
    return f"{error}: {detail}" if detail else str(error) or type(error).__name__


def wait_wanted(error: BaseException) -> float | None:
    """Return the seconds that a provider asked to wait."""
    return getattr(error, "retry_after", None)
