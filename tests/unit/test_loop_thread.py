"""The thread of clients: its coroutines end with it, and the next one begins another."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest

from embedline.providers.loop_thread import LoopThread


def test_closing_ends_what_runs_and_the_next_begins_another_loop() -> None:
    released: list[str] = []
    started = threading.Event()

    async def release() -> None:
        released.append(threading.current_thread().name)

    async def wait() -> None:
        started.set()
        await asyncio.Event().wait()

    async def where() -> str:
        return threading.current_thread().name

    thread = LoopThread("embedline-test", release)
    thread.close()
    waiting = thread.start(wait())
    name = thread.start(where()).result(10)
    assert name == "embedline-test"
    assert started.wait(10)
    thread.close()
    with pytest.raises(CancelledError):
        waiting.result(10)
    assert released == ["embedline-test"]
    assert thread.start(where()).result(10) == "embedline-test"
    thread.close()
    assert released == ["embedline-test"] * 2
    assert all(one.name != "embedline-test" for one in threading.enumerate())
