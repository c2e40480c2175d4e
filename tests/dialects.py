"""An embeddings endpoint in a thread of the test, whose answers the test shapes: servers that are nearly OpenAI's.

`stub_provider` is for load and faults; this one is for what an answer says. Vectors are those of `vector_of` there.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import numpy.typing as npt

from embedline.models.health_check import PROBE_TEXT
from stub_provider import vector_of

Vector = npt.NDArray[np.float32]
Body = dict[str, Any]


def as_base64(vector: Vector) -> object:
    """Return a vector as OpenAI sends it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def as_asked(vector: Vector, body: Body) -> object:
    """Return a vector in the encoding that the request asks for, as OpenAI does."""
    return as_base64(vector) if body.get("encoding_format") == "base64" else [float(value) for value in vector]


def plain_usage(texts: list[str]) -> object:
    """Return what OpenAI says of the tokens: four characters each."""
    tokens = sum(map(len, texts)) // 4 + 1
    return {"prompt_tokens": tokens, "total_tokens": tokens}


@dataclass
class Dialect:
    """What an endpoint's answers are like. `requests` are the bodies that came, `paid` the texts that it embedded.

    `spares_probe`: a harmless text is answered as it should be, so that the fault is the texts'.
    """

    dimensions: int = 8
    refuse: Callable[[Body], tuple[int, object] | None] = lambda _: None
    embed: Callable[[str, Body], Vector] | None = None
    encode: Callable[[Vector, Body], object] = as_asked
    shape: Callable[[list[Body]], list[Any]] = lambda items: items
    usage: Callable[[list[str]], object] = plain_usage
    spares_probe: bool = False
    url: str = ""
    requests: list[Body] = field(default_factory=list)
    paid: list[str] = field(default_factory=list)

    def answer(self, body: Body) -> tuple[int, object]:
        """Return the status and the body that a request is answered with."""
        self.requests.append(body)
        if refused := self.refuse(body):
            return refused
        texts = body["input"]
        self.paid += texts
        vectors = [self.embed(text, body) if self.embed else vector_of(text, self.dimensions) for text in texts]
        is_spared = self.spares_probe and texts == [PROBE_TEXT]
        encode = as_asked if is_spared else self.encode
        items = [
            {"object": "embedding", "index": index, "embedding": encode(vector, body)}
            for index, vector in enumerate(vectors)
        ]
        data = items if is_spared else self.shape(items)
        answer = {"object": "list", "data": data, "model": body["model"], "usage": self.usage(texts)}
        return 200, {name: value for name, value in answer.items() if value is not None}

    def forget(self) -> None:
        """Count from here on."""
        self.requests.clear()
        self.paid.clear()


@contextlib.contextmanager
def serving(dialect: Dialect) -> Iterator[Dialect]:
    """Serve an endpoint of this dialect on a free port of loopback for the length of a block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, answer = dialect.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            """Nothing to say."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        dialect.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield dialect
        finally:
            server.shutdown()
            thread.join()
