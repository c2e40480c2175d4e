"""Report the set-up's progress to its user, and run other programs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_FAILURE_LINES = 40
_PLAIN_INTERVAL_SECONDS = 15.0


class SetupError(Exception):
    """The set-up cannot go on; the message says what is wrong and how to mend it."""


def say(message: str) -> None:
    """Print the current step on stderr, because stdout belongs to `make dsn`."""
    print(f"» {message}", file=sys.stderr, flush=True)


def as_root(command: Sequence[str]) -> list[str]:
    """Return the command so that it runs as root: as it is, or through sudo."""
    if os.geteuid() == 0:
        return list(command)
    if not any(os.access(Path(folder) / "sudo", os.X_OK) for folder in os.environ.get("PATH", "").split(os.pathsep)):
        raise SetupError(f"root is needed for: {shlex.join(command)}\nInstall sudo, or run make as root.")
    return ["sudo", *command]


def capture(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Run a short command and return its stdout."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise SetupError(f"{shlex.join(command)} failed ({done.returncode}):\n{(done.stderr or done.stdout).strip()}")
    return done.stdout


def run_step(
    label: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> None:
    """Run a long command.

    Shows its label, its latest line and the time, and its last lines if it fails.
    """
    say(label)
    begin = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd
        )
        assert process.stdout is not None
        progress = _Progress(begin)
        ticker = threading.Thread(target=progress.tick, daemon=True)
        ticker.start()
        try:
            for line in process.stdout:
                log.write(line)
                progress.line = line.decode(errors="replace").strip() or progress.line
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
            progress.done.set()
            ticker.join()
        if code != 0:
            log.seek(0)
            tail = log.read().decode(errors="replace").splitlines()[-_FAILURE_LINES:]
            raise SetupError(f"{shlex.join(command)} failed ({code}):\n" + "\n".join(tail))
    print(f"  done in {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


class _Progress:
    """The latest line of a running command.

    A terminal shows it in place, a log from time to time.
    """

    def __init__(self, begin: float) -> None:
        self.line = ""
        self.done = threading.Event()
        self._begin = begin
        self._terminal = sys.stderr.isatty()

    def tick(self) -> None:
        while not self.done.wait(0.5 if self._terminal else _PLAIN_INTERVAL_SECONDS):
            text = f"  {time.monotonic() - self._begin:4.0f} s  {self.line[:90]}"
            print(f"\r\x1b[K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
