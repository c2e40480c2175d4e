"""Embed a query through shared connections or the session's own embedder.

Queries of remote models use the connections that all sessions share.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from embedline.catalog.values import Version
from embedline.core.embedding import EmbeddingBlock
from embedline.core.media import ModelInput
from embedline.embedders import RERANK_PROVIDERS
from embedline.errors import ModelHostUnavailable, ProviderError
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.postgres.session import Session
from embedline.postgres.spans import Attributes, record

if TYPE_CHECKING:
    from embedline.embedders.shared import SharedEmbedder

# Providers whose clients take long to import and hold connections that are worth sharing.
_SHARED_PROVIDERS = ("openai", *RERANK_PROVIDERS)
# Seconds for which a session asks providers itself after the host did not start, before it tries to start the host
# again.
_RESPITE_SECONDS = 60.0
# Seconds between a worker's pings of the host, which ends after an idle hour.
_WARM_SECONDS = 600.0
# Keys in GD of the session's client of the host, and of the times (time.monotonic) for the two intervals above.
_HOST, _UNUSABLE_UNTIL, _WARM_AT = "embedline.query_host", "embedline.query_host.unusable", "embedline.query_host.warm"


class QueryEmbedding:
    """A query in flight to the version's model.

    The caller may do other work before it asks for the `result`.
    """

    def __init__(self, session: Session, version: Version, text: ModelInput) -> None:
        """Start to embed one repaired text, image or recording."""
        self._session, self._version, self._text = session, version, text
        self._started_at = time.monotonic()
        shared = _shared(session, version, text)
        self._is_shared = shared is not None
        self._future = shared or self._own()

    def result(self) -> EmbeddingBlock:
        """Return the vector; the statement stays cancellable. Raises ProviderError."""
        try:
            block = self._result()
        except ProviderError as error:
            self._tell(None, type(error).__name__)
            raise
        self._tell(block.tokens, None)
        return block

    def _result(self) -> EmbeddingBlock:
        try:
            return self._wait()
        except ModelHostUnavailable:
            if not self._is_shared:
                raise
            do_without_host(self._session)
            self._is_shared, self._future = False, self._own()
            return self._wait()

    def _tell(self, tokens: int | None, error: str | None) -> None:
        """Tell exporters of the request."""

        def attributes() -> Attributes:
            config = self._version.model.config
            return {
                "model": config.model,
                "provider": config.provider,
                "address": config.base_url,
                "dimensions": self._version.dimensions,
                "texts": 1,
                "tokens": tokens,
                "error": error,
            }

        record("embed", time.monotonic() - self._started_at, attributes)

    def cancel(self) -> None:
        """End the request if it has not ended, because its answer is not needed."""
        self._future.cancel()

    def _own(self) -> Future[EmbeddingBlock]:
        return embedder_for(self._session, self._version.model).submit([self._text], "query")

    def _wait(self) -> EmbeddingBlock:
        try:
            return wait_result(self._future, let_cancel_through(self._session))
        except BaseException:
            # Such as a cancel or a timeout of the statement.
            self.cancel()
            raise


def warm_up(session: Session, provider: str) -> None:
    """Start the host of remote models before a search needs it.

    Does nothing for other providers. Waits about 0.1 s, until the host answers.
    """
    if provider in _SHARED_PROVIDERS:
        # A search without the host asks the provider itself.
        with contextlib.suppress(ProviderError, OSError):
            wait_result(_host(session).ping(), let_cancel_through(session))


def keep_warm(session: Session, providers: Iterable[str]) -> None:
    """Keep the host of remote models running while searches are expected.

    Does not wait, and may be called at any rate.
    """
    if time.monotonic() >= session.cache.get(_WARM_AT, 0.0) and not set(providers).isdisjoint(_SHARED_PROVIDERS):
        session.cache[_WARM_AT] = time.monotonic() + _WARM_SECONDS
        with contextlib.suppress(ProviderError, OSError):
            _host(session).ping()


def _host(session: Session) -> SharedEmbedder:
    """Return the session's client of the host.

    Raises ProviderError or OSError if there can be none.
    """
    if _HOST not in session.cache:
        from embedline.embedders.shared import SharedEmbedder

        session.cache[_HOST] = SharedEmbedder()
    host: SharedEmbedder = session.cache[_HOST]
    return host


def shared_host(session: Session, provider: str) -> SharedEmbedder | None:
    """Return the client of the host of remote models.

    None if the session has to ask the provider itself.
    """
    if provider not in _SHARED_PROVIDERS or time.monotonic() < session.cache.get(_UNUSABLE_UNTIL, 0.0):
        return None
    try:
        return _host(session)
    except (ProviderError, OSError):
        # For example because others can use the socket's directory.
        do_without_host(session)
        return None


def _shared(session: Session, version: Version, text: ModelInput) -> Future[EmbeddingBlock] | None:
    """Start the query at the host of remote models.

    Returns None if the session has to ask the provider itself.
    """
    config = version.model.config
    host = shared_host(session, config.provider) if isinstance(text, str) else None
    try:
        return None if host is None or not isinstance(text, str) else host.submit_query(config, _stamp(version), text)
    except (ProviderError, OSError):
        do_without_host(session)
        return None


def _stamp(version: Version) -> str:
    """Return a text that changes with the model's vectors.

    It also changes if another model was found behind the same name.
    """
    return f"{version.model.fingerprint} {version.vectors_valid_from or ''}"


def do_without_host(session: Session) -> None:
    """Have the session ask providers itself for a while."""
    session.cache[_UNUSABLE_UNTIL] = time.monotonic() + _RESPITE_SECONDS
