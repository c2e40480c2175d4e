"""Run a host process: its socket, its owner, idleness and connections."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import glob
import logging
import os
import signal
import socket
import time
from typing import Any

from embedline.errors import InputRejected, ModelHostUnavailable
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.launcher import launch_lock, peer_uid
from embedline.model_host.memory import private_mb
from embedline.model_host.place import HostPlace, Owner
from embedline.model_host.protocol import Frame, FrameDecoder, ProtocolError, encode_frame
from embedline.model_host.wire_errors import error_fields

CHECK_SECONDS = 1.0
# Seconds between two checks of the memory of a host with an accelerator.
_MEMORY_SECONDS = 0.2
_LOCK_SECONDS = 2.0
# Seconds after which a stuck loop ends the process: longer than a library takes to load from a cold disk.
_STARVED_SECONDS = 120
# Requests of one connection that wait here; more stay in its socket.
_MAX_OUTSTANDING = 64
_BACKLOG = 1024

log = logging.getLogger("embedline.model_host")


class HostProcess(abc.ABC):
    """The state of a host apart from its model's; lives in the loop's thread."""

    def __init__(self, place: HostPlace, settings: HostSettings, owner: Owner) -> None:
        self.settings = settings
        self.place = place
        self.connections: set[HostConnection] = set()
        self._owner = owner
        self._last_request = time.monotonic()

    @abc.abstractmethod
    def begin(self) -> None:
        """Start the work; the socket listens already."""

    @abc.abstractmethod
    def accept(self) -> HostConnection:
        """Return the protocol of a new connection."""

    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Return True once requests need not wait for the start."""

    @abc.abstractmethod
    def has_moved(self) -> bool:
        """Return True if there was progress since the last call.

        Waiting sessions then get a sign of life.
        """

    async def run(self) -> int:
        self.loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] = self.loop.create_future()
        listener = _listen(self.place.socket)
        self._socket_identity = _identity(self.place.socket)
        server = await self.loop.create_unix_server(self.accept, sock=listener, backlog=_BACKLOG)
        log.info("model host %d listens for %s", os.getpid(), self.settings.model)
        self.begin()
        self._watch_owner()
        if self.settings.may_use_accelerator:
            self._watch_memory()
        ticks = self.loop.create_task(self._tick())
        status = await self._status
        ticks.cancel()
        server.close()
        return status

    def stop(self, status: int, reason: str) -> None:
        if not self._status.done():
            log.info("model host %d exits: %s", os.getpid(), reason)
            self._status.set_result(status)

    def touch(self) -> None:
        self._last_request = time.monotonic()

    # The owner, idleness and signs of life

    def _watch_owner(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            # Open before the check: afterwards the descriptor can only mean the process that was checked.
            file = os.pidfd_open(self._owner.pid)
            self.loop.add_reader(file, self._owner_gone)
        if not self._owner.alive():
            self._owner_gone()

    def _owner_gone(self) -> None:
        # No session can start another host here, so no lock is needed. The last host to end removes the directory.
        for path in glob.glob(os.path.join(glob.escape(self.place.directory), f"{self.place.name}.*")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(self.place.directory)
        self.stop(0, "its server is gone")

    def _watch_memory(self) -> None:
        """End the host if it uses more memory than its limit.

        The kernel's limit would count the device's memory, too.
        """
        used, most = private_mb(), self.settings.memory_limit_mb
        if used > most:
            self.stop(1, f"it uses {used} MB of memory, and memory_limit_mb is {most}")
        else:
            self.loop.call_later(_MEMORY_SECONDS, self._watch_memory)

    async def _tick(self) -> None:
        while True:
            # A library may spin while it holds the interpreter's lock, as seen in imports that run short of memory.
            # That stops this loop, and with it the watch on the owner. The kernel then ends the process, because
            # SIGALRM has no handler.
            signal.alarm(_STARVED_SECONDS)
            await asyncio.sleep(CHECK_SECONDS)
            if not self._owner.alive():
                self._owner_gone()
            waiting = [connection for connection in self.connections if connection.outstanding]
            if waiting:
                self.touch()
            elif time.monotonic() - self._last_request >= self.settings.idle_seconds and self.remove_socket():
                self.stop(0, f"idle for {self.settings.idle_seconds:.0f} s")
            # Only progress counts as a sign of life, so clients give up a model thread that hangs.
            if self.has_moved():
                for connection in waiting:
                    connection.send({"op": "busy"})

    def remove_socket(self) -> bool:
        """Remove the socket; return False if a session is starting or finding a host."""
        deadline = time.monotonic() + _LOCK_SECONDS
        try:
            with launch_lock(self.place, lambda: time.monotonic() > deadline):
                # A later host may have taken the path. Our socket is still open, so its inode is not in use again.
                if _identity(self.place.socket) == self._socket_identity:
                    os.unlink(self.place.socket)
        except ModelHostUnavailable:
            return False
        except FileNotFoundError:
            return True
        return True


class HostConnection(asyncio.Protocol, abc.ABC):
    """One session's connection; a breach of the protocol closes it."""

    def __init__(self, host: HostProcess) -> None:
        self.outstanding = 0
        self._owner = host
        self._decoder = FrameDecoder()

    @abc.abstractmethod
    def perform(self, operation: object, number: int, frame: Frame) -> None:
        """Begin a request, which `answer` ends.

        Raises ProtocolError for one that breaks a rule.
        """

    @abc.abstractmethod
    def cancel(self, number: int) -> bool:
        """Forget a request; return False if there is none of that number any more."""

    @abc.abstractmethod
    def forget_all(self) -> None:
        """Forget all requests, because the session has gone."""

    @abc.abstractmethod
    def is_known(self, number: int) -> bool:
        """Return True if a request of that number is in flight."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer: socket.socket = transport.get_extra_info("socket")
        if peer_uid(peer) != os.geteuid():
            transport.abort()
            return
        self._owner.connections.add(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self._owner.connections.discard(self)
        self.forget_all()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._handle(frame)
        except ProtocolError as error:
            log.warning("closed a connection: %s", error)
            self._transport.abort()

    def _handle(self, frame: Frame) -> None:
        number, operation = frame.header.get("id"), frame.header.get("op")
        if type(number) is not int:
            raise ProtocolError("the request has no number")
        if operation == "cancel":
            if self.cancel(number):
                self.answer(number, error_fields(ModelHostUnavailable("the request was cancelled")))
            return
        if self.is_known(number):
            raise ProtocolError("the request's number is in use")
        self._owner.touch()
        self.outstanding += 1
        if self.outstanding >= _MAX_OUTSTANDING:
            self._transport.pause_reading()
        if operation == "ping":
            self.answer(number, {"pid": os.getpid(), "ready": self._owner.is_ready()})
        else:
            self.perform(operation, number, frame)

    def answer(self, number: int, fields: dict[str, Any], payload: bytes = b"") -> None:
        self.outstanding -= 1
        self._owner.touch()
        try:
            self.send({"id": number, **fields}, payload)
        except ProtocolError as error:
            self.send({"id": number, **error_fields(InputRejected("the answer is too large", detail=str(error)))})
        if self.outstanding == _MAX_OUTSTANDING - 1 and not self._transport.is_closing():
            self._transport.resume_reading()

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        frame = encode_frame(header, payload)
        if not self._transport.is_closing():
            self._transport.write(frame)


def _listen(path: str) -> socket.socket:
    """Bind the socket, with mode 0600 from its first moment (the umask is 077).

    The starter holds the lock, so no other process binds.
    """
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
