"""Models behind an HTTP interface of OpenAI's form: OpenAI itself, and vLLM, TEI, Ollama, llama.cpp and others.

The `openai` client runs in an asyncio loop in one daemon thread with every signal blocked. It never retries: the outbox
does. The answer is read here and not by the client, which would pass wrong counts, orders and widths through.
"""

from __future__ import annotations

import array
import asyncio
import binascii
import contextlib
import email.utils
import hashlib
import ipaddress
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from embedline.core.embedding import EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.errors import (
    DimensionMismatch,
    InputRejected,
    InvalidVectors,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.providers.answers import UnknownOrder, mistaken_encoding, text_numbers
from embedline.providers.options import given_bodies, request_body
from embedline.providers.tls import no_authorities, tls_context, untrusted

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    import openai

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"
# OpenAI's documented limit; its models name no other.
_OPENAI_MAX_TOKENS = 8191
_OPENAI_MODELS = frozenset({"text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002"})
# These return any number of dimensions up to their own; others refuse the parameter.
_SHORTENED_MODELS = frozenset({"text-embedding-3-small", "text-embedding-3-large"})
_CONNECT_SECONDS = 5.0
_CLOSE_SECONDS = 1.0
_MAX_RETRY_AFTER = 86_400.0
# Where the provider limits its rate and does not say for how long.
_PAUSE_SECONDS = 0.5
# A session asks no more for so long at most after a rate limit; the circuit breaker, which can be closed, knows the rest.
_LONGEST_PAUSE_SECONDS = 1.0
# Causes with which the request never left: the HTTP library's own names.
_UNREACHABLE = frozenset({"ConnectError", "ConnectTimeout"})
_MESSAGE_CHARACTERS = 500
# An error's body is read no further.
_READ_CHARACTERS = 4000
_SECRETS = re.compile(r"\b[sp]k-[^\s\"',;}\])]+|(?i:bearer)\s+[^\s\"',;}]+|(?<=://)[^/\s@]+@")
_TRANSIENT = frozenset({408, 409, 425, 429})
_REJECTED = frozenset({400, 413, 422})
# Encodings that answers are asked for in, the compact one first; "none" sends no encoding_format at all.
ENCODINGS = ("base64", "float", "none")
_NO_VECTORS = "the provider's answer holds no vectors"
_ENCODING_WORDS = re.compile(r"encoding[_ -]?format|base64", re.IGNORECASE)
# What gateways and overloaded servers say whatever is asked; a 500 may be about one text.
_AWAY = frozenset({502, 503, 504})
# What servers say of a text that is too long, some of them with status 500: vLLM, TEI, Ollama, llama.cpp, OpenAI.
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|sequence length|too (?:long|large|many tokens)|token limit|physical batch size"
    r"|(?:max|limit|exceed|less than|longer|at most)[^.]{0,40}\b(?:tokens|length)|tokens[^.]{0,40}(?:max|limit|exceed)",
    re.IGNORECASE,
)


class _Response(Protocol):
    """What is read of an HTTP response; the client's HTTP library is its own affair and has changed before."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def text(self) -> str: ...


class OpenAIEmbedder:
    """Embeds through an OpenAI-compatible endpoint."""

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
        # The last rate limit: when it was met, until when the provider asks to wait, and until when this session does.
        self._limited_at = self._wanted_until = self._resume_at = 0.0
        self._keeps_order = "order" not in config.learned
        self._encoding = config.options.get("encoding_format") or config.learned.get("encoding_format", ENCODINGS[0])

    # The main thread

    def submit(self, texts: Sequence[str], kind: Kind) -> Future[EmbeddingBlock]:
        """Start embedding; the future raises ProviderError. Cancelling the future ends the request."""
        if not texts:
            done: Future[EmbeddingBlock] = Future()
            done.set_result(EmbeddingBlock(0, self._config.dimensions or 0, b""))
            return done
        prefix = self._config.query_prefix if kind == "query" else self._config.document_prefix
        embedding = self._embed([prefix + text for text in texts], kind, time.monotonic())
        return asyncio.run_coroutine_threadsafe(embedding, self._running_loop())

    def probe(self) -> Future[ModelInfo]:
        """Embed one short text to learn the dimensions; one more as a query if queries have a body of their own."""
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
            # PostgreSQL's signal handlers must run in the main thread only.
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                self._thread.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
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
            # A single vector says nothing about the order.
            learned={name: value for name, value in block.learned.items() if name == "encoding_format"},
        )

    async def _embed(
        self, texts: list[str], kind: Kind, submitted_at: float, *, is_probe: bool = False
    ) -> EmbeddingBlock:
        if self._slots is None:
            self._slots = asyncio.Semaphore(max(1, self._config.concurrency))
        async with self._slots:
            # What one request was told about the rate holds for all that wait behind it.
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
        """Post the texts and read the answer; if the encoding is refused, ask for the next one and keep to it."""
        is_fixed = bool(self._config.options.get("encoding_format"))
        encodings = [self._encoding] if is_fixed else ENCODINGS[ENCODINGS.index(self._encoding) :]
        refusal: ProviderError | None = None
        for encoding in encodings:
            try:
                block = self._read(await self._post(texts, kind, key, encoding), len(texts), key)
            except ProviderError as error:
                if encoding == encodings[-1] or not _is_about_encoding(error, is_probe=is_probe):
                    # The first refusal says most, but it would be held against the texts. What passes is told as that.
                    raise error if isinstance(error, TransientProviderError) else refusal or error from None
                refusal = refusal or error
            else:
                if not is_fixed and encoding != ENCODINGS[0]:
                    # A request of before may yet be answered in the encoding of before.
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
            # Asked again in halves: now no answer is taken by position.
            self._keeps_order = False
            raise
        self._keeps_order = self._keeps_order and "order" not in block.learned
        return block

    async def _post(self, texts: list[str], kind: Kind, key: str | None, encoding: str) -> bytes:
        import openai

        client = self._open_client()
        # As extra_body, which goes out as it is: as the parameter `input` the package walks through the texts one by one to
        # see whether they need renaming, which took half of this thread's time.
        body: dict[str, Any] = request_body(self._config.options, kind) | {"input": texts}
        if self._sends_dimensions():
            body["dimensions"] = self._config.dimensions
        if encoding == "none":
            # The client fills in what is not given.
            body["encoding_format"] = openai.Omit()
        try:
            # The read timeout starts anew with every byte; this bound is on the whole.
            async with asyncio.timeout(self._config.timeout_seconds + _CONNECT_SECONDS):
                response = await client.embeddings.with_raw_response.create(
                    input="",
                    model=self._config.model,
                    encoding_format="float" if encoding == "float" else "base64",
                    extra_headers=self._headers(key),
                    extra_body=body,
                )
            return response.content
        # `from None` throughout: a report of the chain would show the request, and the request holds the key.
        except openai.APIStatusError as error:
            refusal = self._status_error(error.response, key)
            refusal.is_refusal = True
            raise refusal from None
        except (openai.APITimeoutError, TimeoutError) as error:
            message = f"{self._address} did not answer within {self._config.timeout_seconds:g} s"
            raise TransientProviderError(message, unreachable=_never_left(error)) from None
        except openai.APIConnectionError as error:
            if refused := untrusted(self._config, self._address, error):
                # The next request reads the authorities again: they may have been replaced meanwhile.
                self._client = None
                raise refused from None
            message = f"the connection to {self._address} failed"
            detail = redact(f"{type(error.__cause__).__name__}: {error.__cause__}", key)
            raise TransientProviderError(message, detail=detail, unreachable=_never_left(error)) from None
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
                # Stands in for the key, which goes with each request and is kept nowhere; it is never sent.
                api_key="unused",
                base_url=self._url,
                default_query=self._query,
                max_retries=0,
                timeout=timeout,
                # A redirect would carry texts and key to an address that nobody has approved.
                http_client=openai.DefaultAsyncHttpxClient(
                    follow_redirects=False,
                    timeout=timeout,
                    # Proxies; certificates have their variables on this machine, too.
                    trust_env=not self._is_loopback(),
                    verify=self._verification(),
                    limits=self._limits(),
                ),
            )
        return self._client

    def _verification(self) -> ssl.SSLContext | bool:
        if not self._url.startswith("https:"):
            # Redirects are refused, so no certificate is ever looked at. Reading the system's authorities takes 0.1 s, in
            # a thread that a backend which is ended meanwhile must not have inside OpenSSL.
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
            # The client takes these from the environment; they are no business of another provider.
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

    def _status_error(self, response: _Response, key: str | None) -> ProviderError:
        status = response.status_code
        message = f"{self._address} answered with HTTP status {status}"
        detail = redact(_error_text(response.text), key) or None
        if status == 429 and "insufficient_quota" in response.text:
            # OpenAI says so where the account is out of money: waiting a second does not help.
            hint = "Top up the provider's account, or raise its spending limit."
            return ProviderMisconfigured(message, detail=detail, hint=hint)
        is_too_long = status == 413 or (
            (status in _REJECTED or status >= 500) and _TOO_LONG.search(response.text[:_READ_CHARACTERS]) is not None
        )
        if is_too_long:
            rejected = InputRejected(message, detail=detail)
            rejected.is_too_long = True
            return rejected
        if status in _TRANSIENT or status >= 500:
            error = TransientProviderError(
                message,
                detail=detail,
                retry_after=retry_after(response.headers),
                throttled=status == 429,
            )
            error.is_gateway = status in _AWAY
            return error
        if status in _REJECTED:
            return InputRejected(message, detail=detail)
        if 300 <= status < 400:
            hint = "Redirects are refused; register the model with the final base URL."
            return ProviderMisconfigured(message, detail=detail, hint=hint)
        hint = "Check the base URL, the model's name and the API key in the server's environment."
        return ProviderMisconfigured(message, detail=detail, hint=hint)


def _is_about_encoding(error: ProviderError, *, is_probe: bool) -> bool:
    """Return True for a refusal that names the encoding, or that nothing about a probe's harmless text explains."""
    if isinstance(error, TransientProviderError) and (error.throttled or error.unreachable or error.is_gateway):
        return False
    # Some servers refuse with status 200. Whatever else came without a refusal may have been paid for.
    if not error.is_refusal and error.message != _NO_VECTORS:
        return False
    if _ENCODING_WORDS.search(error.detail or ""):
        return True
    return is_probe and error.is_refusal and not isinstance(error, ProviderMisconfigured)


def _never_left(error: BaseException) -> bool:
    return type(error.__cause__).__name__ in _UNREACHABLE


def redact(text: str, key: str | None) -> str:
    """One bounded line of the text without the key and without anything that looks like one."""
    # Before it is cut: half a key would not be recognised.
    if key:
        text = text.replace(key, "[redacted]")
    return " ".join(_SECRETS.sub("[redacted]", text).split())[:_MESSAGE_CHARACTERS]


def _error_text(body: str) -> str:
    """The provider's own words out of an error's body, with the parameter that they are about."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return body
    parameter = None
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            parameter = answer.get("param") or parameter
            answer = answer[name]
    words = answer if isinstance(answer, str) else json.dumps(answer)
    return f"{words} ({parameter})" if isinstance(parameter, str) and parameter not in words else words


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The wait in seconds that the provider asks for, in any of the forms in use; None without one."""
    wait = _number(headers.get("retry-after-ms"), 0.001)
    if wait is None:
        wait = _number(headers.get("retry-after"), 1.0)
    if wait is None and headers.get("retry-after"):
        try:
            wait = email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if wait is None else min(max(wait, 0.0), _MAX_RETRY_AFTER)


def _number(text: str | None, unit: float) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value * unit if math.isfinite(value) else None


def read_answer(
    content: bytes, count: int, dimensions: int | None, clean: Callable[[str], str], *, keeps_order: bool = True
) -> EmbeddingBlock:
    """Check an answer's body and return its vectors in the order of the texts.

    `keeps_order` is False once an answer of this endpoint had its vectors in another order.

    Raises TransientProviderError where the body is no answer at all, InvalidVectors where it does not fit the texts and
    DimensionMismatch where the vectors have another width than the column. Values are checked in embedline.vectors.
    """
    items, tokens = _items(content, clean)
    if len(items) != count:
        raise InvalidVectors(f"the provider returned {len(items)} vectors for {count} texts")
    _check_encoding(items)
    numbers, is_indexed = text_numbers(items, keeps_order=keeps_order)
    rows = [b""] * count
    for number, item in zip(numbers, items, strict=True):
        rows[number] = _row(item.get("embedding") if isinstance(item, dict) else None)
    widths = sorted({len(row) // 4 for row in rows})
    if len(widths) != 1 or widths[0] == 0:
        found = " and ".join(map(str, widths))
        raise InvalidVectors(f"the provider returned vectors of {found} dimensions in one answer")
    if dimensions is not None and widths[0] != dimensions:
        raise DimensionMismatch(
            detail=f"Expected {dimensions} dimensions, got {widths[0]}.{_width_remark(items, dimensions)}"
        )
    learned = {} if is_indexed else {"index": "order of the texts"}
    if any(number < before for before, number in itertools.pairwise(numbers)):
        learned["order"] = "by index"
    return EmbeddingBlock(count, widths[0], b"".join(rows), tokens, learned)


def _items(content: bytes, clean: Callable[[str], str]) -> tuple[list[Any], int | None]:
    """The vectors of an answer and the tokens that it says it cost."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        text = clean(content[:4096].decode(errors="replace"))
        raise TransientProviderError("the provider's answer is not JSON", detail=text) from None
    items = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(items, list):
        text = clean(_error_text(content[:4096].decode(errors="replace")))
        raise TransientProviderError(_NO_VECTORS, detail=text)
    usage = answer.get("usage")
    counts = [usage.get("total_tokens"), usage.get("prompt_tokens")] if isinstance(usage, dict) else []
    # No text has no tokens: 0 stands for "not counted".
    return items, next((count for count in counts if type(count) is int and count > 0), None)


def _check_encoding(items: Sequence[Any]) -> None:
    """Raise ProviderMisconfigured if the first vector is base64 of anything but little-endian float32.

    An endpoint that encodes one vector so encodes all of them: no row is the cause, and none is charged.
    """
    first = items[0].get("embedding") if items and isinstance(items[0], dict) else None
    if not isinstance(first, str):
        return
    with contextlib.suppress(binascii.Error, ValueError):
        if found := mistaken_encoding(binascii.a2b_base64(first, strict_mode=True)):
            raise ProviderMisconfigured(
                f"the provider's base64 holds {found}, not little-endian float32",
                detail='The option {"encoding_format": "float"} asks for lists of numbers.',
                hint="""Set options => '{"encoding_format": "float"}' in embedline.create_model or embedline.alter_model.""",
            )


def _width_remark(items: Sequence[Any], dimensions: int) -> str:
    """Say what base64 of an unexpected length may be."""
    first = items[0].get("embedding")
    if not isinstance(first, str):
        return ""
    count = len(binascii.a2b_base64(first))
    known = {dimensions: "one byte", 2 * dimensions: "float16", 8 * dimensions: "float64"}
    if count not in known:
        return ""
    return f" The base64 holds {count} bytes, as many as {dimensions} values of {known[count]} have."


def _row(embedding: object) -> bytes:
    """The float32 bytes of one vector, given as base64 or, by servers that know no base64, as a list of numbers."""
    try:
        if isinstance(embedding, str):
            row = binascii.a2b_base64(embedding, strict_mode=True)
            if len(row) % 4:
                raise InvalidVectors(
                    "the provider returned a base64 vector that is not made of float32 values",
                    detail=f"It holds {len(row)} bytes; each value takes 4.",
                )
            return row
        if isinstance(embedding, list) and not any(isinstance(value, bool) for value in embedding):
            values = array.array("f", embedding)
            if sys.byteorder == "big":
                values.byteswap()
            return values.tobytes()
    except (binascii.Error, TypeError, OverflowError, ValueError):
        pass
    raise InvalidVectors("the provider returned a vector that is neither base64 nor a list of numbers")
