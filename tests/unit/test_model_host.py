"""The model host as a real process behind a real socket, with the static model of the wordllama wheel."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedline.core.embedding import EmbeddingBlock, ModelConfig
from embedline.embedders import create_embedder
from embedline.embedders.local import LocalEmbedder
from embedline.errors import (
    DimensionMismatch,
    InputRejected,
    InvalidParameter,
    InvalidVectors,
    ModelHostUnavailable,
    ProviderError,
    ProviderMisconfigured,
)
from embedline.model_host.host_settings import HostSettings, settings_of
from embedline.model_host.inference import LoadedModel
from embedline.model_host.launcher import LOG_TAIL_LINES, connect, log_tail
from embedline.model_host.place import HostPlace, Owner, prepare_place, remove_stale_places
from embedline.model_host.protocol import FrameDecoder, encode_frame
from embedline.model_host.scheduler import Request, Scheduler, SliceLimits
from embedline.model_host.server import encode_parts
from embedline.model_host.weights import weights_identity
from support import MODELS

LIMIT = 60.0
SECRET = "sk-secret-of-the-server"


def wait_until(condition: Callable[[], bool], what: str, limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a static model in sentence-transformers' form: 256 dimensions, 15,000 texts a second."""
    directory = tmp_path_factory.mktemp("static")
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(MODELS / "static-256" / name, directory / name)
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}
    (directory / "modules.json").write_text(json.dumps([module]))
    return str(directory)


@pytest.fixture(scope="session")
def root() -> Iterator[str]:
    """A short path: sockets must lie at less than 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="el-") as path:
        yield path


@contextlib.contextmanager
def running_owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for the postmaster."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session")
def owner() -> Iterator[int]:
    """The owner whose host serves most tests. Its death ends the host."""
    with running_owner() as process:
        yield process.pid


MakeEmbedder = Callable[..., LocalEmbedder]


@pytest.fixture
def make_embedder(model_directory: str, root: str, owner: int) -> Iterator[MakeEmbedder]:
    opened: list[LocalEmbedder] = []

    def make(owner_pid: int = owner, **changes: Any) -> LocalEmbedder:
        fields = {"model": model_directory, "timeout_seconds": 30.0} | changes
        config = ModelConfig(name="static", provider="sentence-transformers", **fields)
        opened.append(LocalEmbedder(config, owner_pid=owner_pid, runtime_root=root))
        return opened[-1]

    yield make
    for embedder in opened:
        embedder.close()


def place_of(embedder: LocalEmbedder) -> HostPlace:
    return embedder._place


def vectors(block: EmbeddingBlock) -> NDArray[np.float32]:
    return np.frombuffer(block.data, dtype="<f4").reshape(block.count, block.dimensions)


def embed(embedder: LocalEmbedder, *texts: str) -> NDArray[np.float32]:
    return vectors(embedder.submit(texts, "document").result(LIMIT))


def ask(place: HostPlace, header: dict[str, Any]) -> dict[str, Any]:
    """One request and its answer over a connection of its own."""
    connection = connect(place)
    assert connection is not None
    with connection:
        connection.settimeout(LIMIT)
        connection.sendall(encode_frame(header))
        decoder = FrameDecoder()
        while data := connection.recv(65536):
            for frame in decoder.feed(data):
                if "id" in frame.header:
                    return frame.header
    raise AssertionError("the host closed the connection")


def host_pid(embedder: LocalEmbedder) -> int:
    return int(ask(place_of(embedder), {"id": 1, "op": "ping"})["pid"])


def listens(embedder: LocalEmbedder) -> bool:
    connection = connect(place_of(embedder))
    if connection is not None:
        connection.close()
    return connection is not None


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# Embedding


def test_rows_come_in_the_order_of_the_texts_whatever_the_batch(make_embedder: MakeEmbedder) -> None:
    embedder = make_embedder()
    texts = [f"{'word ' * (number % 37)} {number}" for number in range(700)]
    together = embed(embedder, *texts)
    assert together.shape == (700, 256)
    assert together.dtype == np.float32
    for index in (0, 36, 37, 350, 699):
        np.testing.assert_allclose(together[index], embed(embedder, texts[index])[0], atol=1e-6)


def test_vectors_are_not_normalised_and_prefixes_are_added_here(make_embedder: MakeEmbedder) -> None:
    plain = make_embedder()
    prefixed = make_embedder(document_prefix="passage: ", query_prefix="query: ")
    assert not np.allclose(np.linalg.norm(embed(plain, "a tree"), axis=1), 1.0, atol=1e-3)
    np.testing.assert_array_equal(embed(prefixed, "a tree"), embed(plain, "passage: a tree"))
    query = vectors(prefixed.submit(["a tree"], "query").result(LIMIT))
    np.testing.assert_array_equal(query, embed(plain, "query: a tree"))


def test_sessions_that_probe_at_the_same_time_all_get_the_tokenizer(make_embedder: MakeEmbedder) -> None:
    embedders = [make_embedder() for _ in range(8)]
    probes = [embedder.probe() for embedder in embedders for _ in range(4)]
    found = {probe.result(LIMIT) for probe in probes}
    assert len(found) == 1


def test_probe_describes_the_model_and_saves_its_tokenizer(make_embedder: MakeEmbedder) -> None:
    from tokenizers import Tokenizer

    info = make_embedder().probe().result(LIMIT)
    assert (info.dimensions, info.max_tokens, len(info.fingerprint)) == (256, None, 64)
    assert info.tokenizer_path is not None
    assert stat.S_IMODE(os.stat(info.tokenizer_path).st_mode) == 0o600
    tokenizer = Tokenizer.from_file(info.tokenizer_path)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    assert make_embedder().probe().result(LIMIT) == info


def test_two_sessions_share_one_host(make_embedder: MakeEmbedder) -> None:
    first, second = make_embedder(), make_embedder(document_prefix="other settings, same vectors")
    embed(first, "a")
    pid = host_pid(first)
    embed(second, "a")
    assert host_pid(second) == pid


def test_sessions_that_embed_at_once_each_get_their_own_answers(make_embedder: MakeEmbedder) -> None:
    embedders = [make_embedder(concurrency=4) for _ in range(4)]
    texts = [[f"{'many ' * length} words {session}" for length in range(150)] for session in range(4)]
    expected = [embed(embedders[0], *group) for group in texts]

    def work(session: int) -> None:
        futures = [embedders[session].submit(texts[session], "document") for _ in range(8)]
        for future in futures:
            np.testing.assert_allclose(vectors(future.result(LIMIT)), expected[session], atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_query_does_not_wait_for_the_documents_before_it(make_embedder: MakeEmbedder) -> None:
    worker, session = make_embedder(), make_embedder()
    embed(session, "warm")
    documents = [worker.submit(["lorem ipsum dolor " * 60] * 2000, "document") for _ in range(4)]
    wait_until(lambda: bool(worker._link and worker._link.calls), "the documents are on their way")
    session.submit(["a query"], "query").result(LIMIT)
    assert not any(future.done() for future in documents)
    for future in documents:
        assert future.result(LIMIT).count == 2000


def test_a_cancelled_request_leaves_the_host_at_once(make_embedder: MakeEmbedder) -> None:
    embedder = make_embedder()
    embed(embedder, "warm")
    started = time.monotonic()
    futures = [embedder.submit(["lorem ipsum dolor " * 100] * 2000, "document") for _ in range(8)]
    wait_until(lambda: bool(embedder._link and embedder._link.calls), "the documents are on their way")
    assert all(future.cancel() for future in futures)
    embed(embedder, "next")
    assert time.monotonic() - started < 5


def test_what_cannot_be_sent_is_the_inputs_fault(make_embedder: MakeEmbedder) -> None:
    embedder = make_embedder()
    for texts in (["\ud800"], ["x" * (65 << 20)]):
        assert isinstance(embedder.submit(texts, "document").exception(LIMIT), InputRejected)
    assert embedder.submit([], "document").result(LIMIT).count == 0


def test_a_text_without_words_is_embedded_like_any_other(make_embedder: MakeEmbedder) -> None:
    rows = embed(make_embedder(), "", "\0 \n", "word")
    assert rows.shape == (3, 256)
    assert np.any(rows[2] != 0)


def test_another_width_than_the_column_is_a_dimension_mismatch(make_embedder: MakeEmbedder) -> None:
    error = make_embedder(dimensions=384).submit(["a"], "document").exception(LIMIT)
    assert isinstance(error, DimensionMismatch)
    assert error.detail == "Expected 384 dimensions, got 256."


def test_a_closed_embedder_refuses_work(make_embedder: MakeEmbedder) -> None:
    embedder = make_embedder()
    embedder.close()
    embedder.close()
    with pytest.raises(ModelHostUnavailable):
        embedder.submit(["a"], "query")


def test_the_client_imports_nothing_heavy() -> None:
    script = (
        "import sys; import embedline.embedders.local; "
        "print([name for name in ('numpy', 'torch', 'asyncio', 'transformers') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_the_factory_knows_the_provider(model_directory: str, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", root)
    embedder = create_embedder(ModelConfig(name="m", provider="sentence-transformers", model=model_directory))
    assert isinstance(embedder, LocalEmbedder)
    assert embedder._owner == Owner.of(os.getppid())
    embedder.close()


# The process


def test_only_the_server_can_reach_the_host(make_embedder: MakeEmbedder) -> None:
    embedder = make_embedder()
    embed(embedder, "a")
    place = place_of(embedder)
    assert stat.S_IMODE(os.stat(place.socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(place.directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(os.path.dirname(place.directory)).st_mode) == 0o700
    assert all(stat.S_IMODE(entry.stat().st_mode) == 0o600 for entry in os.scandir(place.directory))


def test_the_host_is_a_daemon_of_its_own(
    make_embedder: MakeEmbedder, monkeypatch: pytest.MonkeyPatch, model_directory: str
) -> None:
    monkeypatch.setenv("EMBEDLINE_TEST_KEY", SECRET)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    embedder = make_embedder(options={"precision": "float16", "memory_limit_mb": 3000})
    # An answer to a ping comes while the model is still loading.
    embedder.probe()
    wait_until(lambda: listens(embedder), "the host listens")
    pid = host_pid(embedder)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert select.select([pipe], [], [], 1.0)[0], "the host holds a file of its starter"
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(status["PPid"]) != os.getpid()
    assert int(status["SigBlk"], 16) == 0
    assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) not in (os.getsid(0), pid)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert str(3000 << 20) in next(line for line in limits.splitlines() if line.startswith("Max data size"))
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) > 0
    os.kill(pid, signal.SIGKILL)


def test_a_killed_host_is_started_again_and_no_request_is_lost(make_embedder: MakeEmbedder) -> None:
    embedder = make_embedder()
    embed(embedder, "a")
    pid = host_pid(embedder)
    future = embedder.submit(["lorem ipsum dolor " * 60] * 4000, "document")
    wait_until(lambda: bool(embedder._link and embedder._link.calls), "the request is on its way")
    os.kill(pid, signal.SIGKILL)
    assert future.result(LIMIT).count == 4000
    assert host_pid(embedder) != pid
    # And one that dies between requests.
    os.kill(host_pid(embedder), signal.SIGKILL)
    assert embed(embedder, "b").shape == (1, 256)


def test_an_idle_host_leaves_and_the_next_request_starts_another(make_embedder: MakeEmbedder) -> None:
    with running_owner() as process:
        embedder = make_embedder(process.pid, options={"idle_seconds": 1})
        embed(embedder, "a")
        pid = host_pid(embedder)
        wait_until(lambda: is_gone(pid), "the host is gone")
        assert not os.path.exists(place_of(embedder).socket)
        embed(embedder, "b")
        assert host_pid(embedder) != pid


def test_a_host_leaves_with_its_server_and_takes_its_files_along(make_embedder: MakeEmbedder) -> None:
    with running_owner() as process:
        embedder = make_embedder(process.pid)
        embedder.probe()
        wait_until(lambda: listens(embedder), "the host listens")
        pid = host_pid(embedder)
        started = time.monotonic()
    wait_until(lambda: is_gone(pid), "the host is gone")
    assert time.monotonic() - started < 5
    embedder.close()
    assert not os.path.exists(place_of(embedder).socket)


def test_directories_of_servers_that_are_gone_are_removed(root: str, owner: int) -> None:
    base = Path(root) / f"embedline-{os.geteuid()}"
    stale, living = base / "999999999-1", base / f"{owner}-{Owner.of(owner).start_ticks}"
    for directory in (base, stale, living):
        directory.mkdir(mode=0o700, exist_ok=True)
    (stale / "x.sock").touch()
    remove_stale_places(str(base))
    assert not stale.exists()
    assert living.exists()


def test_a_missing_model_directory_is_a_misconfiguration(make_embedder: MakeEmbedder) -> None:
    error = make_embedder(model="/nonexistent/model").submit(["a"], "query").exception(LIMIT)
    assert isinstance(error, ProviderMisconfigured)
    assert '"/nonexistent/model" does not exist' in error.message
    assert error.hint is not None


def test_a_host_that_cannot_even_start_reports_its_last_words(make_embedder: MakeEmbedder) -> None:
    with running_owner() as process:
        embedder = make_embedder(process.pid, options={"memory_limit_mb": 1})
        error = embedder.submit(["a"], "query").exception(LIMIT)
    assert isinstance(error, ModelHostUnavailable)
    assert error.detail is not None
    assert "MemoryError" in error.detail


def test_a_broken_frame_closes_the_connection_and_hurts_nobody_else(make_embedder: MakeEmbedder) -> None:
    embedder = make_embedder()
    embed(embedder, "a")
    pid = host_pid(embedder)
    frames = [
        b"\xff" * 8,
        struct.pack(">II", 2, 0) + b"[]",
        encode_frame({"op": "embed"}),
        encode_frame({"id": 1, "op": "unknown"}),
        encode_frame({"id": 1, "op": "embed", "kind": "document", "lengths": [5]}, b"abc"),
        encode_frame({"id": 1, "op": "embed", "kind": "document", "lengths": []}),
    ]
    for frame in frames:
        connection = connect(place_of(embedder))
        assert connection is not None
        with connection:
            connection.settimeout(LIMIT)
            connection.sendall(frame)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1024) == b""
    embed(embedder, "b")
    assert host_pid(embedder) == pid


# The client before a host that misbehaves


@contextlib.contextmanager
def fake_host(embedder: LocalEmbedder, reply: bytes) -> Iterator[None]:
    """Listen in the host's place and send the same bytes to whoever asks."""
    place = place_of(embedder)
    connections: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place.socket)
        listener.listen()

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    connection.recv(65536)
                    connection.sendall(reply)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)
    for connection in connections:
        connection.close()
    os.unlink(place.socket)


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (b"", ModelHostUnavailable, "silent for 0.2 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ModelHostUnavailable, "went away twice"),
        (encode_frame({"id": 1}), InvalidVectors, "malformed"),
        (encode_frame({"id": 1, "error": 3}), InvalidVectors, "malformed"),
        (encode_frame({"id": 1, "count": 2, "dimensions": 1}, b"12345678"), InvalidVectors, "one vector for each"),
        (encode_frame({"id": 1, "count": 1, "dimensions": 2}, b"1234"), InvalidVectors, "one vector for each"),
        (
            encode_frame({"id": 1, "error": {"class": "InputRejected", "message": "no", "detail": None, "hint": None}}),
            InputRejected,
            "no",
        ),
        (
            encode_frame({"id": 1, "error": {"class": "SystemExit", "message": "no", "detail": None, "hint": None}}),
            ProviderError,
            "no",
        ),
    ],
)
def test_a_host_that_misbehaves_fails_the_request_only(
    make_embedder: MakeEmbedder, reply: bytes, kind: type[ProviderError], words: str
) -> None:
    embedder = make_embedder(model="/fake", timeout_seconds=0.2)
    with fake_host(embedder, reply):
        error = embedder.submit(["a"], "query").exception(LIMIT)
        assert type(error) is kind
        assert words in error.message
        embedder.close()


def test_a_directory_that_others_could_have_made_is_refused(model_directory: str, tmp_path: Path) -> None:
    settings, owner = HostSettings(model_directory), Owner.of(os.getpid())
    base = tmp_path / f"embedline-{os.geteuid()}"
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ProviderMisconfigured, match="only the server can use"):
        prepare_place(settings, owner, str(tmp_path))
    base.unlink()
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(ProviderMisconfigured, match="only the server can use"):
        prepare_place(settings, owner, str(tmp_path))
    base.chmod(0o700)
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    with pytest.raises(ProviderMisconfigured, match="too long"):
        prepare_place(settings, owner, str(deep))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"idle_seconds": "soon"}, "900"),
        ({"idle_seconds": 0}, "900"),
        ({"memory_limit_mb": True}, "4096"),
        ({"backend": 3}, "onnx"),
        ({"backend": "openvino"}, "onnx"),
        ({"precision": "int4"}, '"precision": "int8"'),
        ({"precision": "int8"}, 'Add "backend": "onnx"'),
        ({"precision": "float16", "backend": "onnx"}, "float32 or int8"),
        ({"device": "gpu"}, "accelerator"),
        ({"presicion": "int8"}, "backend, precision, device"),
    ],
)
def test_an_option_that_cannot_be_used_is_named_with_the_way_out(options: dict[str, object], hint: str) -> None:
    config = ModelConfig(name="m", provider="sentence-transformers", model="/m", options=options)
    with pytest.raises(InvalidParameter, match=next(iter(options))) as caught:
        settings_of(config)
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_the_device_auto_is_the_default() -> None:
    def settings(**options: object) -> HostSettings:
        return settings_of(ModelConfig("m", "sentence-transformers", "/m", options=options))

    assert settings(device="auto", max_tokens=100) == settings()
    assert settings(device="cuda:1").device == "cuda:1"


def test_hosts_differ_by_what_decides_the_vectors() -> None:
    settings = HostSettings("/m")
    others = [replace(settings, **{name: "x"}) for name in ("model", "revision", "backend", "device", "precision")]
    assert len({settings.name, *(other.name for other in others)}) == 6
    assert replace(settings, idle_seconds=5, memory_limit_mb=1).name == settings.name


def test_a_log_shows_its_end_without_keys(tmp_path: Path) -> None:
    place = HostPlace(str(tmp_path), "x")
    assert log_tail(place) is None
    Path(place.log).write_text("old\n" * 100 + "token hf_abcdefghijklmnop failed at https://user:pass@hub/\n")
    tail = log_tail(place)
    assert tail is not None
    assert tail.endswith("token [redacted] failed at https://[redacted]hub/")
    assert len(tail.splitlines()) == LOG_TAIL_LINES


def test_the_same_weights_have_the_same_identity_wherever_they_lie(model_directory: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_directory, copy)
    (copy / "README.md").write_text("words")
    identity = weights_identity(HostSettings(model_directory))
    assert weights_identity(HostSettings(str(copy))) == identity
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert weights_identity(HostSettings(str(copy))) != identity


# The scheduler and failing batches, without a process


class FakeBackend:
    """A model that runs out of memory above `capacity` texts and fails on the text "poison"."""

    slice_characters = 1024
    modalities = ("text",)
    max_tokens = None

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.batches: list[int] = []

    def forward(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if texts != ["warm up"]:
            self.batches.append(len(texts))
            if len(texts) > self.capacity:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        if "poison" in texts:
            raise ValueError("bad text")
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    def free_memory(self) -> None:
        """There is nothing to give back."""

    def tokenizer(self) -> None:
        """It has none."""


def fake_model(capacity: int) -> tuple[LoadedModel, FakeBackend]:
    backend = FakeBackend(capacity)
    return LoadedModel(HostSettings("/fake"), backend), backend


def make_request(kind: Any, texts: Sequence[str]) -> tuple[Request, list[Any]]:
    results: list[Any] = []
    return Request(kind, texts, results.append), results


def test_queries_go_first_and_document_requests_take_turns() -> None:
    scheduler, limits = Scheduler(), SliceLimits(texts=4, characters=1000)
    large, _ = make_request("document", ["x" * length for length in range(1, 11)])
    small, _ = make_request("document", ["y"])
    queries = [make_request("query", ["q"])[0] for _ in range(3)]
    scheduler.put(large)
    assert scheduler.take(limits) == [(large, [9, 8, 7, 6])]
    for request in (small, *queries):
        scheduler.put(request)
    assert scheduler.take(limits) == [(query, [0]) for query in queries]
    # The large request has had its turn, so the small one is in the next slice but one at the latest.
    assert scheduler.take(limits) == [(large, [5, 4, 3, 2])]
    assert scheduler.take(limits) == [(small, [0]), (large, [1, 0])]


def test_a_slice_is_bounded_by_what_padding_makes_of_it() -> None:
    scheduler, limits = Scheduler(), SliceLimits(texts=32, characters=100)
    request, _ = make_request("document", ["x" * 500, "x" * 40, "x" * 40, "x" * 40])
    scheduler.put(request)
    assert [len(part[1]) for _ in range(3) for part in scheduler.take(limits)] == [1, 2, 1]


def test_cancelled_requests_are_passed_over() -> None:
    scheduler = Scheduler()
    (first, _), (second, _) = make_request("document", ["a"]), make_request("document", ["b"])
    first.cancelled = True
    scheduler.put(first)
    scheduler.put(second)
    assert scheduler.take(SliceLimits(8, 100)) == [(second, [0])]


def test_a_lack_of_memory_halves_the_slice_and_later_ones_stay_as_small() -> None:
    model, backend = fake_model(capacity=4)
    before = model.limits.characters
    rows = model.encode([str(number) * 100 for number in range(10)])
    assert rows[:, 0].tolist() == [100] * 10
    assert backend.batches == [10, 5, 2, 3, 5, 2, 3]
    assert (before, model.limits.characters) == (1024, 512)
    scheduler, (request, _) = Scheduler(), make_request("document", ["x" * 100] * 10)
    scheduler.put(request)
    assert len(scheduler.take(model.limits)[0][1]) == 5


def test_a_text_that_never_fits_is_rejected_with_the_option_to_raise() -> None:
    with pytest.raises(InputRejected) as caught:
        fake_model(capacity=0)[0].encode(["x"])
    assert caught.value.hint is not None
    assert "memory_limit_mb" in caught.value.hint


def test_a_poisonous_text_fails_its_own_request_only() -> None:
    (good, good_results), (bad, bad_results) = make_request("document", ["aa"]), make_request("document", ["poison"])
    encode_parts(fake_model(capacity=8)[0], [(good, [0]), (bad, [0])])
    assert good_results[0].tolist() == [[2.0, 1.0]]
    assert isinstance(bad_results[0], InputRejected)
    assert bad_results[0].detail == "ValueError: bad text"
