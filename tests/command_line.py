"""The `embedline` command in a process of its own: with pipes, and on a pseudo-terminal as a person has it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading

import programs

# Wide enough that no line is cut.
_COLUMNS = "200"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _environment(dsn: str) -> dict[str, str]:
    return {**os.environ, "EMBEDLINE_DSN": dsn, "COLUMNS": _COLUMNS, "TERM": "xterm"}


def run(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with pipes to its end."""
    return programs.run("embedline", *arguments, env=_environment(dsn))


def lines_in_terminal(*arguments: str, columns: int = 80) -> list[str]:
    """Return the lines that a command shows in a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = programs.Process(
        "embedline", arguments, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux tells that the other side is closed
            break
        shown += part
        if not part:
            break
    process.wait()
    os.close(ours)
    return shown.decode().replace("\r", "").splitlines()


def unstyled(text: str) -> str:
    """Return a terminal's text without its escape sequences."""
    return _ESCAPES.sub("", text)


class Terminal:
    """The command on a pseudo-terminal, as long as the block lasts."""

    def __init__(self, dsn: str, *arguments: str) -> None:
        self._main, side = pty.openpty()
        self._process = programs.Process("embedline", arguments, env=_environment(dsn), stdout=side, stderr=side)
        os.close(side)
        self._output = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._main, 65536)
            except OSError:
                # The other side was closed.
                return
            if not data:
                return
            self._output += data

    @property
    def raw(self) -> str:
        """Everything that was written so far."""
        return self._output.decode("utf-8", errors="replace")

    @property
    def text(self) -> str:
        """The same without escape sequences."""
        return _ESCAPES.sub("", self.raw)

    def wait(self) -> int:
        """Wait for the end; return the exit code."""
        code = self._process.wait(300)
        self._reader.join()
        return code

    def interrupt(self) -> None:
        """Stop the command as Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self.wait()
        os.close(self._main)
