"""Embed queries of remote models through one host for all sessions.

The host holds the connections to the providers. A session's first search pays for this module, so it imports no
provider's client, which would take 0.5 s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import Future

from embedline.core.embedding import EmbeddingBlock, ModelConfig
from embedline.core.reranking import RerankScores
from embedline.embedders.host_answers import block_reader, scores_reader
from embedline.embedders.local import LocalEmbedder
from embedline.errors import InputRejected
from embedline.model_host.host_settings import remote_settings
from embedline.model_host.protocol import ProtocolError, pack_texts

# Seconds of silence after which the host is given up. It sends a sign of life each second while a query waits.
_SILENCE_SECONDS = 15.0
# Queries of one session that may be in flight at a time.
_CONCURRENCY = 32


class SharedEmbedder(LocalEmbedder):
    """Embed queries of any remote model through the host of remote models."""

    def __init__(self, *, owner_pid: int | None = None, runtime_root: str | None = None) -> None:
        config = ModelConfig("remote models", "openai", "", timeout_seconds=_SILENCE_SECONDS, concurrency=_CONCURRENCY)
        super().__init__(config, owner_pid=owner_pid, runtime_root=runtime_root, settings=remote_settings())

    def submit_query(self, config: ModelConfig, fingerprint: str, text: str) -> Future[EmbeddingBlock]:
        """Start embedding a query; the future raises the model's own errors.

        ModelHostUnavailable means that there is no host, and says nothing about the provider. The `fingerprint` tells
        which earlier vectors of the text are of the same model.
        """
        future: Future[EmbeddingBlock] = Future()
        given = json.dumps(dataclasses.asdict(config), sort_keys=True)
        try:
            lengths, payload = pack_texts([text])
            header = {"op": "embed", "config": given, "identity": _identity(config, fingerprint), "lengths": lengths}
            self._start(header, payload, future, block_reader(1, None))
        except (UnicodeEncodeError, ProtocolError) as error:
            future.set_exception(InputRejected("the query cannot be sent", detail=type(error).__name__))
        return future

    def submit_shared_rerank(self, config: ModelConfig, query: str, texts: Sequence[str]) -> Future[RerankScores]:
        """Start scoring; the future raises the model's own errors.

        ModelHostUnavailable means that there is no host, and says nothing about the provider.
        """
        future: Future[RerankScores] = Future()
        given = json.dumps(dataclasses.asdict(config), sort_keys=True)
        self._send({"op": "rerank", "config": given}, [query, *texts], future, scores_reader(len(texts)))
        return future

    def ping(self) -> Future[None]:
        """Start the host if it does not run; the future ends when the host answers."""
        future: Future[None] = Future()
        self._start({"op": "ping"}, b"", future, lambda _: None)
        return future


def _identity(config: ModelConfig, fingerprint: str) -> str:
    """Return the facts that decide a query's vector besides its text.

    An endpoint that moves to another address keeps its fingerprint if its model is the same.
    """
    fields = [fingerprint, config.provider, config.model, config.revision, config.dimensions, config.query_prefix]
    return json.dumps([*fields, dict(config.options)], sort_keys=True)
