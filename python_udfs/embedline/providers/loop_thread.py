"""Run coroutines in a daemon thread with every signal blocked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from embedline.core.processes import start_thread

T = TypeVar("T")
_CLOSE_SECONDS = 1.0


class LoopThread:
    """A loop that begins with the first coroutine.

    `release` closes what the coroutines have opened; it runs in the loop when that ends.
    """

    def __init__(self, name: str, release: Callable[[], Awaitable[None]]) -> None:
        self._name, self._release = name, release
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; cancelling the future ends it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name=self._name, daemon=True)
            start_thread(self._thread, self)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the coroutines and the thread, or give up after a second.

        The next coroutine begins another loop.
        """
        if self._loop is None or self._thread is None:
            return
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_SECONDS)

    # The loop's thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            loop.run_until_complete(self._shut_down())
        finally:
            loop.close()

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._release()
