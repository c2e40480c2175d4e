"""Run the model host: a loop for connections, threads for tokens and the model."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from embedline.core.media import MediaPart
from embedline.core.reranking import Pair
from embedline.errors import InputRejected, ModelHostUnavailable, ProviderError
from embedline.model_host.faults import describe
from embedline.model_host.host_settings import HostSettings
from embedline.model_host.inference import LoadedModel, Running, Slice, load_model
from embedline.model_host.place import HostPlace, Owner
from embedline.model_host.process import HostConnection, HostProcess, log
from embedline.model_host.protocol import Frame, ProtocolError, unpack_media, unpack_texts
from embedline.model_host.scheduler import Part, Request, Scheduler
from embedline.model_host.tokenizing import Tokenizing
from embedline.model_host.tokens import Tokens
from embedline.model_host.wire_errors import error_fields

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedline.core.embedding import Kind
    from embedline.model_host.scheduler import Item

# Seconds that a host that cannot load its model stays, to report the error to its connections.
_FAREWELL_SECONDS = 1.0


def serve(
    socket_path: str, settings: HostSettings, owner: Owner, load: Callable[[HostSettings], LoadedModel] = load_model
) -> NoReturn:
    """Serve until idle or until the owner is gone, then end the process.

    `load` makes the model.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log.setLevel(logging.INFO)
    # The loop thread answers queries while the model thread runs Python. The default of 5 ms would be most of a query's
    # time.
    sys.setswitchinterval(0.0005)
    threading.excepthook = _die_with_thread
    status = 1
    try:
        status = asyncio.run(_host(HostPlace.of_socket(socket_path), settings, owner, load).run())
    except BaseException:
        log.exception("the model host failed")
    finally:
        # Not sys.exit, because finalising the interpreter under a running model thread can crash or hang.
        os._exit(status)


def _host(
    place: HostPlace, settings: HostSettings, owner: Owner, load: Callable[[HostSettings], LoadedModel]
) -> HostProcess:
    if settings.is_remote:
        from embedline.model_host.remote import RemoteHost

        return RemoteHost(place, settings, owner)
    return Host(place, settings, owner, load)


def _die_with_thread(arguments: threading.ExceptHookArgs) -> None:
    """End the host with its model thread.

    Clients would wait for ever otherwise. Most likely memory has run out.
    """
    try:
        log.error("thread failed", exc_info=arguments.exc_value)
    finally:
        os._exit(1)


class Host(HostProcess):
    """The host of a local model; lives in the loop's thread, except `_work`."""

    def __init__(
        self,
        place: HostPlace,
        settings: HostSettings,
        owner: Owner,
        load: Callable[[HostSettings], LoadedModel],
    ) -> None:
        super().__init__(place, settings, owner)
        self.scheduler = Scheduler()
        self._load = load
        self._tokenizing: Tokenizing | None = None
        self.failure: ProviderError | None = None
        self._steps_done = self._steps_seen = 0

    def begin(self) -> None:
        """Load the model in its thread."""
        self.model: asyncio.Future[LoadedModel] = self.loop.create_future()
        threading.Thread(target=self._work, name="embedline-model", daemon=True).start()

    def accept(self) -> HostConnection:
        """Return the protocol of a new connection."""
        return Connection(self)

    def is_ready(self) -> bool:
        """Return True once the model is loaded."""
        return self.model.done()

    def has_moved(self) -> bool:
        """Return True while the model loads, or if something was done since the last call."""
        before, self._steps_seen = self._steps_seen, self._steps_done
        return before != self._steps_done or not self.model.done()

    def note_progress(self) -> None:
        """Count a slice, or a part of a file, that is done; any thread may call this."""
        self._steps_done += 1

    def put(self, request: Request) -> None:
        """Have a request's texts embedded.

        Those of documents are tokenised beside the model.
        """
        is_text = isinstance(request.texts[0], str)
        if self._tokenizing is not None and request.kind == "document" and is_text:
            self._tokenizing.put(request)
        else:
            self.scheduler.put(request)

    # The model thread

    def _work(self) -> None:
        try:
            model = self._load(self.settings)
        except ProviderError as error:
            log.error("%s; %s", error.message, error.detail)
            self.loop.call_soon_threadsafe(self._fail, error)
            return
        if model.flat is not None:
            self._tokenizing = Tokenizing(model.flat, self.scheduler.put)
        self.loop.call_soon_threadsafe(self.model.set_result, model)
        running: deque[tuple[list[Part], Running]] = deque()
        parts: list[Part] = []
        try:
            while True:
                parts = []
                if len(running) < model.in_flight:
                    parts = self.scheduler.take(model.limits, wait=not running)
                if parts:
                    running.append((parts, begin_parts(model, parts)))
                else:
                    parts, begun = running.popleft()
                    finish_parts(model, parts, begun)
                    self.note_progress()
        except Exception as error:
            # Only a lost device raises here, and a new process is the only remedy.
            log.exception("the device is lost")
            failure = ModelHostUnavailable("the model host lost its device", detail=describe(error))
            for request, _ in [*parts, *(part for begun, _ in running for part in begun)]:
                request.fail(failure)
            self.loop.call_soon_threadsafe(self._fail, failure)

    def _fail(self, error: ProviderError) -> None:
        self.failure = error
        self.remove_socket()
        waiting = self._tokenizing.drain() if self._tokenizing is not None else []
        for request in [*waiting, *self.scheduler.drain()]:
            request.fail(error)
        if not self.model.done():
            self.model.set_exception(error)
            # Retrieved here, because there may be no probe that waits for it.
            self.model.exception()
        self.loop.call_later(_FAREWELL_SECONDS, self.stop, 1, error.message)

    def call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        """Run the function in the loop's thread; the model thread calls this."""
        self.loop.call_soon_threadsafe(function, *arguments)


def encode_parts(model: LoadedModel, parts: list[Part]) -> None:
    """Encode one slice, whose parts are of one or more requests."""
    finish_parts(model, parts, begin_parts(model, parts))


def begin_parts(model: LoadedModel, parts: list[Part]) -> Running:
    """Begin one slice; the parts all have their tokens, or none has."""
    texts = [request.texts[index] for request, indexes in parts for index in indexes]
    tokens = [request.tokens.select(indexes) for request, indexes in parts if request.tokens is not None]
    return model.begin(Slice(texts, Tokens.joined(tokens) if tokens else None))


def finish_parts(model: LoadedModel, parts: list[Part], begun: Running) -> None:
    """Hand the rows of a slice to its requests.

    If it fails, each request of it is tried alone, so that a bad text fails only its own request.
    """
    try:
        rows = model.finish(begun)
    except InputRejected as error:
        if len(parts) > 1:
            for part in parts:
                encode_parts(model, [part])
        elif isinstance(parts[0][0].texts[parts[0][1][0]], MediaPart):
            _encode_files(model, *parts[0], error)
        else:
            log.warning("%s; %s", error.message, error.detail)
            parts[0][0].fail(error)
        return
    start = 0
    for request, indexes in parts:
        request.fill(indexes, rows[start : start + len(indexes)])
        start += len(indexes)


def _encode_files(model: LoadedModel, request: Request, indexes: list[int], error: InputRejected) -> None:
    """Encode segments one by one.

    A file that cannot be decoded has no vector, and the others do.
    """
    if len(indexes) > 1:
        for index in indexes:
            encode_parts(model, [(request, [index])])
    else:
        request.faults[indexes[0]] = error.message
        request.fill_missing(indexes, model.dimensions)


class Connection(HostConnection):
    """One session's connection to the host of a local model."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._host = host
        self._requests: dict[int, Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def perform(self, operation: object, number: int, frame: Frame) -> None:
        """Begin an embedding, a scoring or a probe."""
        if (operation == "rerank") != self._host.settings.reranks and operation in ("embed", "rerank"):
            raise ProtocolError("the request is not of the model's task")
        if operation == "embed":
            self._embed(number, frame)
        elif operation == "rerank":
            self._rerank(number, frame)
        elif operation in ("probe", "segment"):
            work = self._probe(number) if operation == "probe" else self._segment(number, frame)
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            raise ProtocolError("the request's operation is unknown")

    def cancel(self, number: int) -> bool:
        """Have the scheduler skip a request."""
        request = self._requests.pop(number, None)
        if request is None:
            return False
        request.cancelled = True
        return True

    def forget_all(self) -> None:
        """Have the scheduler skip all requests."""
        for request in self._requests.values():
            request.cancelled = True
        for task in self._tasks:
            task.cancel()

    def is_known(self, number: int) -> bool:
        """Return True if texts of that number wait for the model."""
        return number in self._requests

    def _embed(self, number: int, frame: Frame) -> None:
        kind = frame.header.get("kind")
        if kind != "query" and kind != "document":
            raise ProtocolError("the request's kind is unknown")
        lengths, media = frame.header.get("lengths"), frame.header.get("media")
        items: Sequence[Item] = (
            unpack_texts(lengths, frame.payload) if media is None else unpack_media(media, lengths, frame.payload)
        )
        if not items:
            raise ProtocolError("the request has no texts")
        self._enqueue(number, kind, items)

    async def _segment(self, number: int, frame: Frame) -> None:
        """Answer with the segments of files; decoding runs beside the model."""
        from embedline.model_host.segments import find_segments

        try:
            payload = await asyncio.to_thread(find_segments, frame, self._host.note_progress)
            self.answer(number, {"count": len(payload)}, payload)
        except ProviderError as error:
            self.answer(number, error_fields(error))
        except Exception as error:
            # Such as a library that is not installed. Without an answer the session would wait.
            log.exception("segments could not be found")
            failure = ModelHostUnavailable("the model host cannot look into files", detail=describe(error))
            self.answer(number, error_fields(failure))

    def _rerank(self, number: int, frame: Frame) -> None:
        """Begin to score pairs; the first text is the query of all others."""
        query, *texts = unpack_texts(frame.header.get("lengths"), frame.payload) or [""]
        if not texts:
            raise ProtocolError("the request has no texts")
        # A person waits for the scores, as for a query's vector.
        self._enqueue(number, "query", [Pair(query, text) for text in texts])

    def _enqueue(self, number: int, kind: Kind, items: Sequence[Item]) -> None:
        if self._host.failure is not None:
            self.answer(number, error_fields(self._host.failure))
            return

        def deliver(result: NDArray[np.float32] | ProviderError) -> None:
            self._host.call_soon(self._finish, number, result)

        request = Request(kind, items, deliver)
        self._requests[number] = request
        self._host.put(request)

    def _finish(self, number: int, result: NDArray[np.float32] | ProviderError) -> None:
        request = self._requests.pop(number, None)
        if request is None:
            return
        if isinstance(result, ProviderError):
            self.answer(number, error_fields(result))
        else:
            header: dict[str, object] = {"count": result.shape[0], "dimensions": result.shape[1]}
            if request.faults:
                header["faults"] = request.faults
            if identity := self._host.model.result().identity:
                header["fingerprint"] = identity
            self.answer(number, header, result.tobytes())

    async def _probe(self, number: int) -> None:
        try:
            model = await asyncio.shield(self._host.model)
            # In another thread, because hashing the weights of a large model takes a second.
            fields = await asyncio.to_thread(model.describe, self._host.place.tokenizer)
        except ProviderError as error:
            fields = error_fields(error)
        except (OSError, ValueError) as error:
            fields = error_fields(ModelHostUnavailable("the model cannot be described", detail=describe(error)))
        self.answer(number, fields)
