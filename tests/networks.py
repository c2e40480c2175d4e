"""A network namespace of the test's own, with a loopback address that can be taken away."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# The address that is taken away; the other one stays.
LOSSY, STABLE = "127.0.7.7", "127.0.0.1"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Network:
    """The namespace; its loopback device has two addresses."""

    name: str

    def lose(self) -> None:
        """Take the address away: packets to and from it are dropped, and neither side is told."""
        self._ip("addr", "del", f"{LOSSY}/32", "dev", "lo")

    def restore(self) -> None:
        """Give the address again."""
        self._ip("addr", "add", f"{LOSSY}/32", "dev", "lo")

    def prepare(self) -> None:
        """Give the loopback device the two addresses, and none of the range's others."""
        self._ip("link", "set", "lo", "up")
        self._ip("addr", "flush", "dev", "lo")
        self._ip("addr", "add", f"{STABLE}/32", "dev", "lo")
        self.restore()

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def own_network() -> Iterator[Network]:
    """Move this thread, and what it starts, into a namespace for the length of a block; skip where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    network = Network(f"embedline-{secrets.token_hex(4)}")
    done = subprocess.run(["ip", "netns", "add", network.name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs the right to make a network namespace: {done.stderr.strip()}")
    try:
        network.prepare()
        with Path("/proc/thread-self/ns/net").open() as before, Path(f"/run/netns/{network.name}").open() as inside:
            _enter(inside.fileno())
            try:
                yield network
            finally:
                _enter(before.fileno())
    finally:
        subprocess.run(["ip", "netns", "del", network.name], check=False)


def _enter(descriptor: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
