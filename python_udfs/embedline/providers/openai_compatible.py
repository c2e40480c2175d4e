"""Embed over HTTP through an endpoint of OpenAI's form.

Such endpoints are OpenAI itself, vLLM, TEI, Ollama, llama.cpp and others. The `openai` client runs in an asyncio loop
in one daemon thread with every signal blocked. It never retries, because the outbox does. The answer is read here,
because the client would let wrong counts, orders and widths pass.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from embedline.core.embedding import EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.core.processes import start_thread
from embedline.errors import (
    DimensionMismatch,
    InputRejected,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.providers.answers import UnknownOrder
from embedline.providers.openai_answer import is_about_encoding, read_answer
from embedline.providers.openai_errors import never_left, redact, status_error
from embedline.providers.options import given_bodies, request_body
from embedline.providers.tls import no_authorities, tls_context, untrusted

if TYPE_CHECKING:
    import ssl

    import openai

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"
# Longest text in tokens, from OpenAI's documentation, because its models do not report one.
_OPENAI_MAX_TOKENS = 8191
_OPENAI_MODELS = frozenset({"text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"})
# Models that return any number of dimensions up to their own; others refuse the parameter.
_SHORTENED_MODELS = frozenset({"text-embedding-3-small", "text-embedding-3-large"})
_CONNECT_SECONDS = 5.0
_CLOSE_SECONDS = 1.0
# Seconds to pause after a rate limit if the provider names no wait.
_PAUSE_SECONDS = 0.5
# Longest seconds that a session pauses after a rate limit. A longer wait is the circuit breaker's, which can be closed.
_LONGEST_PAUSE_SECONDS = 1.0
# Encodings to ask for, the compact one first; "none" sends no encoding_format at all.
ENCODINGS = ("base64", "float", "none")


class OpenAIEmbedder:
    """Embed through an OpenAI-compatible endpoint."""

    # Seconds that a connection waits for its next request; the HTTP library's own default is 5.
    idle_connection_seconds = 5.0

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        parts = urlsplit(config.base_url or OPENAI_URL)
        # Azure's classic addresses carry ?api-version=…, which belongs behind the path of each request.
        self._query = dict(parse_qsl(parts.query))
        self._url = urlunsplit(parts._replace(query="", fragment="")).rstrip("/")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ProviderMisconfigured(f'the base URL of model "{config.name}" is not an http or https address')
        self._host = parts.hostname
        self._address = f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: openai.AsyncOpenAI | None = None
        self._slots: asyncio.Semaphore | None = None
        # Clock times of the last rate limit, of the end of the wait that the provider asks for, and of this session's
        # pause.
        self._limited_at = self._wanted_until = self._resume_at = 0.0
        self._keeps_order = "order" not in config.learned
        self._encoding = config.options.get("encoding_format") or config.learned.get("encoding_format", ENCODINGS[0])

    # The main thread

    def submit(self, texts: Sequence[str], kind: Kind) -> Future[EmbeddingBlock]:
        """Start embedding; the future raises ProviderError.

        Cancelling the future ends the request.
        """
        if not texts:
            done: Future[EmbeddingBlock] = Future()
            done.set_result(EmbeddingBlock(0, self._config.dimensions or 0, b""))
            return done
        prefix = self._config.query_prefix if kind == "query" else self._config.document_prefix
        embedding = self._embed([prefix + text for text in texts], kind, time.monotonic())
        return asyncio.run_coroutine_threadsafe(embedding, self._running_loop())

    def probe(self) -> Future[ModelInfo]:
        """Embed one short text to learn the dimensions.

        If queries have a body of their own, one more text is embedded as a query.
        """
        return asyncio.run_coroutine_threadsafe(self._probe(), self._running_loop())

    def close(self) -> None:
        """End the requests in flight, the connections and the thread."""
        if self._loop is None or self._thread is None:
            return
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_SECONDS)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="embedline-openai", daemon=True)
            start_thread(self._thread, self)
        return self._loop

    # The loop's thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            loop.run_until_complete(self._shut_down())
        finally:
            loop.close()

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        client, self._client, self._slots = self._client, None, None
        if client is not None:
            await client.close()

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
        if self._slots is None:
            self._slots = asyncio.Semaphore(max(1, self._config.concurrency))
        async with self._slots:
            # The rate limit that one request met holds for all requests that wait behind it.
            until = self._wanted_until if submitted_at <= self._limited_at else self._resume_at
            if (wait := until - time.monotonic()) > 0:
                message = f"{self._address} limits its rate"
                refusal = TransientProviderError(message, retry_after=wait, throttled=True)
                refusal.is_refusal = True
                raise refusal
            key = self._api_key()
            try:
                return await self._ask(texts, kind, key, is_probe=is_probe)
            except TransientProviderError as error:
                if error.throttled:
                    pause = _PAUSE_SECONDS if error.retry_after is None else error.retry_after
                    self._limited_at = time.monotonic()
                    self._wanted_until = self._limited_at + pause
                    self._resume_at = self._limited_at + min(pause, _LONGEST_PAUSE_SECONDS)
                raise

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
        try:
            # The read timeout restarts with every byte, so this bounds the whole request.
            async with asyncio.timeout(self._config.timeout_seconds + _CONNECT_SECONDS):
                response = await client.embeddings.with_raw_response.create(
                    input="",
                    model=self._config.model,
                    encoding_format="float" if encoding == "float" else "base64",
                    extra_headers=self._headers(key),
                    extra_body=body,
                )
            return response.content
        # `from None` throughout, because a report of the chain would show the request, which holds the key.
        except openai.APIStatusError as error:
            refusal = status_error(self._address, error.response, key)
            refusal.is_refusal = True
            raise refusal from None
        except (openai.APITimeoutError, TimeoutError) as error:
            message = f"{self._address} did not answer within {self._config.timeout_seconds:g} s"
            raise TransientProviderError(message, unreachable=never_left(error)) from None
        except openai.APIConnectionError as error:
            if refused := untrusted(self._config, self._address, error):
                # The next request reads the authorities again: they may have been replaced meanwhile.
                self._client = None
                raise refused from None
            message = f"the connection to {self._address} failed"
            detail = redact(f"{type(error.__cause__).__name__}: {error.__cause__}", key)
            raise TransientProviderError(message, detail=detail, unreachable=never_left(error)) from None
        except UnicodeEncodeError:
            raise InputRejected("a text or the API key holds characters that cannot be sent") from None
        except openai.OpenAIError as error:
            detail = redact(str(error), key)
            raise TransientProviderError(f"the request to {self._address} failed", detail=detail) from None

    def _sends_dimensions(self) -> bool:
        if self._config.dimensions is None:
            return False
        return self._config.options.get("send_dimensions", self._config.model in _SHORTENED_MODELS) is True

    def _open_client(self) -> openai.AsyncOpenAI:
        if self._client is None:
            import openai

            timeout = openai.Timeout(self._config.timeout_seconds, connect=_CONNECT_SECONDS)
            self._client = openai.AsyncOpenAI(
                # A placeholder that is never sent: the key goes with each request and is kept nowhere.
                api_key="unused",
                base_url=self._url,
                default_query=self._query,
                max_retries=0,
                timeout=timeout,
                # A redirect would carry texts and key to an address that no administrator has approved.
                http_client=openai.DefaultAsyncHttpxClient(
                    follow_redirects=False,
                    timeout=timeout,
                    # Trust the environment for proxies. Certificates have variables of their own on this machine.
                    trust_env=not self._is_loopback(),
                    verify=self._verification(),
                    limits=self._limits(),
                ),
            )
        return self._client

    def _verification(self) -> ssl.SSLContext | bool:
        if not self._url.startswith("https:"):
            # Redirects are refused, so no certificate is ever checked. Reading the system's authorities takes 0.1 s in
            # a thread. A backend that ends meanwhile must not have a thread inside OpenSSL.
            return no_authorities()
        return tls_context(self._config, os.environ) or True

    def _limits(self) -> Any:
        import openai

        usual = openai.DEFAULT_CONNECTION_LIMITS
        return type(usual)(
            max_connections=usual.max_connections,
            max_keepalive_connections=usual.max_keepalive_connections,
            keepalive_expiry=self.idle_connection_seconds,
        )

    def _headers(self, key: str | None) -> dict[str, Any]:
        import openai

        headers: dict[str, Any] = {"Authorization": f"Bearer {key}" if key else openai.Omit()}
        if key and (name := self._config.options.get("key_header")):
            headers = {"Authorization": openai.Omit(), str(name): key}
        if self._url != OPENAI_URL:
            # The client takes these from the environment; another provider must not see them.
            headers |= {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
        return headers

    def _api_key(self) -> str | None:
        variable = self._config.api_key_env or (OPENAI_KEY_VARIABLE if self._url == OPENAI_URL else None)
        if variable is None:
            return None
        key = os.environ.get(variable, "").strip()
        if key:
            return key
        if self._is_loopback():
            return None
        raise ProviderMisconfigured(
            f'the API key of model "{self._config.name}" is missing',
            detail=f"The server's environment has no variable {variable}.",
            hint=f"Set {variable} in the environment of the PostgreSQL server and restart the server.",
        )

    def _is_loopback(self) -> bool:
        if self._host == "localhost" or self._host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(self._host).is_loopback
        except ValueError:
            return False
