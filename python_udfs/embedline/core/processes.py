"""Threads and numeric libraries inside a PostgreSQL backend."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


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


def prepare_environment() -> None:
    """Keep numeric libraries from starting threads of their own inside a backend.

    Call it before numpy is imported, because the libraries read these variables when they are loaded.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
