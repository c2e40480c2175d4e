"""The host of remote models as a real process, before a provider that is a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer

from embedline.core.embedding import EmbeddingBlock, ModelConfig
from embedline.embedders.shared import SharedEmbedder
from embedline.errors import (
    DimensionMismatch,
    InputRejected,
    ModelHostUnavailable,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.model_host import launcher
from embedline.model_host.protocol import FrameDecoder, encode_frame
from embedline.model_host.query_cache import QueryCache, cache_key
from embedline.model_host.wire_errors import error_fields, read_error
from stub_provider import StubProvider, stub_provider, vector_of
from support import wait_until

KEY = "sk-test-0123456789abcdef"
LIMIT = 30.0
DIMENSIONS = 8
FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def running_stub() -> Iterator[StubProvider]:
    with stub_provider(DIMENSIONS) as started:
        yield started


@pytest.fixture
def stub(running_stub: StubProvider) -> StubProvider:
    running_stub.behave(remember=True)
    running_stub.forget()
    return running_stub


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    """A short path: sockets must lie at less than 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="el-") as path:
        yield path


@pytest.fixture(scope="module")
def owner() -> Iterator[int]:
    """A process that stands for the postmaster. Its death ends the host."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


Connect = Callable[[], SharedEmbedder]


@pytest.fixture
def connect(root: str, owner: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Open clients, as sessions of one server have them. The first of the module starts the host, so it gives the key."""
    monkeypatch.setenv("EMBEDLINE_TEST_KEY", KEY)
    opened: list[SharedEmbedder] = []

    def make() -> SharedEmbedder:
        opened.append(SharedEmbedder(owner_pid=owner, runtime_root=root))
        return opened[-1]

    yield make
    for embedder in opened:
        embedder.close()


def config(stub: StubProvider, **changes: Any) -> ModelConfig:
    fields = {"base_url": stub.url, "api_key_env": "EMBEDLINE_TEST_KEY", "dimensions": DIMENSIONS} | changes
    return ModelConfig(name="m", provider="openai", model="stub", **fields)


def ask(session: SharedEmbedder, model: ModelConfig, text: str, fingerprint: str = FINGERPRINT) -> bytes:
    block = session.submit_query(model, fingerprint, text).result(LIMIT)
    assert (block.count, block.dimensions) == (1, DIMENSIONS)
    return block.data


def fail(session: SharedEmbedder, model: ModelConfig, text: str = "a text") -> BaseException:
    error = session.submit_query(model, FINGERPRINT, text).exception(LIMIT)
    assert error is not None
    return error


def host_pid(session: SharedEmbedder) -> int:
    connection = launcher.connect(session._place)
    assert connection is not None
    with connection:
        connection.settimeout(LIMIT)
        connection.sendall(encode_frame({"id": 1, "op": "ping"}))
        decoder = FrameDecoder()
        while data := connection.recv(65536):
            for frame in decoder.feed(data):
                if "id" in frame.header:
                    return int(frame.header["pid"])
    raise AssertionError("the host closed the connection")


def test_sessions_share_one_host_for_all_models(stub: StubProvider, connect: Connect) -> None:
    first, second = connect(), connect()
    plain, prefixed = config(stub), config(stub, query_prefix="query: ")
    assert ask(first, plain, "shared") == vector_of("shared", DIMENSIONS).tobytes()
    pid = host_pid(first)
    assert ask(second, prefixed, "shared") == vector_of("query: shared", DIMENSIONS).tobytes()
    assert host_pid(second) == pid


def test_a_query_that_another_session_asked_is_not_asked_again(stub: StubProvider, connect: Connect) -> None:
    first, second = connect(), connect()
    assert ask(first, config(stub), "known") == ask(second, config(stub), "known")
    assert stub.texts_seen() == {"known": 1}


def test_no_vector_is_taken_from_a_model_that_is_another(stub: StubProvider, connect: Connect) -> None:
    session = connect()
    ask(session, config(stub), "same words")
    for other in ("e" * 64, FINGERPRINT + " 2026-01-01"):
        ask(session, config(stub), "same words", other)
    ask(session, config(stub, options={"max_tokens": 100}), "same words")
    assert stub.texts_seen() == {"same words": 4}
    # Of the same fingerprint, an endpoint that has moved gives the same vectors.
    ask(session, config(stub, base_url="http://127.0.0.1:9/v1"), "same words")


def test_a_failed_query_is_asked_again(stub: StubProvider, connect: Connect) -> None:
    session = connect()
    stub.behave(rules=[{"status": 500, "times": 1}])
    assert isinstance(fail(session, config(stub), "second try"), TransientProviderError)
    ask(session, config(stub), "second try")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InputRejected), (401, ProviderMisconfigured), (404, ProviderMisconfigured), (503, TransientProviderError)],
)
def test_errors_come_back_as_the_provider_gave_them(
    stub: StubProvider, connect: Connect, status: int, kind: type[ProviderError]
) -> None:
    stub.behave(rules=[{"status": status, "body": '{"error": {"message": "the reason, not ' + KEY + '"}}'}])
    error = fail(connect(), config(stub))
    assert type(error) is kind
    assert f"status {status}" in error.message
    assert error.detail == "the reason, not [redacted]"
    assert (error.hint is not None) == (kind is ProviderMisconfigured)
    assert error.is_refusal


def test_a_rate_limit_says_how_long_and_is_not_believed_for_a_day(stub: StubProvider, connect: Connect) -> None:
    session, model = connect(), config(stub, revision="limited")
    stub.behave(rules=[{"status": 429, "headers": {"Retry-After": "86400"}, "times": 1}])
    error = fail(session, model)
    assert isinstance(error, TransientProviderError)
    assert error.throttled
    assert error.retry_after == 86_400

    def is_answered() -> bool:
        return session.submit_query(model, FINGERPRINT, "a text").exception(LIMIT) is None

    wait_until(is_answered, LIMIT, "queries are asked again")


def test_a_width_that_is_not_the_columns_is_told(stub: StubProvider, connect: Connect) -> None:
    error = fail(connect(), config(stub, dimensions=9))
    assert type(error) is DimensionMismatch
    assert error.detail == "Expected 9 dimensions, got 8."


def test_a_missing_key_names_the_variable(stub: StubProvider, connect: Connect) -> None:
    url, allowed = "https://embeddings.invalid/v1", ("https://embeddings.invalid:443",)
    model = config(stub, base_url=url, api_key_env="EMBEDLINE_NO_KEY", allowed_endpoints=allowed)
    error = fail(connect(), model)
    assert type(error) is ProviderMisconfigured
    assert error.hint is not None
    assert "EMBEDLINE_NO_KEY" in error.hint


def test_a_model_that_cannot_be_used_fails_its_own_query(stub: StubProvider, connect: Connect) -> None:
    session = connect()
    assert isinstance(fail(session, config(stub, base_url="nonsense")), ProviderMisconfigured)
    ask(session, config(stub), "the next")


def test_a_cancelled_query_leaves_the_provider_at_once(stub: StubProvider, connect: Connect) -> None:
    session = connect()
    ask(session, config(stub), "warm")
    stub.behave(rules=[{"match": "slow", "latency": 20, "status": 500}])
    started = time.monotonic()
    slow: list[Future[EmbeddingBlock]] = [
        session.submit_query(config(stub), FINGERPRINT, f"slow {number}") for number in range(40)
    ]
    wait_until(lambda: stub.in_flight() > 0, LIMIT, "queries are on their way")
    assert all(future.cancel() for future in slow)
    ask(session, config(stub), "the next")
    assert time.monotonic() - started < 15, "it did not wait for those"


def test_a_killed_host_is_started_again_and_no_query_is_lost(stub: StubProvider, connect: Connect) -> None:
    session = connect()
    ask(session, config(stub), "before")
    pid = host_pid(session)
    stub.behave(latency=0.5)
    future = session.submit_query(config(stub), FINGERPRINT, "in flight")
    wait_until(lambda: stub.in_flight() > 0, LIMIT, "the query is on its way")
    os.kill(pid, signal.SIGKILL)
    assert future.result(LIMIT).count == 1
    assert host_pid(session) != pid


def test_a_broken_frame_closes_its_own_connection_alone(stub: StubProvider, connect: Connect) -> None:
    session = connect()
    ask(session, config(stub), "a")
    pid = host_pid(session)
    good = {"id": 1, "op": "embed", "config": "{}", "identity": "", "lengths": [1]}
    for changes in ({"op": "probe"}, {"config": "[]"}, {"config": 3}, {"identity": None}, {"lengths": [1, 1]}):
        connection = launcher.connect(session._place)
        assert connection is not None
        with connection:
            connection.settimeout(LIMIT)
            connection.sendall(encode_frame(good | changes, b"x" * len(changes.get("lengths", [1]))))
            assert connection.recv(1024) == b""
    ask(session, config(stub), "b")
    assert host_pid(session) == pid


def test_neither_key_nor_query_is_written_anywhere(stub: StubProvider, connect: Connect) -> None:
    session, query = connect(), "a private question"
    ask(session, config(stub), query)
    for status in (400, 401, 429, 500):
        stub.behave(rules=[{"status": status, "body": f"{KEY} {query}"}])
        fail(session, config(stub, revision=str(status)), query)
    pid = host_pid(session)
    files = [path.read_bytes() for path in Path(session._place.directory).iterdir() if path.is_file()]
    files.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    assert len(files) >= 3
    for content in files:
        assert KEY.encode() not in content
        assert query.encode() not in content


def test_the_host_sends_the_key_of_its_own_environment(
    stub: StubProvider, connect: Connect, httpserver: HTTPServer
) -> None:
    session = connect()
    httpserver.expect_request("/v1/embeddings").respond_with_json({"data": [{"index": 0, "embedding": [1.0] * 8}]})
    ask(session, config(stub, base_url=httpserver.url_for("/v1")), "with a key")
    assert [request.headers["Authorization"] for request, _ in httpserver.log] == [f"Bearer {KEY}"]
    assert KEY.encode() not in Path(f"/proc/{host_pid(session)}/cmdline").read_bytes()


def test_only_the_server_can_reach_the_host(stub: StubProvider, connect: Connect) -> None:
    session = connect()
    ask(session, config(stub), "a")
    assert os.stat(session._place.socket).st_mode & 0o777 == 0o600
    assert os.stat(session._place.directory).st_mode & 0o777 == 0o700


def test_a_place_that_others_could_have_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"embedline-{os.geteuid()}").mkdir(mode=0o755)
    with pytest.raises(ProviderMisconfigured):
        SharedEmbedder(owner_pid=os.getpid(), runtime_root=str(tmp_path))


# The cache and the errors, without a process


def block(values: int) -> EmbeddingBlock:
    return EmbeddingBlock(1, values, bytes(4 * values))


def test_the_cache_is_bounded_by_bytes_and_forgets_what_is_not_used() -> None:
    cache = QueryCache(max_bytes=10_000, max_age_seconds=100)
    keys = [cache_key("m", str(number)) for number in range(10)]
    for key in keys[:4]:
        cache.put(key, block(500), 0)
    assert cache.get(keys[0], 1) is not None
    cache.put(keys[4], block(500), 2)
    assert cache.get(keys[1], 2) is None, "it was not used for longest"
    assert cache.get(keys[0], 2) is not None
    assert cache.size <= 10_000
    cache.put(keys[5], block(5000), 3)
    assert cache.get(keys[5], 3) is None, "larger than the whole cache"
    assert len(cache) == 4


def test_a_vector_is_used_for_a_while_only() -> None:
    cache = QueryCache(max_bytes=10_000, max_age_seconds=100)
    key = cache_key("m", "text")
    cache.put(key, block(4), 0)
    assert cache.get(key, 100) is not None, "a look does not make it younger"
    assert cache.get(key, 101) is None
    assert cache.size == 0


def test_keys_differ_by_model_and_text_and_hold_neither() -> None:
    assert len({cache_key("a", "bc"), cache_key("ab", "c"), cache_key("a", "b"), cache_key("a", "bc")}) == 3
    assert b"text" not in cache_key("model", "text")


def test_an_error_passes_the_socket_with_all_that_it_says() -> None:
    error = TransientProviderError("m", detail="d", hint="h", retry_after=1.5, throttled=True, unreachable=True)
    error.is_refusal = True
    read = read_error(error_fields(error))
    assert type(read) is TransientProviderError
    assert vars(read) == vars(error)
    assert read_error({"count": 1}) is None


def test_an_error_of_a_newer_host_is_read_as_far_as_it_is_known() -> None:
    fields = error_fields(ModelHostUnavailable("m"))["error"] | {"class": "Unheard"}
    read = read_error({"error": fields | {"besides": {"unheard": 1, "is_refusal": True}}})
    assert type(read) is ProviderError
    assert read.is_refusal
    assert not hasattr(read, "unheard")
