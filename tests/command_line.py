"""The `embedline` command in a process of its own: with pipes, and on a pseudo-terminal as a person has it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
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

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self.wait()
        os.close(self._main)
