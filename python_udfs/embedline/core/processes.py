"""Threads and numeric libraries inside a PostgreSQL backend."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol


class Closable(Protocol):
    """Owns a thread that `close` ends."""

    def close(self) -> None:
        """End the thread, or give up after a moment."""
        ...


_THREAD_NAMES = "embedline-"
_owners: weakref.WeakSet[Any] = weakref.WeakSet()
# The C function that exit() calls. It must outlive every other object here.
_at_exit: list[object] = []


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block all signals while threads start.

    PostgreSQL's signal handlers must only ever run in the main thread.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def start_thread(thread: threading.Thread, owner: Closable) -> None:
    """Start a daemon thread with all signals blocked.

    In a backend `owner.close()` runs before the process ends. A backend ends by exit(), which takes OpenSSL down while
    other threads run. A thread that was reading certificates then read freed memory, and PostgreSQL restarted every
    session. Of 24 sessions with two such threads 8 ended badly without this, and none with it.
    """
    with signals_blocked():
        thread.start()
    if "plpy" in sys.modules:
        _owners.add(owner)
        if not _at_exit:
            _register()


def prepare_environment() -> None:
    """Keep numeric libraries from starting threads of their own inside a backend.

    Call it before numpy is imported, because the libraries read these variables when they are loaded.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _register() -> None:
    """Have exit() call `_end_threads` before all functions registered earlier.

    OpenSSL registers its own when it is loaded, so it is loaded here at the latest. PL/Python never ends its interpreter, so
    Python's own atexit functions do not run in a backend.
    """
    import ctypes
    import ssl  # noqa: F401  for its registration

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_end_threads)
    _at_exit.append(function)
    register = ctypes.CDLL(None).__cxa_atexit
    register.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    register(function, None, None)


def _end_threads(_: object) -> None:
    for owner in list(_owners):
        with suppress(Exception):
            owner.close()
    if any(thread.name.startswith(_THREAD_NAMES) and thread.is_alive() for thread in threading.enumerate()):
        # A thread that hangs, such as one that resolves a name, must not meet libraries that are gone. PostgreSQL has
        # cleaned up by now, and takes this status for a session that was terminated.
        os._exit(1)
