"""The OpenAI-compatible provider against a real HTTP server that misbehaves in every way we know of."""

from __future__ import annotations

import base64
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from embedline.core.embedding import EmbeddingBlock, ModelConfig
from embedline.core.redaction import redact
from embedline.embedders import create_embedder
from embedline.errors import (
    DimensionMismatch,
    InputRejected,
    InvalidVectors,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.providers.openai_compatible import OpenAIEmbedder
from embedline.providers.openai_errors import retry_after

KEY = "sk-test-0123456789abcdef"
PATH = "/v1/embeddings"
LIMIT = 10.0


@pytest.fixture(scope="module")
def running_server() -> Iterator[HTTPServer]:
    with HTTPServer(threaded=True) as started:
        yield started


@pytest.fixture
def server(running_server: HTTPServer) -> HTTPServer:
    # Stopping a server takes half a second, so all tests share one.
    running_server.clear()
    return running_server


MakeEmbedder = Callable[..., OpenAIEmbedder]


@pytest.fixture
def make_embedder(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEmbedder]:
    monkeypatch.setenv("EMBEDLINE_TEST_KEY", KEY)
    opened: list[OpenAIEmbedder] = []

    def make(**changes: Any) -> OpenAIEmbedder:
        fields = {
            "base_url": server.url_for("/v1"),
            "api_key_env": "EMBEDLINE_TEST_KEY",
            "timeout_seconds": 5.0,
            "model": "text-embedding-3-small",
        } | changes
        config = ModelConfig(name="small", provider="openai", **fields)
        opened.append(OpenAIEmbedder(config))
        return opened[-1]

    yield make
    for embedder in opened:
        embedder.close()


def vector_of(text: str) -> list[float]:
    return [float(len(text)), 0.5, -1.0]


def encoded(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def answer(items: list[tuple[int, object]]) -> dict[str, object]:
    data = [{"object": "embedding", "index": index, "embedding": embedding} for index, embedding in items]
    return {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def good(request: Request) -> Response:
    texts = request.get_json()["input"]
    body = answer([(index, encoded(vector_of(text))) for index, text in enumerate(texts)])
    return Response(json.dumps(body), content_type="application/json")


def embed(embedder: OpenAIEmbedder, *texts: str) -> EmbeddingBlock:
    return embedder.submit(texts or ("one", "three"), "document").result(LIMIT)


def rows(block: EmbeddingBlock) -> list[tuple[float, ...]]:
    return list(struct.iter_unpack(f"<{block.dimensions}f", block.data))


def fail(embedder: OpenAIEmbedder, *texts: str) -> BaseException:
    error = embedder.submit(texts or ("one", "three"), "document").exception(LIMIT)
    assert error is not None
    return error


def shown(error: BaseException) -> str:
    return " ".join(str(getattr(error, name, "")) for name in ("message", "detail", "hint", "args"))


# Answers that are right


def test_texts_come_back_as_float32_rows(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    server.expect_request(PATH, method="POST").respond_with_handler(good)
    block = embed(make_embedder())
    assert (block.count, block.dimensions) == (2, 3)
    assert rows(block) == [(3.0, 0.5, -1.0), (5.0, 0.5, -1.0)]


def test_the_request_carries_key_prefix_and_nothing_of_openai(
    server: HTTPServer, make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-private")
    server.expect_request(PATH).respond_with_handler(good)
    embedder = make_embedder(document_prefix="passage: ", query_prefix="query: ", dimensions=3)
    embedder.submit(["a"], "document").result(LIMIT)
    embedder.submit(["b"], "query").result(LIMIT)
    requests = [request for request, _ in server.log]
    assert [request.get_json()["input"] for request in requests] == [["passage: a"], ["query: b"]]
    assert requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert "private" not in str(requests[0].headers)
    assert requests[0].get_json()["dimensions"] == 3, "asked of a model that can shorten its vectors"


def test_dimensions_are_not_sent_to_models_that_may_refuse_them(
    server: HTTPServer, make_embedder: MakeEmbedder
) -> None:
    server.expect_request(PATH).respond_with_handler(good)
    embed(make_embedder(dimensions=3, model="nomic-embed-text"))
    assert "dimensions" not in server.log[0][0].get_json()


def test_dimensions_are_sent_where_the_model_asks_for_it(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    server.expect_request(PATH).respond_with_handler(good)
    embed(make_embedder(dimensions=3, options={"send_dimensions": True}))
    assert server.log[0][0].get_json()["dimensions"] == 3


def test_another_order_is_put_right_by_index(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    server.expect_request(PATH).respond_with_json(answer([(1, encoded([2.0])), (0, encoded([1.0]))]))
    assert rows(embed(make_embedder())) == [(1.0,), (2.0,)]


def test_lists_of_floats_are_accepted_from_servers_without_base64(
    server: HTTPServer, make_embedder: MakeEmbedder
) -> None:
    server.expect_request(PATH).respond_with_json(answer([(0, [1, 2.5]), (1, [3.0, 4.0])]))
    assert rows(embed(make_embedder())) == [(1.0, 2.5), (3.0, 4.0)]


def test_values_that_are_no_numbers_are_left_to_the_vector_checks(
    server: HTTPServer, make_embedder: MakeEmbedder
) -> None:
    body = json.dumps(answer([(0, [math.nan, math.inf])]))
    server.expect_request(PATH).respond_with_data(body, content_type="application/json")
    assert math.isnan(rows(embed(make_embedder(), "one"))[0][0])


def test_no_texts_cost_no_request(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    assert make_embedder(dimensions=3).submit([], "document").result(LIMIT) == EmbeddingBlock(0, 3, b"")
    assert not server.log


def test_probe_tells_dimensions_limits_and_a_fingerprint(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    server.expect_request(PATH).respond_with_handler(good)
    info = make_embedder().probe().result(LIMIT)
    assert (info.dimensions, info.max_tokens, info.tokenizer_path) == (3, 8191, None)
    assert len(info.fingerprint) == 64
    other = make_embedder(options={"max_tokens": 512, "tokenizer": "/srv/tokenizer.json"}).probe().result(LIMIT)
    assert (other.max_tokens, other.tokenizer_path) == (512, "/srv/tokenizer.json")
    assert other.fingerprint == info.fingerprint


def test_the_factory_knows_the_provider() -> None:
    embedder = create_embedder(ModelConfig(name="m", provider="openai", model="x"))
    assert isinstance(embedder, OpenAIEmbedder)
    embedder.close()


def test_requests_in_flight_are_bounded(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    running: list[int] = [0, 0]
    lock = threading.Lock()

    def count(request: Request) -> Response:
        with lock:
            running[0] += 1
            running[1] = max(running)
        time.sleep(0.03)
        with lock:
            running[0] -= 1
        return good(request)

    server.expect_request(PATH).respond_with_handler(count)
    embedder = make_embedder(concurrency=3)
    for future in [embedder.submit([str(number)], "document") for number in range(12)]:
        future.result(LIMIT)
    assert running[1] == 3


class KeepAliveHandler(BaseHTTPRequestHandler):
    """HTTP/1.1 with open connections, which the other test server does not offer."""

    protocol_version = "HTTP/1.1"
    ports: ClassVar[set[int]] = set()

    def do_POST(self) -> None:
        self.ports.add(self.client_address[1])
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        body = json.dumps(answer([(index, [1.0]) for index, _ in enumerate(texts)])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Nothing to say."""


def test_connections_are_used_again(make_embedder: MakeEmbedder) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), KeepAliveHandler) as keeping:
        thread = threading.Thread(target=keeping.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        embedder = make_embedder(base_url=f"http://127.0.0.1:{keeping.server_port}/v1", concurrency=2)
        for future in [embedder.submit([str(number)], "document") for number in range(20)]:
            future.result(LIMIT)
        embedder.close()
        keeping.shutdown()
        thread.join()
    assert 1 <= len(KeepAliveHandler.ports) <= 2


# Answers that are wrong


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(0, encoded([1.0]))], "returned 1 vectors for 2 texts"),
        ([(0, encoded([1.0])), (1, encoded([1.0])), (2, encoded([1.0]))], "returned 3 vectors for 2 texts"),
        ([(5, encoded([1.0])), (4, encoded([1.0]))], "in an order that their indexes do not tell"),
        ([(0, encoded([1.0])), (1, encoded([1.0, 2.0]))], "1 and 2 dimensions"),
        ([(0, ""), (1, "")], "0 dimensions"),
        ([(0, []), (1, [])], "0 dimensions"),
        ([(0, "AAAA"), (1, "AAAA")], "not made of float32"),
        ([(0, "%%%"), (1, "%%%")], "neither base64 nor"),
        ([(0, [None, 1.0]), (1, [1.0, 1.0])], "neither base64 nor"),
        ([(0, ["1.0"]), (1, ["1.0"])], "neither base64 nor"),
        ([(0, {}), (1, {})], "neither base64 nor"),
    ],
)
def test_vectors_that_do_not_fit_the_texts_are_refused(
    server: HTTPServer, make_embedder: MakeEmbedder, items: list[tuple[int, object]], message: str
) -> None:
    server.expect_request(PATH).respond_with_json(answer(items))
    error = fail(make_embedder())
    assert isinstance(error, InvalidVectors)
    assert message in error.message


def test_another_width_than_the_column_is_a_dimension_mismatch(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    server.expect_request(PATH).respond_with_handler(good)
    error = fail(make_embedder(dimensions=4))
    assert isinstance(error, DimensionMismatch)
    assert error.detail == "Expected 4 dimensions, got 3."


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        ("<html>Welcome to our proxy</html>", "text/html"),
        ("", "application/json"),
        ('{"data": [{"index": 0, "embed', "application/json"),
        ("[]", "application/json"),
        ('{"error": {"message": "overloaded"}}', "application/json"),
        ('{"data": null}', "application/json"),
    ],
)
def test_a_200_that_is_no_answer_is_transient(
    server: HTTPServer, make_embedder: MakeEmbedder, body: str, content_type: str
) -> None:
    server.expect_request(PATH).respond_with_data(body, content_type=content_type)
    error = fail(make_embedder())
    assert type(error) is TransientProviderError
    if "overloaded" in body:
        assert error.detail == "overloaded"


# Statuses


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, ProviderMisconfigured),
        (307, ProviderMisconfigured),
        (400, InputRejected),
        (401, ProviderMisconfigured),
        (403, ProviderMisconfigured),
        (404, ProviderMisconfigured),
        (408, TransientProviderError),
        (409, TransientProviderError),
        (413, InputRejected),
        (422, InputRejected),
        (425, TransientProviderError),
        (429, TransientProviderError),
        (500, TransientProviderError),
        (503, TransientProviderError),
        (529, TransientProviderError),
    ],
)
def test_each_status_has_its_class_and_is_asked_once(
    server: HTTPServer, make_embedder: MakeEmbedder, status: int, kind: type[Exception]
) -> None:
    headers = {"Location": server.url_for("/elsewhere")} if status < 400 else {}
    server.expect_request(PATH).respond_with_json({"error": {"message": "the reason"}}, status=status, headers=headers)
    error = fail(make_embedder())
    assert type(error) is kind
    assert f"status {status}" in shown(error)
    assert "the reason" in shown(error)
    assert len(server.log) == 1
    if isinstance(error, TransientProviderError):
        assert error.throttled is (status == 429)


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": "0.5"}, 0.5, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25, 0.25),
        ({"Retry-After": formatdate(time.time() + 7200, usegmt=True)}, 60, 7200),
        ({"Retry-After": formatdate(time.time() - 600, usegmt=True)}, 0, 0),
        ({"Retry-After": "-5"}, 0, 0),
        ({"Retry-After": "1e99"}, 86_400, 86_400),
    ],
)
def test_the_wait_that_the_provider_asks_for_is_passed_on(
    server: HTTPServer, make_embedder: MakeEmbedder, headers: dict[str, str], low: float, high: float
) -> None:
    server.expect_request(PATH).respond_with_data("slow down", status=429, headers=headers)
    error = fail(make_embedder())
    assert isinstance(error, TransientProviderError)
    assert error.throttled
    assert error.retry_after is not None
    assert low <= error.retry_after <= high


@pytest.mark.parametrize(("headers", "low", "high"), [({"Retry-After": "7"}, 6, 7), ({}, 0, 0.5)])
def test_a_rate_limit_holds_for_what_waits_behind_the_request_that_met_it(
    server: HTTPServer, make_embedder: MakeEmbedder, headers: dict[str, str], low: float, high: float
) -> None:
    server.expect_request(PATH).respond_with_data("slow down", status=429, headers=headers)
    embedder = make_embedder(concurrency=1)
    errors = [future.exception(LIMIT) for future in [embedder.submit([str(n)], "document") for n in range(20)]]
    assert len(server.log) == 1
    for error in errors:
        assert isinstance(error, TransientProviderError)
        assert error.throttled
        assert error.is_refusal, "nothing was paid for"
    assert low <= getattr(errors[-1], "retry_after", -1) <= high


def test_after_the_wait_requests_are_sent_again(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    server.expect_ordered_request(PATH).respond_with_data("slow down", status=429, headers={"Retry-After": "0.1"})
    server.expect_ordered_request(PATH).respond_with_handler(good)
    embedder = make_embedder(concurrency=1)
    fail(embedder)
    started = time.monotonic()

    def is_answered() -> bool:
        return embedder.submit(["one"], "document").exception(LIMIT) is None

    while not is_answered():
        assert time.monotonic() - started < LIMIT
    assert time.monotonic() - started >= 0.09
    assert len(server.log) == 2


@pytest.mark.parametrize("headers", [{}, {"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": ""}])
def test_a_wait_that_cannot_be_read_is_none(headers: dict[str, str]) -> None:
    assert retry_after(headers) is None


# The line


def serve_raw(reply: bytes, *, read: bool = True) -> tuple[socket.socket, threading.Thread]:
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            if read:
                connection.recv(65536)
            connection.sendall(reply)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return listener, thread


@pytest.mark.parametrize(
    "reply",
    [
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"data": [{"index": 0',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nabc",
        b"this is no http\r\n\r\n",
        b"",
    ],
)
def test_a_line_that_breaks_is_transient(make_embedder: MakeEmbedder, reply: bytes) -> None:
    listener, thread = serve_raw(reply)
    with listener:
        error = fail(make_embedder(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1"))
    thread.join(LIMIT)
    assert type(error) is TransientProviderError
    assert not error.throttled
    assert not error.unreachable, "it may have been the text that broke the line"


def test_a_closed_port_is_transient(make_embedder: MakeEmbedder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = fail(make_embedder(base_url=f"http://127.0.0.1:{port}/v1"))
    assert type(error) is TransientProviderError
    assert error.unreachable, "it says nothing about the texts"


def test_silence_ends_with_the_timeout(make_embedder: MakeEmbedder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        embedder = make_embedder(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout_seconds=0.3)
        error = fail(embedder)
        assert type(error) is TransientProviderError
        assert "0.3 s" in error.message
        assert time.monotonic() - started < 5


def test_cancelling_ends_the_wait_and_close_ends_what_is_left(make_embedder: MakeEmbedder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        embedder = make_embedder(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        first, second = (embedder.submit(["x"], "document") for _ in range(2))
        assert first.cancel()
        embedder.close()
        with pytest.raises(CancelledError):
            second.result(LIMIT)


# Keys


def test_a_missing_key_names_the_variable_and_sends_nothing(
    make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMBEDLINE_TEST_KEY")
    allowed = ("https://embeddings.invalid:443",)
    error = fail(make_embedder(base_url="https://embeddings.invalid/v1", allowed_endpoints=allowed))
    assert isinstance(error, ProviderMisconfigured)
    assert error.hint is not None
    assert "EMBEDLINE_TEST_KEY" in error.hint
    assert "restart" in error.hint


def test_openai_itself_needs_its_usual_variable(make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    allowed = ("https://api.openai.com:443",)
    error = fail(make_embedder(base_url=None, api_key_env=None, allowed_endpoints=allowed))
    assert isinstance(error, ProviderMisconfigured)
    assert "OPENAI_API_KEY" in shown(error)


def test_an_endpoint_on_this_machine_needs_no_key(
    server: HTTPServer, make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMBEDLINE_TEST_KEY")
    # A key of the environment that belongs to somebody else must not go there either.
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-provider")
    # A proxy of the environment would make a loopback address mean another machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server.expect_request(PATH).respond_with_handler(good)
    embed(make_embedder())
    embed(make_embedder(api_key_env=None))
    assert all("Authorization" not in request.headers for request, _ in server.log)


def test_a_changed_key_is_used_at_once(
    server: HTTPServer, make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.expect_request(PATH).respond_with_handler(good)
    embedder = make_embedder()
    embed(embedder)
    monkeypatch.setenv("EMBEDLINE_TEST_KEY", "sk-second")
    embed(embedder)
    assert [request.headers["Authorization"][-6:] for request, _ in server.log] == ["abcdef", "second"]


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_an_error_text_never_repeats_the_key(server: HTTPServer, make_embedder: MakeEmbedder, status: int) -> None:
    words = f"Incorrect API key {KEY}, header 'Authorization: Bearer {KEY}', also sk-abc***wxyz " + "x" * 5000
    server.expect_request(PATH).respond_with_json({"error": {"message": words}}, status=status)
    error = fail(make_embedder())
    assert "Incorrect API key" in shown(error)
    assert KEY not in shown(error)
    assert "wxyz" not in shown(error)
    assert len(getattr(error, "detail", "")) <= 500


def test_redaction_comes_before_the_cut() -> None:
    assert "secret" not in redact("x" * 490 + " plainsecretkey", "plainsecretkey")
    assert redact("https://user:pass@host/", None) == "https://[redacted]host/"


def _encoded(words: str) -> str:
    return base64.b64encode(words.encode()).decode()


@pytest.mark.parametrize("key", ["Qz7/pL+aB9xYvW3kT_m8Rn5Jd0", "0f1e2d3c4b5a69788796a5b4c3d2e1f0", KEY])
def test_no_other_form_of_the_key_is_repeated(key: str) -> None:
    forms = {
        "capitals": key.upper(),
        "small letters": key.lower(),
        "its beginning": key[:20],
        "its end": key[4:],
        "masked": f"{key[:14]}***{key[-4:]}",
        "two lines": f"{key[:10]}\n{key[10:]}",
        "groups": " ".join(key[i : i + 4] for i in range(0, len(key), 4)),
        "joined by nothing": "\u200b".join(key),
        "percent": "".join(f"%{ord(c):02X}" for c in key),
        "a URL": quote(key, safe=""),
        "HTML": "".join(f"&#{ord(c)};" for c in key),
        "JSON": "".join(f"\\u{ord(c):04x}" for c in key),
        "hexadecimal": key.encode().hex(),
        "base64": _encoded(key),
        "base64 of a header": _encoded(f"Bearer {key}"),
        "base64 of a login": _encoded(f"user:{key}"),
        "base64 of both": _encoded(f"u:{key}x"),
    }
    for name, form in forms.items():
        told = redact(f"Incorrect API key: {form}", key)
        assert "[redacted]" in told, name
        assert [form[i : i + 12] for i in range(len(form) - 11) if form[i : i + 12] in told] == [], name
    words = "Rate limit reached for requests, try again in 20 s; model text-embedding-3-small, input 17"
    assert redact(words, key) == words


def test_an_answers_header_that_repeats_the_key_is_redacted(server: HTTPServer, make_embedder: MakeEmbedder) -> None:
    server.expect_request(PATH).respond_with_data("x", headers={"Content-Encoding": KEY})
    assert KEY[:12] not in shown(fail(make_embedder()))


@pytest.mark.parametrize("options", [{}, {"key_header": "api-key"}])
@pytest.mark.parametrize("key", ["0011223344556677\n8899aabbccddeeff", "0011223344556677é8899aabbccddeeff"])
def test_a_key_that_cannot_be_sent_is_named_and_not_shown(
    make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], key: str
) -> None:
    embedder = make_embedder(options=options)
    monkeypatch.setenv("EMBEDLINE_TEST_KEY", key)
    error = fail(embedder)
    # No fault of the texts, which would be given up for it.
    assert isinstance(error, ProviderMisconfigured)
    assert "EMBEDLINE_TEST_KEY" in shown(error)
    assert "0011223344" not in shown(error)


def test_a_base_url_that_is_no_web_address_is_refused() -> None:
    for url in ("file:///etc/passwd", "localhost:8080", "https://"):
        with pytest.raises(ProviderMisconfigured):
            OpenAIEmbedder(ModelConfig(name="m", provider="openai", model="x", base_url=url))


# Encodings


@pytest.mark.parametrize(
    ("status", "body", "asked"),
    [
        (400, '{"error": {"message": "base64 is not supported"}}', 3),
        (500, '{"error": "encoding_format"}', 3),
        (200, '{"error": "base64 is not supported"}', 3),
        # A page with an image in it, a rate limit, a gateway: nothing that another encoding would change.
        (200, "<html><img src='data:image/png;base64,AAAA'></html>", 1),
        (429, '{"error": "base64"}', 1),
        (503, '{"error": "base64"}', 1),
        (400, '{"error": {"message": "too long"}}', 1),
    ],
)
def test_only_a_refusal_of_the_encoding_is_asked_again(
    server: HTTPServer, make_embedder: MakeEmbedder, status: int, body: str, asked: int
) -> None:
    server.expect_request(PATH).respond_with_data(body, status=status, content_type="application/json")
    error = fail(make_embedder())
    assert len(server.log) == asked
    if status == 400:
        assert isinstance(error, InputRejected)


def test_a_line_that_breaks_at_the_second_try_is_not_held_against_the_texts(
    server: HTTPServer, make_embedder: MakeEmbedder
) -> None:
    refusal = {"error": {"message": "base64 is not supported"}}
    server.expect_ordered_request(PATH).respond_with_json(refusal, status=400)
    server.expect_ordered_request(PATH).respond_with_data("busy", status=503)
    error = fail(make_embedder())
    assert isinstance(error, TransientProviderError)
    assert "503" in error.message
