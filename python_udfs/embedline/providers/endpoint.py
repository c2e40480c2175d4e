"""Post requests to a service over HTTP: connections, keys, certificates, errors.

The `openai` client runs in a thread of its own. It never retries, because the callers do.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from embedline.core.embedding import ModelConfig
from embedline.core.redaction import redact
from embedline.errors import InputRejected, ProviderMisconfigured, TransientProviderError
from embedline.providers.allowed import require_allowed
from embedline.providers.guard import Refused, event_hooks, refused
from embedline.providers.loop_thread import LoopThread
from embedline.providers.openai_errors import never_left, status_error
from embedline.providers.tls import no_authorities, tls_context, untrusted

if TYPE_CHECKING:
    import ssl

    import openai

T = TypeVar("T")
OPENAI_URL = "https://api.openai.com/v1"
_CONNECT_SECONDS = 5.0
# Seconds to pause after a rate limit if the provider names no wait.
_PAUSE_SECONDS = 0.5
# Longest seconds that a session pauses after a rate limit. A longer wait is the circuit breaker's, which can be closed.
_LONGEST_PAUSE_SECONDS = 1.0


class Endpoint:
    """A service over HTTP, bound to one model.

    `own_url` is the address of the provider's own service, whose key is in `own_key` if the model names no variable.
    """

    # Seconds that a connection waits for its next request; the HTTP library's own default is 5.
    idle_connection_seconds = 5.0

    def __init__(self, config: ModelConfig, own_url: str | None, own_key: str | None) -> None:
        self._config = config
        self._own_url, self._own_key = own_url, own_key
        parts = urlsplit(config.base_url or own_url or "")
        # Azure's classic addresses carry ?api-version=…, which belongs behind the path of each request.
        self._query = dict(parse_qsl(parts.query))
        self._url = urlunsplit(parts._replace(query="", fragment="")).rstrip("/")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ProviderMisconfigured(f'the base URL of model "{config.name}" is not an http or https address')
        self._host = parts.hostname
        self._address = f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        self._thread = LoopThread("embedline-openai", self._release)
        self._client: openai.AsyncOpenAI | None = None
        self._slots: asyncio.Semaphore | None = None
        # Clock times of the last rate limit, of the end of the wait that the provider asks for, and of this session's
        # pause.
        self._limited_at = self._wanted_until = self._resume_at = 0.0

    def close(self) -> None:
        """End the requests in flight, the connections and the thread."""
        self._thread.close()

    # The loop's thread

    async def _release(self) -> None:
        client, self._client, self._slots = self._client, None, None
        if client is not None:
            await client.close()

    async def _in_turn(self, submitted_at: float, ask: Callable[[str | None], Awaitable[T]]) -> T:
        """Wait for a free slot, then ask with the key.

        A rate limit that an earlier request met is raised without asking.
        """
        require_allowed(self._config, self._url)
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
                return await ask(key)
            except TransientProviderError as error:
                if error.throttled:
                    pause = _PAUSE_SECONDS if error.retry_after is None else error.retry_after
                    self._limited_at = time.monotonic()
                    self._wanted_until = self._limited_at + pause
                    self._resume_at = self._limited_at + min(pause, _LONGEST_PAUSE_SECONDS)
                raise

    async def _answered(self, key: str | None, answer: Awaitable[T]) -> T:
        """Return the client's answer.

        Raises ProviderError, without the key, for any failure.
        """
        import openai

        try:
            # The read timeout restarts with every byte, so this bounds the whole request.
            async with asyncio.timeout(self._config.timeout_seconds + _CONNECT_SECONDS):
                return await answer
        # `from None` throughout, because a report of the chain would show the request, which holds the key.
        except openai.APIStatusError as error:
            refusal = status_error(self._address, error.response, key)
            refusal.is_refusal = True
            raise refusal from None
        except (openai.APITimeoutError, TimeoutError) as error:
            message = f"{self._address} did not answer within {self._config.timeout_seconds:g} s"
            raise TransientProviderError(message, unreachable=never_left(error)) from None
        except (openai.APIConnectionError, Refused) as error:
            if guarded := refused(self._address, error, key):
                raise guarded from None
            if distrusted := untrusted(self._config, self._address, error):
                # The next request reads the authorities again: they may have been replaced meanwhile.
                self._client = None
                raise distrusted from None
            message = f"the connection to {self._address} failed"
            detail = redact(f"{type(error.__cause__).__name__}: {error.__cause__}", key)
            raise TransientProviderError(message, detail=detail, unreachable=never_left(error)) from None
        except UnicodeEncodeError:
            raise InputRejected("a text holds characters that cannot be sent") from None
        except openai.OpenAIError as error:
            detail = redact(str(error), key)
            raise TransientProviderError(f"the request to {self._address} failed", detail=detail) from None

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
                    # The size of a compressed answer is known too late.
                    headers={"Accept-Encoding": "identity"},
                    event_hooks=event_hooks(),
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
        variable = self._config.api_key_env or (self._own_key if self._url == self._own_url else None)
        if variable is None:
            return None
        key = os.environ.get(variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            # The HTTP library would repeat the key in its error, or take it for a fault of the texts.
            raise ProviderMisconfigured(
                f'the API key of model "{self._config.name}" holds characters that cannot be sent',
                detail=f"{variable} in the server's environment has a line break, or a character that is not ASCII.",
                hint=f"Set {variable} to one line of ASCII and restart the server.",
            )
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
