"""Score texts for a query through a rerank endpoint over HTTP.

A failed request is not repeated here, because a person waits for it. Of a refused request only the halves are asked,
until they are small enough for the endpoint.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from embedline.core.embedding import ModelConfig, ModelInfo
from embedline.core.redaction import redact
from embedline.core.request_tokens import most_tokens
from embedline.core.reranking import RerankScores
from embedline.core.retry import circuit_seconds
from embedline.errors import InputRejected, ProviderMisconfigured, TransientProviderError
from embedline.providers.endpoint import Endpoint
from embedline.providers.guard import MOST_BYTES
from embedline.providers.options import given_bodies
from embedline.providers.rerank_forms import RERANK_FORMS, read_scores

# Longest seconds for which an endpoint that was away is not asked. No worker tries it meanwhile, as for embeddings.
_LONGEST_REST_SECONDS = 30.0

# Most bytes of an answer beside its texts: for each of them, and for all.
_BYTES_BESIDE_TEXT, _BYTES_BESIDE = 4096, 1 << 20


class RerankEndpoint(Endpoint):
    """Score through an endpoint in the form of TEI, Cohere, Jina or vLLM."""

    def __init__(self, config: ModelConfig) -> None:
        self._form = RERANK_FORMS[config.provider]
        if config.base_url is None and self._form.url is None:
            raise ProviderMisconfigured(
                f'model "{config.name}" needs a base_url', hint="For example base_url => 'http://127.0.0.1:8080'."
            )
        super().__init__(config, self._form.url, self._form.key)
        # Failures in a row of the whole endpoint, and the clock time until which it is not asked.
        self._failures, self._rests_until = 0, 0.0

    def submit_rerank(self, query: str, texts: Sequence[str]) -> Future[RerankScores]:
        """Start scoring; the future raises ProviderError.

        Cancelling the future ends the requests.
        """
        scoring = self._rerank(query, list(texts), time.monotonic())
        return self._thread.start(scoring)

    def probe(self) -> Future[ModelInfo]:
        """Return what is known of the model.

        The endpoints have no question for it. Scores tell whether address, key and name are right.
        """
        config = self._config
        identity: list[object] = ["rerank", config.provider, self._address, config.model]
        if bodies := given_bodies(config.options):
            identity.append(bodies)
        known: Future[ModelInfo] = Future()
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        known.set_result(ModelInfo(0, config.options.get("max_tokens"), None, fingerprint))
        return known

    async def _rerank(self, query: str, texts: list[str], submitted_at: float) -> RerankScores:
        """Score all texts, in requests of the declared size at most."""
        query = self._config.query_prefix + query
        texts = [self._config.document_prefix + text for text in texts]
        tasks = [
            asyncio.ensure_future(self._part(query, part, submitted_at))
            for part in requests_of(query, texts, self._config)
        ]
        try:
            return _joined(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _part(self, query: str, texts: list[str], submitted_at: float) -> RerankScores:
        """Score the texts of one request; a request that the endpoint refuses is halved.

        TEI takes 32 texts in a request unless it is started otherwise, and says so with a refusal.
        """
        try:
            return await self._in_turn(submitted_at, lambda key: self._ask(query, texts, key))
        except InputRejected:
            if len(texts) == 1:
                raise
        half = len(texts) // 2
        first = await self._part(query, texts[:half], submitted_at)
        return _joined([first, await self._part(query, texts[half:], submitted_at)])

    async def _ask(self, query: str, texts: list[str], key: str | None) -> RerankScores:
        if (wait := self._rests_until - time.monotonic()) > 0:
            message = f"{self._address} was away and is not asked for another {wait:.1f} s"
            refusal = TransientProviderError(message, retry_after=wait, unreachable=True)
            refusal.is_refusal = True
            raise refusal
        try:
            content = await self._post(query, texts, key)
        except TransientProviderError as error:
            # Failures of requests that were in flight together count once.
            if (error.unreachable or error.is_gateway) and time.monotonic() >= self._rests_until:
                rest = min(circuit_seconds(self._failures, error.retry_after), _LONGEST_REST_SECONDS)
                self._failures += 1
                self._rests_until = time.monotonic() + rest
            raise
        self._failures = 0
        return read_scores(self._form, content, len(texts), lambda text: redact(text, key))

    async def _post(self, query: str, texts: list[str], key: str | None) -> bytes:
        # An answer may repeat each text, escaped, beside its score.
        MOST_BYTES.set(_BYTES_BESIDE + len(texts) * _BYTES_BESIDE_TEXT + 6 * sum(map(len, texts)))
        options: Any = {"headers": self._headers(key)}
        body = self._form.body(self._config.model, query, texts, self._config.options.get("extra_body") or {})
        answer = self._open_client().post("/rerank", cast_to=bytes, body=body, options=options)
        return await self._answered(key, answer)


def requests_of(query: str, texts: Sequence[str], config: ModelConfig) -> list[list[str]]:
    """Return the texts by request: as many as the model's limits allow, at least one."""
    parts: list[list[str]] = []
    tokens = 0
    for text in texts:
        needed = most_tokens(query) + most_tokens(text)
        if not parts or len(parts[-1]) >= config.max_batch_items or tokens + needed > config.max_batch_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(text)
        tokens += needed
    return parts


def _joined(parts: Sequence[RerankScores]) -> RerankScores:
    units = [part.units for part in parts if part.units is not None]
    return RerankScores(
        sum(part.count for part in parts),
        b"".join(part.data for part in parts),
        sum(units) if len(units) == len(parts) and units else None,
    )
