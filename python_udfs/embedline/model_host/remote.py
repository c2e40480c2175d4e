"""Share the connections to providers among all sessions, for their queries.

Nothing of a query is written anywhere. Its text lives as long as its request; its vector stays in memory for a while.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, TypeAlias

from embedline.core.embedding import EmbeddingBlock, ModelConfig
from embedline.errors import ProviderError
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.place import HostPlace, Owner
from embedline.model_host.process import HostConnection, HostProcess
from embedline.model_host.protocol import Frame, ProtocolError, unpack_texts
from embedline.model_host.query_cache import QueryCache, cache_key
from embedline.model_host.wire_errors import error_fields
from embedline.providers.image_endpoint import ImageEndpoint
from embedline.providers.openai_compatible import OpenAIEmbedder
from embedline.providers.rerank_endpoint import RerankEndpoint

# Queries of one model that may be in flight at a time, of all sessions together. A session alone has one.
_MAX_QUERIES = 256
# Models whose connections are kept; the least recently used is removed first.
_MAX_MODELS = 32
# Seconds that a connection waits for the next query. Servers and balancers close idle ones after 60 s and more.
_IDLE_CONNECTION_SECONDS = 55.0
# Seconds for which one query's rate limit holds for others. A provider may ask for a day and be well at once.
_LONGEST_PAUSE_SECONDS = 5.0
# Header and payload of an answer.
_Answer: TypeAlias = tuple[dict[str, Any], bytes]


class QueryEmbedder(OpenAIEmbedder):
    """A provider's client for the queries of many sessions."""

    idle_connection_seconds = _IDLE_CONNECTION_SECONDS

    async def _embed(self, *arguments: Any, **named: Any) -> EmbeddingBlock:
        try:
            return await super()._embed(*arguments, **named)
        finally:
            self._resume_at = min(self._resume_at, time.monotonic() + _LONGEST_PAUSE_SECONDS)


class ImageQueryEmbedder(ImageEndpoint):
    """A client of a provider that takes images, for the queries of many sessions."""

    idle_connection_seconds = _IDLE_CONNECTION_SECONDS


class QueryReranker(RerankEndpoint):
    """A provider's client for the scores of many sessions."""

    idle_connection_seconds = _IDLE_CONNECTION_SECONDS


_Client: TypeAlias = QueryEmbedder | ImageQueryEmbedder | QueryReranker


def _client_of(config: ModelConfig) -> _Client:
    if config.task == "rerank":
        return QueryReranker(config)
    return ImageQueryEmbedder(config) if config.options.get("image_form") else QueryEmbedder(config)


class RemoteHost(HostProcess):
    """The one host of all remote models of a server."""

    def __init__(self, place: HostPlace, settings: HostSettings, owner: Owner) -> None:
        super().__init__(place, settings, owner)
        self.cache = QueryCache()
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._imports = threading.Thread(target=_import_client, name="embedline-imports", daemon=True)

    def begin(self) -> None:
        """Import the client while the first request is on its way."""
        # A library's messages about a request do not belong in a log.
        logging.getLogger().setLevel(logging.ERROR)
        self.loop.set_exception_handler(_note_fault)
        self._imports.start()

    def accept(self) -> HostConnection:
        """Return the protocol of a new connection."""
        return RemoteConnection(self)

    def is_ready(self) -> bool:
        """Return True once the client is imported."""
        return not self._imports.is_alive()

    def has_moved(self) -> bool:
        """Return True, because each request has a timeout of its own."""
        return True

    def client(self, config: str) -> _Client:
        """Return the client of a model, given as JSON.

        Raises ProviderError, or ProtocolError if the JSON is not a model.
        """
        found = self._clients.pop(config, None)
        if found is None:
            try:
                given = ModelConfig(**json.loads(config) | {"concurrency": _MAX_QUERIES})
            except (TypeError, ValueError) as error:
                raise ProtocolError("the request's model is not one") from error
            found = _client_of(given)
        self._clients[config] = found
        if len(self._clients) > _MAX_MODELS:
            _, oldest = self._clients.popitem(last=False)
            # In a thread of its own, because `close` waits for the client's thread.
            threading.Thread(target=oldest.close, name="embedline-close", daemon=True).start()
        return found


class RemoteConnection(HostConnection):
    """One session's connection to the host of remote models."""

    def __init__(self, host: RemoteHost) -> None:
        super().__init__(host)
        self._host = host
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def perform(self, operation: object, number: int, frame: Frame) -> None:
        """Begin the embedding of a query, or the scoring of its texts."""
        config, identity = frame.header.get("config"), frame.header.get("identity")
        texts = unpack_texts(frame.header.get("lengths"), frame.payload)
        if not isinstance(config, str) or operation not in ("embed", "rerank"):
            raise ProtocolError("the request's operation is unknown")
        try:
            client = self._host.client(config)
        except ProviderError as error:
            self.answer(number, error_fields(error))
            return
        if operation == "rerank" and isinstance(client, QueryReranker) and len(texts) > 1:
            answer = self._scores(client, texts)
        elif (
            operation == "embed" and isinstance(client, QueryEmbedder) and len(texts) == 1 and isinstance(identity, str)
        ):
            answer = self._vector(client, identity, texts[0])
        else:
            raise ProtocolError("the request does not fit the model")
        self._tasks[number] = self._host.loop.create_task(self._answer(number, answer))

    def cancel(self, number: int) -> bool:
        """End a request."""
        task = self._tasks.pop(number, None)
        if task is None:
            return False
        task.cancel()
        return True

    def forget_all(self) -> None:
        """End all requests."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    def is_known(self, number: int) -> bool:
        """Return True if a query of that number is under way."""
        return number in self._tasks

    async def _answer(self, number: int, asked: Coroutine[Any, Any, _Answer]) -> None:
        fields: dict[str, Any]
        payload = b""
        try:
            fields, payload = await asked
        except ProviderError as error:
            fields = error_fields(error)
        except Exception as error:
            # The error's text may hold the key or the query.
            fields = error_fields(ProviderError("the provider's client failed", detail=type(error).__name__))
        if self._tasks.pop(number, None) is not None:
            self.answer(number, fields, payload)

    async def _vector(self, embedder: QueryEmbedder, identity: str, text: str) -> _Answer:
        key = cache_key(identity, text)
        block = self._host.cache.get(key, time.monotonic())
        if block is None:
            block = await asyncio.wrap_future(embedder.submit([text], "query"))
            self._host.cache.put(key, block, time.monotonic())
        return {"count": block.count, "dimensions": block.dimensions}, block.data

    async def _scores(self, reranker: QueryReranker, texts: list[str]) -> _Answer:
        scores = await asyncio.wrap_future(reranker.submit_rerank(texts[0], texts[1:]))
        return {"count": scores.count, "dimensions": 1, "units": scores.units}, scores.data


def _import_client() -> None:
    import openai

    # Accessed because the package imports it late.
    openai.AsyncOpenAI  # noqa: B018


def _note_fault(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log the kind of an uncaught error, without its text.

    The text may hold a key or a query.
    """
    error = context.get("exception")
    logging.getLogger("embedline.model_host").error("%s: %s", context.get("message"), type(error).__name__)
