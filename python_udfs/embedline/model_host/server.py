"""The model host's process: an asyncio loop for the connections, one thread for the model."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from embedline.errors import InputRejected, ModelHostUnavailable, ProviderError
from embedline.model_host.faults import describe
from embedline.model_host.inference import LoadedModel, load_model
from embedline.model_host.launcher import HostPlace, HostSettings, Owner, launch_lock, peer_uid
from embedline.model_host.protocol import Frame, FrameDecoder, ProtocolError, encode_frame, unpack_texts
from embedline.model_host.scheduler import Part, Request, Scheduler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHECK_SECONDS = 1.0
# How long a host that cannot load its model stays to tell those who are connected.
_FAREWELL_SECONDS = 1.0
_LOCK_SECONDS = 2.0
# Longer than a library takes to load from a cold disk.
_STARVED_SECONDS = 120
# The requests of one connection that wait here; more stay in its socket.
_MAX_OUTSTANDING = 64
_BACKLOG = 1024

_log = logging.getLogger("embedline.model_host")


def serve(socket_path: str, settings: HostSettings, owner: Owner) -> NoReturn:
    """Serve until idle or until the owner is gone, then end the process."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _log.setLevel(logging.INFO)
    # The loop thread answers queries while the model thread runs Python; the default of 5 ms would be most of a query.
    sys.setswitchinterval(0.0005)
    threading.excepthook = _die_with_thread
    status = 1
    try:
        status = asyncio.run(Host(HostPlace.of_socket(socket_path), settings, owner).run())
    except BaseException:
        _log.exception("the model host failed")
    finally:
        # Not sys.exit: finalising the interpreter under a running model thread can crash or hang.
        os._exit(status)


def _die_with_thread(arguments: threading.ExceptHookArgs) -> None:
    """A host without its model thread would let clients wait for ever; most likely memory has run out."""
    try:
        _log.error("thread failed", exc_info=arguments.exc_value)
    finally:
        os._exit(1)


class Host:
    """All state of the host but the model; lives in the loop's thread."""

    def __init__(self, place: HostPlace, settings: HostSettings, owner: Owner) -> None:
        self.settings = settings
        self.place = place
        self.scheduler = Scheduler()
        self.connections: set[Connection] = set()
        self.failure: ProviderError | None = None
        self._owner = owner
        self._last_request = time.monotonic()
        self._slices_done = 0

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] = self._loop.create_future()
        self.model: asyncio.Future[LoadedModel] = self._loop.create_future()
        listener = _listen(self.place.socket)
        self._socket_identity = _identity(self.place.socket)
        server = await self._loop.create_unix_server(lambda: Connection(self), sock=listener, backlog=_BACKLOG)
        _log.info("model host %d listens for %s", os.getpid(), self.settings.model)
        threading.Thread(target=self._work, name="embedline-model", daemon=True).start()
        self._watch_owner()
        ticks = self._loop.create_task(self._tick())
        status = await self._status
        ticks.cancel()
        server.close()
        return status

    def stop(self, status: int, reason: str) -> None:
        if not self._status.done():
            _log.info("model host %d exits: %s", os.getpid(), reason)
            self._status.set_result(status)

    def touch(self) -> None:
        self._last_request = time.monotonic()

    # The owner, idleness and signs of life

    def _watch_owner(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            # Open first, look second: afterwards the descriptor can only mean the process that we looked at.
            file = os.pidfd_open(self._owner.pid)
            self._loop.add_reader(file, self._owner_gone)
        if not self._owner.alive():
            self._owner_gone()

    def _owner_gone(self) -> None:
        # Nobody can start another host here, so no lock is needed. The last host out removes the directory.
        for path in glob.glob(os.path.join(glob.escape(self.place.directory), f"{self.place.name}.*")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(self.place.directory)
        self.stop(0, "its server is gone")

    async def _tick(self) -> None:
        seen = self._slices_done
        while True:
            # A library that spins with the interpreter's lock in hand (seen in imports that run short of memory) stops
            # this loop, and with it the watch on the owner. The kernel then ends the process: SIGALRM has no handler.
            signal.alarm(_STARVED_SECONDS)
            await asyncio.sleep(CHECK_SECONDS)
            if not self._owner.alive():
                self._owner_gone()
            waiting = [connection for connection in self.connections if connection.outstanding]
            if waiting:
                self.touch()
            elif time.monotonic() - self._last_request >= self.settings.idle_seconds and self._remove_socket():
                self.stop(0, f"idle for {self.settings.idle_seconds:.0f} s")
            # Only progress counts as a sign of life: clients give up a model thread that hangs.
            if seen != self._slices_done or not self.model.done():
                for connection in waiting:
                    connection.send({"op": "busy"})
            seen = self._slices_done

    def _remove_socket(self) -> bool:
        """Stop being found; False where a session is just starting or finding a host."""
        deadline = time.monotonic() + _LOCK_SECONDS
        try:
            with launch_lock(self.place, lambda: time.monotonic() > deadline):
                # A later host may have taken the path. Ours is still open, so its inode is not in use again.
                if _identity(self.place.socket) == self._socket_identity:
                    os.unlink(self.place.socket)
        except ModelHostUnavailable:
            return False
        except FileNotFoundError:
            return True
        return True

    # The model thread

    def _work(self) -> None:
        try:
            model = load_model(self.settings)
        except ProviderError as error:
            _log.error("%s; %s", error.message, error.detail)
            self._loop.call_soon_threadsafe(self._fail, error)
            return
        self._loop.call_soon_threadsafe(self.model.set_result, model)
        while True:
            parts = self.scheduler.take(model.limits)
            try:
                encode_parts(model, parts)
            except Exception as error:
                # Only a lost device comes here; a new process is the one remedy.
                _log.exception("the device is lost")
                failure = ModelHostUnavailable("the model host lost its device", detail=describe(error))
                for request, _ in parts:
                    request.fail(failure)
                self._loop.call_soon_threadsafe(self._fail, failure)
                return
            self._slices_done += 1

    def _fail(self, error: ProviderError) -> None:
        self.failure = error
        self._remove_socket()
        for request in self.scheduler.drain():
            request.fail(error)
        if not self.model.done():
            self.model.set_exception(error)
            # Retrieved here, for there may be no probe that waits for it.
            self.model.exception()
        self._loop.call_later(_FAREWELL_SECONDS, self.stop, 1, error.message)

    def call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        """Run the function in the loop's thread; the model thread calls this."""
        self._loop.call_soon_threadsafe(function, *arguments)


def encode_parts(model: LoadedModel, parts: list[Part]) -> None:
    """Encode one slice. Where it fails, each request of it is tried alone: one bad text fails only its own request."""
    texts = [request.texts[index] for request, indexes in parts for index in indexes]
    try:
        rows = model.encode(texts)
    except InputRejected as error:
        if len(parts) > 1:
            for part in parts:
                encode_parts(model, [part])
        else:
            _log.warning("%s; %s", error.message, error.detail)
            parts[0][0].fail(error)
        return
    start = 0
    for request, indexes in parts:
        request.fill(indexes, rows[start : start + len(indexes)])
        start += len(indexes)


class Connection(asyncio.Protocol):
    """One session's connection. Whatever breaks the protocol closes it."""

    def __init__(self, host: Host) -> None:
        self.outstanding = 0
        self._host = host
        self._decoder = FrameDecoder()
        self._requests: dict[int, Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer: socket.socket = transport.get_extra_info("socket")
        if peer_uid(peer) != os.geteuid():
            transport.abort()
            return
        self._host.connections.add(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self._host.connections.discard(self)
        for request in self._requests.values():
            request.cancelled = True
        for task in self._tasks:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._handle(frame)
        except ProtocolError as error:
            _log.warning("closed a connection: %s", error)
            self._transport.abort()

    def _handle(self, frame: Frame) -> None:
        number, operation = frame.header.get("id"), frame.header.get("op")
        if type(number) is not int:
            raise ProtocolError("the request has no number")
        if operation == "cancel":
            self._cancel(number)
            return
        if number in self._requests:
            raise ProtocolError("the request's number is in use")
        self._host.touch()
        self.outstanding += 1
        if self.outstanding >= _MAX_OUTSTANDING:
            self._transport.pause_reading()
        if operation == "embed":
            self._embed(number, frame)
        elif operation == "probe":
            task = asyncio.get_running_loop().create_task(self._probe(number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif operation == "ping":
            self._answer(number, {"pid": os.getpid(), "ready": self._host.model.done()})
        else:
            raise ProtocolError("the request's operation is unknown")

    def _embed(self, number: int, frame: Frame) -> None:
        kind = frame.header.get("kind")
        if kind != "query" and kind != "document":
            raise ProtocolError("the request's kind is unknown")
        texts = unpack_texts(frame.header.get("lengths"), frame.payload)
        if not texts:
            raise ProtocolError("the request has no texts")
        if self._host.failure is not None:
            self._answer(number, _error_fields(self._host.failure))
            return

        def deliver(result: NDArray[np.float32] | ProviderError) -> None:
            self._host.call_soon(self._finish, number, result)

        request = Request(kind, texts, deliver)
        self._requests[number] = request
        self._host.scheduler.put(request)

    def _finish(self, number: int, result: NDArray[np.float32] | ProviderError) -> None:
        request = self._requests.pop(number, None)
        if request is None:
            return
        if isinstance(result, ProviderError):
            self._answer(number, _error_fields(result))
        else:
            self._answer(number, {"count": result.shape[0], "dimensions": result.shape[1]}, result.tobytes())

    def _cancel(self, number: int) -> None:
        request = self._requests.pop(number, None)
        if request is not None:
            request.cancelled = True
            self._answer(number, _error_fields(ModelHostUnavailable("the request was cancelled")))

    async def _probe(self, number: int) -> None:
        try:
            model = await asyncio.shield(self._host.model)
            # In another thread: hashing the weights of a large model takes a second.
            fields = await asyncio.to_thread(model.describe, self._host.place.tokenizer)
        except ProviderError as error:
            fields = _error_fields(error)
        except (OSError, ValueError) as error:
            fields = _error_fields(ModelHostUnavailable("the model cannot be described", detail=describe(error)))
        self._answer(number, fields)

    def _answer(self, number: int, fields: dict[str, Any], payload: bytes = b"") -> None:
        self.outstanding -= 1
        self._host.touch()
        try:
            self.send({"id": number, **fields}, payload)
        except ProtocolError as error:
            self.send({"id": number, **_error_fields(InputRejected("the answer is too large", detail=str(error)))})
        if self.outstanding == _MAX_OUTSTANDING - 1 and not self._transport.is_closing():
            self._transport.resume_reading()

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        frame = encode_frame(header, payload)
        if not self._transport.is_closing():
            self._transport.write(frame)


def _error_fields(error: ProviderError) -> dict[str, Any]:
    fields = {"class": type(error).__name__, "message": error.message, "detail": error.detail, "hint": error.hint}
    return {"error": fields}


def _listen(path: str) -> socket.socket:
    """Bind the socket, 0600 from its first moment (the umask is 077). The starter holds the lock, so no other binds."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.setblocking(False)
    return listener


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path, follow_symlinks=False)
    return found.st_dev, found.st_ino
