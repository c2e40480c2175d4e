"""Ask local models through the model host, a process of its own.

Runs inside a PostgreSQL backend. A session's first search pays for this module, so it imports neither numpy nor torch.
All I/O is in one daemon thread. It starts with every signal blocked, because PostgreSQL's handlers belong to the main
thread.

PL/Python keeps the interpreter's lock between calls, so the thread stands still while no Embedline code runs. It
therefore reads all data that has arrived before it decides that a time limit has passed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from embedline.core.embedding import EmbeddingBlock, Kind, ModelConfig, ModelInfo
from embedline.core.media import MediaPart, Modality, ModelInput
from embedline.core.processes import start_thread
from embedline.core.reranking import RerankScores
from embedline.embedders.host_answers import block_reader, read_info, read_segments, scores_reader
from embedline.errors import (
    InputRejected,
    InvalidVectors,
    ModelHostUnavailable,
    ProviderError,
)
from embedline.model_host.host_settings import HostSettings, settings_of
from embedline.model_host.launcher import connect_or_start, log_tail
from embedline.model_host.place import Owner, prepare_place
from embedline.model_host.protocol import Frame, FrameDecoder, ProtocolError, encode_frame, pack_media, pack_texts
from embedline.model_host.wire_errors import read_error

if TYPE_CHECKING:
    from embedline.chunking import ChunkingSpec

_RECEIVE_BYTES = 1 << 18
# Attempts at a request. After two hosts that died of it there is no third, because the request may be the cause.
_MAX_ATTEMPTS = 2
_MAX_UNHEARD = 40
_UNHEARD_PAUSE_SECONDS = 0.05
_CLOSE_SECONDS = 1.0


@dataclass(eq=False)
class _Call:
    """A request on its way; `read` makes the future's result from the answer's frame."""

    number: int
    frame: bytes
    future: Future[Any]
    read: Callable[[Frame], object]
    attempts: int = 0
    unheard: int = 0


@dataclass
class _Link:
    """A connection with its unsent bytes and the calls that wait for answers."""

    socket: socket.socket
    decoder: FrameDecoder = field(default_factory=FrameDecoder)
    unsent: bytearray = field(default_factory=bytearray)
    calls: dict[int, _Call] = field(default_factory=dict)
    last_heard: float = field(default_factory=time.monotonic)
    heard: bool = False


class LocalEmbedder:
    """Embed or rerank with a sentence-transformers model in the server's model host.

    The host belongs to `owner_pid`, by default the parent process. The parent of a backend is the postmaster.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        owner_pid: int | None = None,
        runtime_root: str | None = None,
        settings: HostSettings | None = None,
    ) -> None:
        self._config = config
        self._settings = settings or settings_of(config)
        self._owner = Owner.of(owner_pid or os.getppid())
        self._place = prepare_place(self._settings, self._owner, runtime_root)
        self._numbers = itertools.count(1)
        self._waiting: deque[_Call] = deque()
        self._cancelled: deque[int] = deque()
        self._link: _Link | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)

    # The main thread

    def submit(self, texts: Sequence[ModelInput], kind: Kind) -> Future[EmbeddingBlock]:
        """Start embedding texts, or segments of media; the future raises ProviderError."""
        future: Future[EmbeddingBlock] = Future()
        if not texts:
            future.set_result(EmbeddingBlock(0, self._config.dimensions or 0, b""))
            return future
        if (parts := [text for text in texts if isinstance(text, MediaPart)]) and len(parts) == len(texts):
            self._send_parts(kind, parts, future)
            return future
        prefix = self._config.query_prefix if kind == "query" else self._config.document_prefix
        given = [prefix + text for text in texts if isinstance(text, str)]
        if parts:
            raise InputRejected("a request has either texts or files")
        self._send({"op": "embed", "kind": kind}, given, future, block_reader(len(texts), self._config.dimensions))
        return future

    def submit_segments(
        self, files: Sequence[bytes], modality: Modality, spec: ChunkingSpec
    ) -> Future[list[list[tuple[int, int]] | str]]:
        """Start finding the segments of files.

        The result holds the reason for a file that cannot be decoded.
        """
        future: Future[list[list[tuple[int, int]] | str]] = Future()
        chunking = {"method": spec.method, "options": dict(spec.options)}
        header = {"op": "segment", "modality": modality, "chunking": chunking, "lengths": list(map(len, files))}
        self._start_checked(header, b"".join(files), future, read_segments)
        return future

    def submit_rerank(self, query: str, texts: Sequence[str]) -> Future[RerankScores]:
        """Start scoring the texts for the query; the future raises ProviderError."""
        given = [self._config.query_prefix + query, *[self._config.document_prefix + text for text in texts]]
        future: Future[RerankScores] = Future()
        self._send({"op": "rerank"}, given, future, scores_reader(len(texts)))
        return future

    def probe(self) -> Future[ModelInfo]:
        """Ask the model host for the model's dimensions and limits."""
        future: Future[ModelInfo] = Future()
        self._start({"op": "probe"}, b"", future, read_info)
        return future

    def close(self) -> None:
        """Close the connection and cancel unfinished calls.

        The host goes on for other sessions.
        """
        self._closed = True
        if self._thread is not None:
            self._wake()
            self._thread.join(_CLOSE_SECONDS)
        if self._thread is None or not self._thread.is_alive():
            self._wake_reader.close()
            self._wake_writer.close()

    def _send(
        self, header: dict[str, Any], texts: Sequence[str], future: Future[Any], read: Callable[[Frame], object]
    ) -> None:
        """Start a request with texts.

        The future raises InputRejected for texts that cannot be sent.
        """
        try:
            lengths, payload = pack_texts(texts)
            self._start({**header, "lengths": lengths}, payload, future, read)
        except UnicodeEncodeError:
            future.set_exception(InputRejected("a text holds characters that UTF-8 cannot express"))
        except ProtocolError as error:
            future.set_exception(InputRejected("the texts are too large for one request", detail=str(error)))

    def _send_parts(self, kind: Kind, parts: Sequence[MediaPart], future: Future[EmbeddingBlock]) -> None:
        fields, payload = pack_media(parts)
        self._start_checked(
            {"op": "embed", "kind": kind, **fields}, payload, future, block_reader(len(parts), self._config.dimensions)
        )

    def _start_checked(
        self, header: dict[str, Any], payload: bytes, future: Future[Any], read: Callable[[Frame], object]
    ) -> None:
        """Start a request with files.

        The future raises InputRejected if they are too large for it.
        """
        try:
            self._start(header, payload, future, read)
        except ProtocolError as error:
            future.set_exception(InputRejected("the files are too large for one request", detail=str(error)))

    def _start(
        self, header: dict[str, Any], payload: bytes, future: Future[Any], read: Callable[[Frame], object]
    ) -> None:
        if self._closed:
            raise ModelHostUnavailable("the embedder is closed")
        number = next(self._numbers)
        call = _Call(number, encode_frame({"id": number, **header}, payload), future, read)
        future.add_done_callback(lambda done: self._forget(number) if done.cancelled() else None)
        self._waiting.append(call)
        self._ensure_thread()
        self._wake()

    def _forget(self, number: int) -> None:
        self._cancelled.append(number)
        self._wake()

    def _wake(self) -> None:
        # If the buffer is full, the thread is about to wake anyway. If the socket is closed, there is nothing left to
        # do.
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_writer.send(b"\0")

    def _ensure_thread(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._run, name="embedline-model-host", daemon=True)
        start_thread(self._thread, self)

    # The I/O thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self._step()
            self._abandon(None)
        except BaseException as error:
            # No caller may wait for ever on a thread that has ended. The next submit starts another.
            self._abandon(ModelHostUnavailable("the model host's client failed", detail=repr(error)))
            raise

    def _step(self) -> None:
        if self._link is not None:
            # Receive first, because a host that ended may have closed an idle connection.
            self._receive(self._link)
        self._send_cancellations()
        self._send_waiting()
        if self._link is not None:
            self._flush(self._link)
        self._check_silence()
        # A lost link requeues its calls. They need another round, not a wait.
        if self._waiting and self._link is None:
            return
        self._wait()

    def _wait(self) -> None:
        with selectors.PollSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            timeout = None
            if self._link is not None:
                writes = selectors.EVENT_WRITE if self._link.unsent else 0
                selector.register(self._link.socket, selectors.EVENT_READ | writes)
                if self._link.calls:
                    timeout = max(0.0, self._link.last_heard + self._config.timeout_seconds - time.monotonic())
            selector.select(timeout)
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)

    def _send_waiting(self) -> None:
        while self._waiting and not self._closed:
            if self._link is not None and len(self._link.calls) >= max(1, self._config.concurrency):
                return
            call = self._waiting.popleft()
            if call.future.cancelled():
                continue
            link = self._link or self._connect(call)
            if link is None:
                continue
            if not link.calls:
                link.last_heard = time.monotonic()
            call.attempts += 1
            link.calls[call.number] = call
            link.unsent += call.frame

    def _connect(self, first: _Call) -> _Link | None:
        try:
            found = connect_or_start(self._place, self._settings, self._owner, lambda: self._closed)
        except (ProviderError, OSError) as error:
            failure = error if isinstance(error, ProviderError) else _unavailable("cannot start the model host", error)
            # Calls that wait now would meet the same failure. Later calls try again.
            for call in [first, *_take_all(self._waiting)]:
                _resolve(call.future, failure)
            return None
        self._link = _Link(found)
        return self._link

    def _send_cancellations(self) -> None:
        while self._cancelled:
            number = self._cancelled.popleft()
            if self._link is not None and number in self._link.calls:
                # The call stays registered until the host answers, so that the number in flight stays true.
                self._link.unsent += encode_frame({"id": number, "op": "cancel"})

    def _flush(self, link: _Link) -> None:
        try:
            while link.unsent:
                # The view must be released before the buffer can shrink.
                with memoryview(link.unsent) as view:
                    sent = link.socket.send(view, socket.MSG_NOSIGNAL)
                del link.unsent[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(link, str(error))

    def _receive(self, link: _Link) -> None:
        try:
            while data := link.socket.recv(_RECEIVE_BYTES):
                link.last_heard = time.monotonic()
                link.heard = True
                for frame in link.decoder.feed(data):
                    self._answer(link, frame)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            self._lose(link, str(error))
            return
        self._lose(link, "it closed the connection")

    def _answer(self, link: _Link, frame: Frame) -> None:
        number = frame.header.get("id")
        call = link.calls.pop(number, None) if type(number) is int else None
        if call is None:
            # The frame only shows that the host is alive.
            return
        try:
            _resolve(call.future, read_error(frame.header) or call.read(frame))
        except ProviderError as error:
            _resolve(call.future, error)
        except (KeyError, TypeError, ValueError) as error:
            _resolve(call.future, InvalidVectors("the model host's answer is malformed", detail=repr(error)))

    def _lose(self, link: _Link, reason: str) -> None:
        """Drop the connection; its calls go to a new host once, then they fail."""
        link.socket.close()
        self._link = None
        detail = "\n".join(filter(None, (f"The connection ended: {reason}.", log_tail(self._place))))
        again = []
        if not link.heard and link.calls:
            # A host that is being killed accepts connections until the kernel has removed it. This does not count as an
            # attempt.
            time.sleep(_UNHEARD_PAUSE_SECONDS)
        for call in link.calls.values():
            if not link.heard and call.unheard < _MAX_UNHEARD:
                call.unheard += 1
                call.attempts -= 1
            if call.attempts < _MAX_ATTEMPTS:
                again.append(call)
            else:
                hint = "If it ran out of memory, raise the model's option memory_limit_mb or embed less at once."
                failure = ModelHostUnavailable("the model host went away twice", detail=detail, hint=hint)
                _resolve(call.future, failure)
        self._waiting.extendleft(reversed(again))

    def _check_silence(self) -> None:
        link = self._link
        if link is None or not link.calls or time.monotonic() < link.last_heard + self._config.timeout_seconds:
            return
        link.socket.close()
        self._link = None
        failure = ModelHostUnavailable(f"the model host was silent for {self._config.timeout_seconds:g} s")
        for call in link.calls.values():
            _resolve(call.future, failure)

    def _abandon(self, failure: ProviderError | None) -> None:
        link, self._link = self._link, None
        calls = _take_all(self._waiting)
        if link is not None:
            link.socket.close()
            calls += link.calls.values()
        for call in calls:
            if failure is None:
                call.future.cancel()
            else:
                _resolve(call.future, failure)


def _take_all(calls: deque[_Call]) -> list[_Call]:
    taken = []
    while calls:
        taken.append(calls.popleft())
    return taken


def _unavailable(message: str, error: Exception) -> ModelHostUnavailable:
    return ModelHostUnavailable(message, detail=str(error))


def _resolve(future: Future[Any], result: object) -> None:
    # False if the caller has cancelled.
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, ProviderError):
        future.set_exception(result)
    else:
        future.set_result(result)
