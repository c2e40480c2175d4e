"""The vector of a query: of a remote model by the connections that all sessions share, else by the session's own embedder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from embedline.catalog.load import Version
from embedline.core.embedding import EmbeddingBlock
from embedline.errors import ModelHostUnavailable, ProviderError
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.postgres.session import Session

if TYPE_CHECKING:
    from embedline.embedders.shared import SharedEmbedder

# Providers whose clients take long to import and hold connections that are worth sharing.
_SHARED_PROVIDERS = ("openai",)
# Seconds for which a session whose host did not start asks providers itself, without another attempt to start it.
_RESPITE_SECONDS = 60.0
# How often a worker asks the host for a sign of life, in seconds. It ends when it was idle for an hour.
_WARM_SECONDS = 600.0
# In GD: the session's client of the host, and the times (time.monotonic) of the two above.
_HOST, _UNUSABLE_UNTIL, _WARM_AT = "embedline.query_host", "embedline.query_host.unusable", "embedline.query_host.warm"


class QueryEmbedding:
    """A query on its way to the version's model: the caller may do other work before it asks for the `result`."""

    def __init__(self, session: Session, version: Version, text: str) -> None:
        """Start to embed one repaired text."""
        self._session, self._version, self._text = session, version, text
        shared = _shared(session, version, text)
        self._is_shared = shared is not None
        self._future = shared or self._own()

    def result(self) -> EmbeddingBlock:
        """Return the vector; the statement stays cancellable. Raises ProviderError."""
        try:
            return self._wait()
        except ModelHostUnavailable:
            if not self._is_shared:
                raise
            _do_without(self._session)
            self._is_shared, self._future = False, self._own()
            return self._wait()

    def cancel(self) -> None:
        """End the request, if it has not ended: there is no one who wants the answer."""
        self._future.cancel()

    def _own(self) -> Future[EmbeddingBlock]:
        return embedder_for(self._session, self._version.model).submit([self._text], "query")

    def _wait(self) -> EmbeddingBlock:
        try:
            return wait_result(self._future, let_cancel_through(self._session))
        except BaseException:
            # A cancel or a time-out of the statement, among others.
            self.cancel()
            raise


def warm_up(session: Session, provider: str) -> None:
    """Start the host of remote models before a search needs it, if the provider is one of these; wait for it for 0.1 s."""
    if provider in _SHARED_PROVIDERS:
        # A search that cannot have it does without.
        with contextlib.suppress(ProviderError, OSError):
            wait_result(_host(session).ping(), let_cancel_through(session))


def keep_warm(session: Session, providers: Iterable[str]) -> None:
    """Have the host of remote models run while there are searches to expect. Waits for nothing; call it as often as you like."""
    if time.monotonic() >= session.cache.get(_WARM_AT, 0.0) and not set(providers).isdisjoint(_SHARED_PROVIDERS):
        session.cache[_WARM_AT] = time.monotonic() + _WARM_SECONDS
        with contextlib.suppress(ProviderError, OSError):
            _host(session).ping()


def _host(session: Session) -> SharedEmbedder:
    """Return the session's client of the host; raises ProviderError or OSError where there can be none."""
    if _HOST not in session.cache:
        from embedline.embedders.shared import SharedEmbedder

        session.cache[_HOST] = SharedEmbedder()
    host: SharedEmbedder = session.cache[_HOST]
    return host


def _shared(session: Session, version: Version, text: str) -> Future[EmbeddingBlock] | None:
    """Start the query at the host of remote models; None where the session has to do it itself."""
    config = version.model.config
    if config.provider not in _SHARED_PROVIDERS or time.monotonic() < session.cache.get(_UNUSABLE_UNTIL, 0.0):
        return None
    try:
        return _host(session).submit_query(config, _stamp(version), text)
    except (ProviderError, OSError):
        # Such as a directory for the socket that others can use.
        _do_without(session)
        return None


def _stamp(version: Version) -> str:
    """Return what tells the model from the one of before, also where a change behind its name was found."""
    return f"{version.model.fingerprint} {version.vectors_valid_from or ''}"


def _do_without(session: Session) -> None:
    session.cache[_UNUSABLE_UNTIL] = time.monotonic() + _RESPITE_SECONDS
