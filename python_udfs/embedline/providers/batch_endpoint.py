"""Embed through a provider's batch endpoint: within a day, at half the price.

The form is that of OpenAI. A file of requests is uploaded (/files), and a batch is created of it (/batches). Its answers are
files, too. A line of the file is one text, so that one that fails costs no other.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import IO, Any, TypeVar, cast

from embedline.core.embedding import ModelConfig
from embedline.core.redaction import redact
from embedline.errors import EmbedlineError, ProviderError, ProviderMisconfigured, TransientProviderError
from embedline.providers.batches import BatchAnswer, BatchFiles, BatchState
from embedline.providers.guard import MOST_BYTES
from embedline.providers.openai_answer import read_answer
from embedline.providers.openai_compatible import OpenAIEmbedder
from embedline.providers.options import request_body

T = TypeVar("T")
# Least seconds that a call may take: a file is large.
_CALL_SECONDS = 600.0
# Batches that are listed to find one again, and how many at a time.
_LISTED, _PAGE = 1000, 100
# The member of a batch's metadata by which it is found again.
_MARK = "embedline_batch"
_BYTES_BESIDE, _BYTES_OF_NUMBER = 1 << 16, 64
# Statuses below 500 after which a batch may have been created.
_UNSURE = (408, 409)
_FILE = ("embedline.jsonl", "application/jsonl")


class BatchEndpoint(OpenAIEmbedder):
    """The batch endpoint of one model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(replace(config, timeout_seconds=max(config.timeout_seconds, _CALL_SECONDS), concurrency=2))

    # The main thread

    def send(self, texts: Sequence[tuple[int, str]], token: str, *, was_tried: bool) -> Future[BatchState]:
        """Upload texts with their numbers and create a batch of them.

        If that `was_tried`, the provider may have the batch: it is searched for by its token first.
        """
        return self._start(lambda key: self._send(texts, token, key, was_tried=was_tried))

    def state(self, provider_id: str) -> Future[BatchState]:
        """Ask for the state of a batch."""
        return self._start(lambda key: self._state(key, f"/batches/{provider_id}", "get"))

    def find(self, token: str) -> Future[BatchState | None]:
        """Search for a batch by its token."""
        return self._start(lambda key: self._find(token, key))

    def cancel(self, provider_id: str | None, token: str) -> Future[BatchState | None]:
        """Cancel a batch; one whose number is not known is searched for."""
        return self._start(lambda key: self._cancel(provider_id, token, key))

    def download(self, files: Sequence[str], texts: int) -> Future[BatchFiles]:
        """Download files with the answers for so many texts."""
        return self._start(lambda key: self._download(files, texts, key))

    def forget(self, files: Sequence[str]) -> Future[None]:
        """Delete files at the provider; it does not matter if that fails."""
        return self._start(lambda key: self._forget(files, key))

    def read(self, line: bytes) -> BatchAnswer | None:
        """Read a line of the answers; None if it is none."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
            return None
        custom_id, response, error = found["custom_id"], found.get("response"), found.get("error")
        if not isinstance(response, dict):
            code = str(error.get("code")) if isinstance(error, dict) else ""
            told = _words(error, self._known_key())
            return BatchAnswer(custom_id, None, told or "no answer", not code.startswith("batch_"))
        body = json.dumps(response.get("body")).encode()
        status = response.get("status_code")
        if status != 200:
            refusal = response.get("body")
            told = _words(refusal.get("error") if isinstance(refusal, dict) else None, self._known_key())
            detail = f"status {status}: {told}"
            # A moment's trouble says nothing of the text.
            return BatchAnswer(custom_id, None, detail, not (status == 429 or (type(status) is int and status >= 500)))
        try:
            return BatchAnswer(custom_id, read_answer(body, 1, self._config.dimensions, lambda text: text))
        except ProviderError as error:
            return BatchAnswer(custom_id, None, f"{error}", True)

    def _known_key(self) -> str | None:
        """Return the key that a provider may repeat, None if there is none."""
        try:
            return self._api_key()
        except ProviderMisconfigured:
            return None

    def _start(self, ask: Callable[[str | None], Awaitable[T]]) -> Future[T]:
        return self._thread.start(self._guarded(ask))

    async def _guarded(self, ask: Callable[[str | None], Awaitable[T]]) -> T:
        """Ask, and raise an EmbedlineError for any failure.

        An error of the disk, or in reading an answer of another form, would end the worker.
        """
        try:
            return await self._in_turn(time.monotonic(), ask)
        except EmbedlineError:
            raise
        except Exception as error:
            raise TransientProviderError(
                "a call of the batch endpoint failed",
                detail=redact(f"{type(error).__name__}: {error}", self._known_key()),
            ) from error

    # The loop's thread

    async def _send(
        self, texts: Sequence[tuple[int, str]], token: str, key: str | None, *, was_tried: bool
    ) -> BatchState:
        if was_tried and (found := await self._find(token, key)) is not None:
            return found
        body = b"".join(self._line(number, text) for number, text in texts)
        client = self._open_client()
        uploaded = await self._answered(
            key,
            client.files.with_raw_response.create(
                file=(_FILE[0], body, _FILE[1]), purpose="batch", extra_headers=self._headers(key)
            ),
        )
        file_id = _member(uploaded.content, "id")
        wanted = {
            "input_file_id": file_id,
            "endpoint": "/v1/embeddings",
            "completion_window": "24h",
            "metadata": {_MARK: token},
        }
        try:
            return await self._state(key, "/batches", "post", wanted)
        except ProviderError as error:
            # After any other failure the provider may have the batch, and reads the file.
            if error.status is not None and 400 <= error.status < 500 and error.status not in _UNSURE:
                with contextlib.suppress(ProviderError):
                    await self._forget([file_id], key)
            raise

    def _line(self, number: int, text: str) -> bytes:
        config = self._config
        body: dict[str, Any] = request_body(config.options, "document")
        body |= {"model": config.model, "input": config.document_prefix + text}
        if self._sends_dimensions():
            body["dimensions"] = config.dimensions
        if self._encoding != "none":
            body["encoding_format"] = self._encoding
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": body}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"

    async def _find(self, token: str, key: str | None) -> BatchState | None:
        """Return the batch with a token, if the provider has it."""
        after: str | None = None
        for _ in range(_LISTED // _PAGE):
            params = {"limit": _PAGE} | ({"after": after} if after else {})
            page = await self._ask_json(key, "/batches", "get", params)
            batches = page.get("data")
            if not isinstance(batches, list) or not batches:
                return None
            for batch in batches:
                if isinstance(batch, dict) and (batch.get("metadata") or {}).get(_MARK) == token:
                    return _read_state(batch, key)
            if not page.get("has_more"):
                return None
            after = str(batches[-1].get("id"))
        return None

    async def _cancel(self, provider_id: str | None, token: str, key: str | None) -> BatchState | None:
        if provider_id is None:
            found = await self._find(token, key)
            if found is None:
                return None
            provider_id = found.provider_id
        return await self._state(key, f"/batches/{provider_id}/cancel", "post", {})

    async def _state(
        self, key: str | None, path: str, method: str, body: Mapping[str, Any] | None = None
    ) -> BatchState:
        return _read_state(await self._ask_json(key, path, method, body), key)

    async def _ask_json(
        self, key: str | None, path: str, method: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        client = cast(Any, self._open_client())
        options: dict[str, Any] = {"headers": self._headers(key)}
        if method == "get":
            sent = client.get(path, cast_to=object, options={**options, "params": body or {}})
        else:
            sent = client.post(path, cast_to=object, body=body, options=options)
        found: object = await self._answered(key, sent)
        if not isinstance(found, dict):
            raise TransientProviderError("the provider's answer is not JSON", detail=redact(str(found)[:1000], key))
        return found

    async def _download(self, files: Sequence[str], texts: int, key: str | None) -> BatchFiles:
        width = self._config.dimensions or 0
        MOST_BYTES.set(_BYTES_BESIDE * max(texts, 16) + texts * width * _BYTES_OF_NUMBER)
        found = BatchFiles()
        try:
            for file_id in files:
                # Closed by the reader, which removes it.
                part = tempfile.TemporaryFile(prefix="embedline-batch-")  # noqa: SIM115
                found.parts.append(part)
                await self._answered(key, self._copy(file_id, key, part))
        except BaseException:
            found.close()
            raise
        return found

    async def _copy(self, file_id: str, key: str | None, part: IO[bytes]) -> None:
        answered = self._open_client().files.with_streaming_response.content(file_id, extra_headers=self._headers(key))
        async with answered as response:
            async for piece in response.iter_bytes():
                part.write(piece)

    async def _forget(self, files: Sequence[str], key: str | None) -> None:
        for file_id in files:
            client = cast(Any, self._open_client())
            sent = client.delete(f"/files/{file_id}", cast_to=object, options={"headers": self._headers(key)})
            await self._answered(key, sent)


def _read_state(batch: Mapping[str, Any], key: str | None) -> BatchState:
    provider_id, status = batch.get("id"), batch.get("status")
    # The number becomes a part of an address.
    is_number = isinstance(provider_id, str) and provider_id.isascii() and provider_id.isprintable()
    if not is_number or not isinstance(provider_id, str) or not isinstance(status, str):
        raise TransientProviderError("the provider's answer is no batch", detail=_clean(batch, key))
    files = tuple(str(batch[name]) for name in ("output_file_id", "error_file_id") if batch.get(name))
    errors = batch.get("errors")
    told = errors.get("data") if isinstance(errors, dict) else None
    reasons = tuple(
        (
            _clean(e.get("code"), key),
            _clean(e.get("message"), key),
            e.get("line") if type(e.get("line")) is int else None,
        )
        for e in told or ()
        if isinstance(e, dict)
    )
    input_file = batch.get("input_file_id")
    return BatchState(provider_id, status, files, str(input_file) if input_file else None, reasons)


def _member(content: bytes, name: str) -> str:
    try:
        return str(json.loads(content)[name])
    except (ValueError, KeyError, TypeError):
        raise TransientProviderError("the provider's answer has no number of a file") from None


def _words(error: object, key: str | None) -> str:
    told = error if isinstance(error, dict) else {}
    return _clean(told.get("message") or told.get("code"), key)


def _clean(words: object, key: str | None) -> str:
    """Return words of a provider in a form that can be stored.

    They hold no key, and no half of a character: a service may cut a text in the middle of one.
    """
    return redact(str(words or "").encode(errors="replace").decode().replace("\0", ""), key)
