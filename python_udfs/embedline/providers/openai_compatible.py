"""Embed over HTTP through an endpoint of OpenAI's form.

Such endpoints are OpenAI itself, vLLM, TEI, Ollama, llama.cpp and others. Failed requests are not repeated here, because
the outbox does so. The answer is read here, because the client would let wrong counts, orders and widths pass.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from embedline.core.embedding import EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.core.media import ModelInput, only_texts
from embedline.core.redaction import redact
from embedline.errors import DimensionMismatch, ProviderError, TransientProviderError
from embedline.providers.answers import UnknownOrder
from embedline.providers.endpoint import OPENAI_URL, Endpoint
from embedline.providers.guard import MOST_BYTES
from embedline.providers.openai_answer import is_about_encoding, read_answer
from embedline.providers.options import given_bodies, request_body

OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"
# Longest text in tokens, from OpenAI's documentation, because its models do not report one.
_OPENAI_MAX_TOKENS = 8191
_OPENAI_MODELS = frozenset({"text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"})
# Models that return any number of dimensions up to their own; others refuse the parameter.
_SHORTENED_MODELS = frozenset({"text-embedding-3-small", "text-embedding-3-large"})
# Largest width of a vector that can be stored, for models whose width is not known yet.
_MOST_DIMENSIONS = 16_000
# Most bytes of an answer: those of a number in a list, those beside the numbers of a vector, those beside all vectors. The
# longest form of a float64 has 24 characters; a list may be indented, each number on a line of its own.
_BYTES_OF_NUMBER, _BYTES_BESIDE_VECTOR, _BYTES_BESIDE = 64, 4096, 1 << 20
# Encodings to ask for, the compact one first; "none" sends no encoding_format at all.
ENCODINGS = ("base64", "float", "none")


class OpenAIEmbedder(Endpoint):
    """Embed through an OpenAI-compatible endpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, OPENAI_URL, OPENAI_KEY_VARIABLE)
        self._keeps_order = "order" not in config.learned
        self._encoding = config.options.get("encoding_format") or config.learned.get("encoding_format", ENCODINGS[0])

    # The main thread

    def submit(self, texts: Sequence[ModelInput], kind: Kind) -> Future[EmbeddingBlock]:
        """Start embedding; the future raises ProviderError.

        Cancelling the future ends the request.
        """
        if not texts:
            done: Future[EmbeddingBlock] = Future()
            done.set_result(EmbeddingBlock(0, self._config.dimensions or 0, b""))
            return done
        prefix = self._config.query_prefix if kind == "query" else self._config.document_prefix
        embedding = self._embed([prefix + text for text in only_texts(texts)], kind, time.monotonic())
        return self._thread.start(embedding)

    def probe(self) -> Future[ModelInfo]:
        """Embed one short text to learn the dimensions.

        If queries have a body of their own, one more text is embedded as a query.
        """
        return self._thread.start(self._probe())

    # The loop's thread

    async def _probe(self) -> ModelInfo:
        block = await self._embed([f"{self._config.document_prefix}probe"], "document", time.monotonic(), is_probe=True)
        options = self._config.options
        if options.get("query_body"):
            query = await self._embed([f"{self._config.query_prefix}probe"], "query", time.monotonic())
            if query.dimensions != block.dimensions:
                detail = f"Documents have {block.dimensions} dimensions, queries {query.dimensions}."
                raise DimensionMismatch("documents and queries have different dimensions", detail=detail)
        default = _OPENAI_MAX_TOKENS if self._config.model in _OPENAI_MODELS else None
        identity: list[object] = [self._config.provider, self._address, self._config.model, block.dimensions]
        if bodies := given_bodies(options):
            identity.append(bodies)
        return ModelInfo(
            dimensions=block.dimensions,
            max_tokens=options.get("max_tokens", default),
            tokenizer_path=options.get("tokenizer"),
            fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            # A single vector shows nothing about the order.
            learned={name: value for name, value in block.learned.items() if name == "encoding_format"},
        )

    async def _embed(
        self, texts: list[str], kind: Kind, submitted_at: float, *, is_probe: bool = False
    ) -> EmbeddingBlock:
        return await self._in_turn(submitted_at, lambda key: self._ask(texts, kind, key, is_probe=is_probe))

    async def _ask(self, texts: list[str], kind: Kind, key: str | None, *, is_probe: bool) -> EmbeddingBlock:
        """Post the texts and read the answer.

        If the endpoint refuses the encoding, the next one is tried and kept.
        """
        is_fixed = bool(self._config.options.get("encoding_format"))
        encodings = [self._encoding] if is_fixed else ENCODINGS[ENCODINGS.index(self._encoding) :]
        refusal: ProviderError | None = None
        for encoding in encodings:
            try:
                block = self._read(await self._post(texts, kind, key, encoding), len(texts), key)
            except ProviderError as error:
                if encoding == encodings[-1] or not is_about_encoding(error, is_probe=is_probe):
                    # The first refusal tells most, but it would be charged to the texts. A transient error is raised as
                    # such.
                    raise error if isinstance(error, TransientProviderError) else refusal or error from None
                refusal = refusal or error
            else:
                if not is_fixed and encoding != ENCODINGS[0]:
                    # A request sent earlier may yet be answered in the earlier encoding.
                    self._encoding = max(self._encoding, encoding, key=ENCODINGS.index)
                    block = replace(block, learned={**block.learned, "encoding_format": encoding})
                return block
        raise AssertionError("there is always an encoding to ask for")

    def _read(self, content: bytes, count: int, key: str | None) -> EmbeddingBlock:
        try:
            block = read_answer(
                content, count, self._config.dimensions, lambda text: redact(text, key), keeps_order=self._keeps_order
            )
        except UnknownOrder:
            # The texts are sent again in halves, and no answer is taken by position from now on.
            self._keeps_order = False
            raise
        self._keeps_order = self._keeps_order and "order" not in block.learned
        return block

    async def _post(self, texts: list[str], kind: Kind, key: str | None, encoding: str) -> bytes:
        import openai

        client = self._open_client()
        # Passed as extra_body, which is sent unchanged. If `input` were a parameter, the package would walk through the
        # texts one by one to rename members, which took half of this thread's time.
        body: dict[str, Any] = request_body(self._config.options, kind) | {"input": texts}
        if self._sends_dimensions():
            body["dimensions"] = self._config.dimensions
        if encoding == "none":
            # The client fills in what is not given.
            body["encoding_format"] = openai.Omit()
        width = self._config.dimensions or _MOST_DIMENSIONS
        MOST_BYTES.set(_BYTES_BESIDE + len(texts) * (_BYTES_BESIDE_VECTOR + width * _BYTES_OF_NUMBER))
        response = await self._answered(
            key,
            client.embeddings.with_raw_response.create(
                input="",
                model=self._config.model,
                encoding_format="float" if encoding == "float" else "base64",
                extra_headers=self._headers(key),
                extra_body=body,
            ),
        )
        return response.content

    def _sends_dimensions(self) -> bool:
        if self._config.dimensions is None:
            return False
        return self._config.options.get("send_dimensions", self._config.model in _SHORTENED_MODELS) is True
