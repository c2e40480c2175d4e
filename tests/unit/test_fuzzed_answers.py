"""Answers of providers, changed at random: a vector is the right one or there is a ProviderError, and never anything else."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from embedline.core.embedding import ModelConfig
from embedline.core.vectors import find_faults, matrix_from_bytes
from embedline.errors import EmbedlineError, ProviderError
from embedline.providers.openai_answer import read_answer
from embedline.providers.openai_compatible import OpenAIEmbedder
from embedline.providers.openai_errors import error_text
from embedline.providers.rerank_forms import RERANK_FORMS, read_scores
from stub_provider import vector_of

DIMENSIONS = 8
TEXTS = ("one", "two", "three")
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**30, 1e308, -1e308, float("nan"), float("inf"), "", "0", "x", "\ud800", [], {}, [[]],
    [None], {"index": 0}, [0.0] * DIMENSIONS, [float("nan")] * DIMENSIONS, [1e39] * DIMENSIONS, "AAAA", "====",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["data", "index", "embedding", "usage", "total_tokens", "results", "score", "error", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
_FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _answer() -> dict[str, Any]:
    data = [
        {
            "object": "embedding",
            "index": n,
            "embedding": base64.b64encode(vector_of(text, DIMENSIONS).tobytes()).decode(),
        }
        for n, text in enumerate(TEXTS)
    ]
    return {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 3, "total_tokens": 3}}


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*way, key))


PLACES = [way for way in _places(_answer()) if way]


def _changed(changes: list[tuple[tuple[Any, ...], str, Any]]) -> bytes:
    """Return the answer with values replaced, removed, repeated or moved to the end."""
    answer = _answer()
    for way, change, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            holder: Any = answer
            for key in way[:-1]:
                holder = holder[key]
            if change == "replace":
                holder[way[-1]] = copy.deepcopy(value)
            elif change == "remove":
                del holder[way[-1]]
            elif isinstance(holder, list):
                holder.append(copy.deepcopy(holder[way[-1]]) if change == "repeat" else holder.pop(way[-1]))
    return json.dumps(answer).encode("utf-8", "surrogatepass")


def _read(content: bytes) -> None:
    """Read an answer as a worker does; check each vector that comes out of it."""
    try:
        block = read_answer(content, len(TEXTS), DIMENSIONS, str)
        matrix = matrix_from_bytes(block.data, block.count, block.dimensions)
    except EmbedlineError:
        return
    if _is_convincing(content):
        return
    known = {text: vector_of(text, DIMENSIONS) for text in TEXTS}
    faults = find_faults(matrix, "vector")
    for place, (text, row) in enumerate(zip(TEXTS, matrix, strict=True)):
        of_other = [other for other in TEXTS if other != text and np.array_equal(row, known[other])]
        assert of_other == [], f"the vector of {of_other} was taken for that of {text}"
        assert place in faults or (np.isfinite(row).all() and np.linalg.norm(row) > 0)


def _is_convincing(content: bytes) -> bool:
    """Return True if the numbers say all, as they would in a sound answer."""
    return sorted(str(item.get("index")).removesuffix(".0") for item in json.loads(content)["data"]) == ["0", "1", "2"]


@_FUZZED
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PLACES), st.sampled_from(["replace", "remove", "repeat", "move"]), st.sampled_from(_ODD)
        ),
        max_size=3,
    )
)
def test_a_changed_answer_is_an_error_or_right(changes: list[tuple[tuple[Any, ...], str, Any]]) -> None:
    # Renumbered twice, or moved and renumbered, vectors may be wrong in a way that no reader can tell.
    moved = sum(change != "replace" and len(way) == 2 for way, change, _ in changes)
    renumbered = sum(way[-1] == "index" for way, _, _ in changes)
    assume(renumbered == 0 or moved + renumbered == 1)
    _read(_changed(changes))


@_FUZZED
@given(st.data())
def test_bytes_that_are_cut_or_flipped_are_an_error_of_ours(data: st.DataObject) -> None:
    content = bytearray(_changed([]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(EmbedlineError):
        read_answer(bytes(content[: data.draw(st.integers(0, len(content)))]), len(TEXTS), DIMENSIONS, str)


@settings(_FUZZED, max_examples=60)
@given(JSON, st.sampled_from(sorted(RERANK_FORMS)))
def test_any_json_is_an_error_of_ours(value: Any, form: str) -> None:
    content = json.dumps(value).encode("utf-8", "surrogatepass")
    with contextlib.suppress(EmbedlineError):
        read_answer(content, len(TEXTS), DIMENSIONS, str)
    with contextlib.suppress(EmbedlineError):
        read_scores(RERANK_FORMS[form], content, len(TEXTS), str)
    assert isinstance(error_text(content.decode("utf-8", "replace")), str)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000, b'{"data":' * 100_000, b"9" * 100_000, b'{"data": [{"index": ' + b"9" * 10_000 + b"}]}", b"\x00" * 100,
        b"\xff\xfe" + '{"data": []}'.encode("utf-16-le"), b"", b"null", b'{"data": [null, null, null]}',
        b'{"data": [{"embedding": "' + b"A" * 100_001 + b'"}, 1, 2]}',
    ],
)  # fmt: skip
def test_an_extreme_body_is_an_error_of_ours(content: bytes) -> None:
    with pytest.raises(ProviderError):
        read_answer(content, len(TEXTS), DIMENSIONS, str)
    for form in RERANK_FORMS.values():
        with pytest.raises(ProviderError):
            read_scores(form, content, len(TEXTS), str)


def _serve(answer: list[bytes], pause: float) -> tuple[socket.socket, threading.Thread]:
    """Answer one connection, with a pause after each part."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                for part in answer:
                    connection.sendall(part)
                    time.sleep(pause)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return listener, thread


_KLINGON = b"Content-Type: text/html; charset=klingon\r\nContent-Length: 5\r\n\r\n<p>\xff\xff"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("answer", "pause"),
    [
        pytest.param(
            [_HEAD + b"Content-Length: 1000\r\n\r\n", *[b" "] * 100], 0.05, id="a slow drip", marks=pytest.mark.faults
        ),
        pytest.param([_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n"], 0.0, id="broken chunks"),
        pytest.param([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000], 0.0, id="endless headers"),
        pytest.param([b"SSH-2.0-OpenSSH_9.2\r\n"], 0.0, id="another protocol"),
        pytest.param([b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n"], 0.0, id="an odd status"),
        pytest.param([b"HTTP/1.1 200 OK\r\n" + _KLINGON], 0.0, id="an odd charset"),
        pytest.param([b"HTTP/1.1 500 X\r\n" + _KLINGON], 0.0, id="an error in an odd charset"),
        pytest.param([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"], 0.0, id="a switch"),
    ],
)
def test_a_connection_that_misbehaves_is_an_error_of_ours(answer: list[bytes], pause: float) -> None:
    listener, _ = _serve(answer, pause)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    embedder = OpenAIEmbedder(ModelConfig("m", "openai", "m", base_url=url, timeout_seconds=0.5))
    try:
        assert isinstance(embedder.submit(["a text"], "document").exception(20), ProviderError)
    finally:
        embedder.close()
        listener.close()
