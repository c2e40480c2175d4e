"""Fetch files that rows refer to, from disks of the server, over HTTP and from S3.

Everything runs in a thread of its own. Nothing is fetched but what the table embedline.media_source lists.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from embedline.core.file_addresses import listed_prefix, shown
from embedline.core.media import MAX_MEDIA_BYTES
from embedline.errors import FileUnavailable, InputRejected
from embedline.providers.guard import MOST_BYTES, AnswerTooLarge, ForbiddenAddress, event_hooks
from embedline.providers.loop_thread import LoopThread

# Files that are fetched at a time, and the seconds that one may take.
_AT_A_TIME, _SECONDS = 8, 30.0
# Answers after which the same request may succeed later.
_PASSING_STATUS = (408, 425, 429)
_TOO_LARGE = f"the file has more than {MAX_MEDIA_BYTES:,} bytes, which are read at most"


class FileFetcher:
    """Fetches files for one session."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._thread = LoopThread("embedline-files", self._release)
        self._client: Any = None
        self._slots: asyncio.Semaphore | None = None

    def submit(self, address: str, prefixes: Sequence[str]) -> Future[bytes]:
        """Start fetching a file.

        The future raises InputRejected for a file that cannot be had, FileUnavailable for one that may be later.
        """
        return self._thread.start(self._fetch(address, prefixes))

    def close(self) -> None:
        """End the requests, the connections and the thread."""
        self._thread.close()

    # The loop's thread

    async def _release(self) -> None:
        client, self._client, self._slots = self._client, None, None
        if client is not None:
            await client.aclose()

    async def _fetch(self, address: str, prefixes: Sequence[str]) -> bytes:
        prefix = listed_prefix(address, prefixes)
        if self._slots is None:
            self._slots = asyncio.Semaphore(_AT_A_TIME)
        async with self._slots:
            if address.startswith("file:"):
                return _read(_path_of(address), _path_of(prefix))
            try:
                async with asyncio.timeout(_SECONDS):
                    return await self._get(address)
            except TimeoutError:
                raise FileUnavailable(f"{shown(address)} did not come within {_SECONDS:g} s") from None

    async def _get(self, address: str) -> bytes:
        url, headers = self._signed(address) if address.startswith("s3:") else (address, {})
        if self._client is None:
            import openai

            self._client = openai.DefaultAsyncHttpxClient(
                # A redirect would lead to an address that no administrator has listed.
                follow_redirects=False,
                timeout=_SECONDS,
                # The size of a compressed answer is known too late.
                headers={"Accept-Encoding": "identity"},
                event_hooks=event_hooks(),
            )
        MOST_BYTES.set(MAX_MEDIA_BYTES)
        try:
            answer = await self._client.get(url, headers=headers)
        except Exception as error:
            raise _failure(address, error) from None
        status = int(answer.status_code)
        if status == 200:
            return bytes(answer.content)
        if status >= 500 or status in _PASSING_STATUS:
            raise FileUnavailable(f"{shown(address)} answers with HTTP {status}")
        reason = "redirects, which is not followed" if 300 <= status < 400 else f"answers with HTTP {status}"
        raise InputRejected(f"{shown(address)} {reason}")

    def _signed(self, address: str) -> tuple[str, dict[str, str]]:
        """Return the HTTP address of an object in S3, and headers with a signature.

        The keys are those of the server's environment; without any the request is not signed.
        """
        parts = urlsplit(address)
        given = self._environment
        region = given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION") or "us-east-1"
        endpoint = given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL")
        path = quote(unquote(parts.path))
        url = f"{endpoint.rstrip('/')}/{parts.netloc}{path}" if endpoint else ""
        url = url or f"https://{parts.netloc}.s3.{region}.amazonaws.com{path}"
        key, secret = given.get("AWS_ACCESS_KEY_ID"), given.get("AWS_SECRET_ACCESS_KEY")
        if not key or not secret:
            return url, {}
        try:
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest
            from botocore.credentials import Credentials
        except ImportError:
            raise FileUnavailable(
                "files of S3 need botocore on the server", hint="Install embedline[s3] and restart the server."
            ) from None
        request = AWSRequest(method="GET", url=url)
        S3SigV4Auth(Credentials(key, secret, given.get("AWS_SESSION_TOKEN")), "s3", region).add_auth(request)
        return url, {str(name): str(value) for name, value in request.headers.items()}


def _failure(address: str, error: BaseException) -> InputRejected | FileUnavailable:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AnswerTooLarge):
            return InputRejected(_TOO_LARGE)
        if isinstance(cause, ForbiddenAddress):
            return InputRejected(f"{shown(address)} is not asked, because it is at {cause}")
        cause = cause.__cause__ or cause.__context__
    return FileUnavailable(f"the connection to {shown(address)} failed", detail=type(error).__name__)


def _path_of(address: str) -> str:
    return unquote(urlsplit(address).path)


def _read(path: str, folder: str) -> bytes:
    """Return a file below a folder.

    What was opened is checked, not the path: a link may lead out of the folder, and may change meanwhile.
    """
    try:
        # A pipe would keep the reader waiting.
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise InputRejected("there is no such file on the server") from None
    except OSError as error:
        raise InputRejected(f"the server cannot read the file: {error.strerror}") from None
    try:
        found, root = os.readlink(f"/proc/self/fd/{number}"), os.path.realpath(folder)
        # A pipe or a socket has no path: its name is "pipe:[42]".
        if not found.startswith(os.path.join(root, "")):
            raise InputRejected("the file is a link to another folder, which embedline.media_source does not list")
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise InputRejected("the address is that of no regular file")
        if status.st_size > MAX_MEDIA_BYTES:
            raise InputRejected(_TOO_LARGE)
        with os.fdopen(number, "rb", closefd=False) as file:
            return file.read(MAX_MEDIA_BYTES)
    except OSError as error:
        raise FileUnavailable(f"the server cannot read the file: {error.strerror}") from None
    finally:
        os.close(number)
