"""`alembic` and `embedline` in processes of their own, forked from one that has imported what they import.

Started as anyone starts them, each spends 0.5 s of CPU on imports before its first line runs, and the suite starts some 400.
A fork has a working folder, an environment, files, signals and an exit code of its own, and runs the same entry point.
Tests of the way in, `.venv/bin/NAME` and `python -m NAME`, start these themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

# What the two programs import on their ways.
_PRELOADED = (
    "alembic.autogenerate.rewriter",
    "alembic.command",
    "alembic.config",
    "embedline.client.cli",
    "embedline.client.install",
    "embedline.client.migrations.autogenerate",
    "embedline.client.removal",
    "logging.config",
    "mako.template",
    "sqlalchemy.dialects.postgresql.psycopg",
)
_LONGEST_REQUEST = 2**20  # bytes of arguments and environment

Main = Callable[[], Any]


class Process:
    """A running program, with the part of subprocess.Popen that tests use."""

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        """Start `alembic` or `embedline`; output goes to the given descriptors, or to pipes that communicate() reads."""
        self.args = [program, *arguments]
        self.returncode: int | None = None
        pipes = [os.pipe() for given in (stdout, stderr) if given is None]
        ends = iter([write for _, write in pipes])
        targets = [next(ends) if given is None else given for given in (stdout, stderr)]
        status, reported = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        request = {
            "program": program,
            "arguments": list(arguments),
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        try:
            server = _server()
            with server.lock:
                message = json.dumps(request).encode()
                socket.send_fds(server.channel, [message], [nothing, *targets, reported])
                assert server.channel.recv(1), "the server of forked programs has ended"
        finally:
            for descriptor in (nothing, reported, *(write for _, write in pipes)):
                os.close(descriptor)
        self._pipes = [os.fdopen(read, "rb") for read, _ in pipes]
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._read_line())

    def _read_line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            part = self._status.read(1)
            assert part, "the process's parent has ended"
            line += part
        return line

    def poll(self) -> int | None:
        """Return the exit code, or None while the program runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code."""
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    return None
            self.returncode = int(self._read_line())
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both pipes to their ends, wait for the end of the program; return both texts. Kill it after `timeout`."""
        limit = None if timeout is None else time.monotonic() + timeout
        read: dict[Any, bytes] = dict.fromkeys(self._pipes, b"")
        with selectors.DefaultSelector() as selector:
            for pipe in self._pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(None if limit is None else max(0.0, limit - time.monotonic()))
                if not ready:
                    self.kill()
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in ready:
                    part = os.read(key.fd, 65536)
                    read[key.fileobj] += part
                    if not part:
                        selector.unregister(key.fileobj)
        for pipe in self._pipes:
            pipe.close()
        self.wait(None if limit is None else max(0.0, limit - time.monotonic()))
        output, messages = (text.decode() for text in read.values())
        return output, messages

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the program to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the program."""
        self.send_signal(signal.SIGKILL)


def run(
    program: str, *arguments: str, cwd: Path | str | None = None, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a program with pipes to its end."""
    process = Process(program, arguments, cwd=cwd, env=env)
    output, messages = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), output, messages)


class _Server:
    """The process that forks, and the socket on which it takes requests. It ends when the socket closes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (self.channel, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST_REQUEST)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )

    def close(self) -> None:
        self.channel.close()
        self._process.wait(30)


@functools.cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


def _serve(channel: socket.socket, mains: Mapping[str, Main]) -> Main | None:
    """Fork a process for each request; return in it what to call, and None in this process once the socket closes."""
    # No test waits for the processes that wait.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _LONGEST_REQUEST, 4)
        if not message:
            return None
        if os.fork() == 0:
            channel.close()
            return _forked(json.loads(message), descriptors, mains)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(b".")


def _forked(request: dict[str, Any], descriptors: list[int], mains: Mapping[str, Main]) -> Main:
    """Fork once more: wait in the parent and report; return in the child what to call, everything made as it was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *standard, status = descriptors
    pid = os.fork()
    if pid:
        for descriptor in standard:
            os.close(descriptor)
        os.write(status, b"%d\n" % pid)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.close(status)
    # A run in the background ignores it, and what it starts would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, descriptor in enumerate(standard):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (_standard_file(target) for target in range(3))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [str(Path(sys.executable).with_name(request["program"])), *request["arguments"]]
    return mains[request["program"]]


def _standard_file(descriptor: int) -> IO[str]:
    if descriptor == 0:
        return open(0, encoding="utf-8", closefd=False)
    errors = "backslashreplace" if descriptor == 2 else "strict"
    buffering = 1 if descriptor == 2 or os.isatty(descriptor) else -1
    return open(descriptor, "w", buffering, encoding="utf-8", errors=errors, closefd=False)


def _end(main: Main) -> NoReturn:
    """Run a program as its script does, then end without taking the interpreter apart, which takes longer than most programs."""
    try:
        code = main()
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    # A package may have kept the stream that stood when it was imported, as Alembic's Config does.
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    # As for a script of the virtual environment, whose folder is the first of the path.
    sys.path[0] = str(Path(sys.executable).parent)
    for name in _PRELOADED:
        importlib.import_module(name)
    found = importlib.metadata.entry_points(group="console_scripts")
    programs = {name: found[name].load() for name in ("alembic", "embedline")}
    # A collection in a fork would copy the pages of all that was imported.
    gc.collect()
    gc.freeze()
    asked = _serve(socket.socket(fileno=int(sys.argv[1])), programs)
    if asked is not None:
        _end(asked)
