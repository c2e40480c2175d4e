"""Tokenise the texts of requests beside the model, which need not wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from embedline.errors import InputRejected
from embedline.model_host.faults import describe

if TYPE_CHECKING:
    from embedline.model_host.flat_transformer import FlatModel
    from embedline.model_host.scheduler import Request

# Threads that hand texts to the tokenizer, which spreads them over all cores itself. The second one keeps the cores busy
# while the first makes arrays of the result, which takes the interpreter's lock.
_THREADS = 2


class Tokenizing:
    """Threads that give requests their tokens and pass them on.

    A request that fails is not passed on.
    """

    def __init__(self, model: FlatModel, pass_on: Callable[[Request], None]) -> None:
        self._model = model
        self._pass_on = pass_on
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for number in range(_THREADS):
            threading.Thread(target=self._work, name=f"embedline-tokenizer-{number}", daemon=True).start()

    def put(self, request: Request) -> None:
        """Take a request."""
        self._waiting.put(request)

    def drain(self) -> list[Request]:
        """Take out all requests that wait."""
        found: list[Request] = []
        while not self._waiting.empty():
            try:
                found.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        return found

    def _work(self) -> None:
        while True:
            request = self._waiting.get()
            if not request.cancelled:
                try:
                    request.tokenized(self._model.tokenize([str(text) for text in request.texts]))
                except Exception as error:
                    request.fail(InputRejected("the model failed on the texts", detail=describe(error)))
                else:
                    self._pass_on(request)
