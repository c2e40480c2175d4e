"""The model host's own work, against `SentenceTransformer.encode`, both with a model that computes nothing.

Clients are processes, as backends are. They send requests of short texts through the socket and normalise the vectors
as a worker does. The host runs its protocol, tokenizer, packing, padding and replies; only the transformer's pass is
left out, as if an accelerator took no time. The bare side is `encode` in one process, at the best of its batch sizes.
All run on the same cores. On a machine with other work the clock tells little, so the target is one of CPU: the texts
that two cores get through the host in a second, clients included.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import null_model
import numpy as np
from harness import Bench, Figure
from packages import summaries

from embedline.model_host.host_settings import HostSettings
from injected_host import injected_host

CLIENTS, TEXTS_A_REQUEST, IN_FLIGHT = 4, 1024, 2
# Texts that each client sends in a round, and that the bare process encodes in one.
TEXTS, BARE_TEXTS = 25_000, 6_000
BATCHES = (64, 256, 1024)
LEAST_RATE = 25_000
# Characters of the texts: short descriptions and sentences, with a mean of about 63.
_CHARACTERS = range(40, 90)
_TICK = os.sysconf("SC_CLK_TCK")

# Reads a line, sends all its texts, answers with seconds, CPU seconds and the last vectors' places in the table.
CLIENT = """
import json, os, sys, time
from collections import deque
import numpy as np
from embedline.core.vectors import usable_vectors
from embedline.model_host.host_settings import HostSettings
from injected_host import embedder_of
settings, root, owner, path, size, in_flight = sys.argv[1:]
size, in_flight = int(size), int(in_flight)
texts = json.load(open(path))
embedder = embedder_of(HostSettings(**json.loads(settings)), root, int(owner))
pieces = [texts[start : start + size] for start in range(0, len(texts), size)]

def rows(future):
    block = future.result(120)
    matrix = np.frombuffer(block.data, dtype="<f4").reshape(block.count, block.dimensions)
    unit, faults = usable_vectors(matrix, "vector", True)
    assert not faults
    return unit

embedder.submit(texts[:64], "document").result(120)
for line in sys.stdin:
    start, cpu, waiting, first = time.perf_counter(), time.process_time(), deque(), None
    for piece in pieces:
        if len(waiting) == in_flight:
            found = rows(waiting.popleft())
            first = found if first is None else first
        waiting.append(embedder.submit(piece, "document"))
    while waiting:
        found = rows(waiting.popleft())
        first = found if first is None else first
    answer = time.perf_counter() - start, time.process_time() - cpu
    np.save(path + ".npy", first)
    print(json.dumps(answer), flush=True)
"""
BARE = """
import json, sys, time
import null_model
texts = json.load(open(sys.argv[2]))
model = null_model.bare_model(sys.argv[1])
model.encode(texts[:64], show_progress_bar=False)
for line in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    model.encode(texts, batch_size=int(line), show_progress_bar=False)
    print(json.dumps((time.perf_counter() - start, time.process_time() - cpu)), flush=True)
"""


def run(bench: Bench) -> None:
    """Measure both sides in turn, in `bench.rounds` rounds after one that warms up."""
    directory = bench.models / "all-MiniLM-L6-v2"
    settings = HostSettings(str(directory), device="cpu")
    texts = _texts()
    with ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="el-"))
        host = stack.enter_context(injected_host(str(Path(null_model.__file__)), "load", settings, root))
        clients = [
            stack.enter_context(_client(settings, root, texts[number * TEXTS : (number + 1) * TEXTS], number))
            for number in range(CLIENTS)
        ]
        bare = stack.enter_context(_asked(BARE, str(directory), _written(root, "bare", texts[:BARE_TEXTS])))
        ours: list[tuple[float, float, float]] = []
        theirs: dict[int, list[tuple[float, float]]] = {size: [] for size in BATCHES}
        threads: dict[str, float] = {}
        task = bench.progress.add_task("The host", total=(bench.rounds + 1) * (1 + len(BATCHES)))
        for number in range(bench.rounds + 1):
            before, each = _cpu(host.pid), _threads(host.pid)
            answers = _all(clients)
            seconds = max(answer[0] for answer in answers)
            measured = seconds, _cpu(host.pid) - before, sum(answer[1] for answer in answers)
            bench.progress.update(task, advance=1)
            if number > 0:
                ours.append(measured)
                for name, used in _threads(host.pid).items():
                    threads[name] = threads.get(name, 0.0) + used - each.get(name, 0.0)
            for size in BATCHES:
                found = bare(str(size))
                bench.progress.update(task, advance=1, description=f"encode in batches of {size}")
                if number > 0:
                    theirs[size].append((found[0], found[1]))
        _check_vectors(directory, root, texts)
    _report(bench, ours, theirs, threads)
    mean = statistics.fmean(map(len, texts))
    bench.note(
        f"{CLIENTS} clients × {TEXTS:,} texts of {mean:.0f} characters, {_tokens(directory, texts):.1f} tokens,"
        f" in requests of {TEXTS_A_REQUEST}, {IN_FLIGHT} in flight"
    )


def _report(
    bench: Bench,
    ours: list[tuple[float, float, float]],
    theirs: dict[int, list[tuple[float, float]]],
    threads: dict[str, float],
) -> None:
    count = CLIENTS * TEXTS
    rates = sorted(count / seconds for seconds, _, _ in ours)
    rate = statistics.median(rates)
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} cores; rounds {rates[0]:,.0f} to {rates[-1]:,.0f}"
    host, client = (statistics.median(row[place] for row in ours) / count for place in (1, 2))
    pair = 2 / (host + client)
    of = f"a second of two cores: {1e6 * host:.1f} µs of the host and {1e6 * client:.1f} µs of the clients a text"
    bench.add(Figure("through the host, by CPU", pair, "texts", LEAST_RATE, of, at_least=True))
    bench.add(Figure("through the host, by the clock", rate, "texts", detail=f"a second, {detail}"))
    best = min(theirs, key=lambda size: statistics.median(seconds for seconds, _ in theirs[size]))
    for size in BATCHES:
        bare = BARE_TEXTS / statistics.median(seconds for seconds, _ in theirs[size])
        cpu = statistics.median(used for _, used in theirs[size]) / BARE_TEXTS
        bench.add(
            Figure(f"  encode, batches of {size}", bare, "texts", detail=f"a second; CPU {1e6 * cpu:.0f} µs a text")
        )
    ratios = [count / ours[n][0] / (BARE_TEXTS / theirs[best][n][0]) for n in range(len(ours))]
    detail = f"batches of {best}; rounds {min(ratios):.2f} to {max(ratios):.2f}"
    bench.add(Figure("times encode at its best, by the clock", statistics.median(ratios), "×", detail=detail))
    each = sorted((used / len(ours) / count * 1e6 for used in threads.values()), reverse=True)
    shown = ", ".join(f"{used:.1f}" for used in each if used > 0.05)
    bench.note(f"CPU of the host's threads, µs a text: {shown}")


def _texts() -> list[str]:
    found = [text for text in summaries(400_000).texts if len(text) in _CHARACTERS]
    needed = CLIENTS * TEXTS
    if len(found) < needed:
        raise SystemExit(f"apt's package lists have {len(found)} texts of that length here, {needed} are needed")
    return random.Random(needed).sample(found, needed)


def _tokens(directory: Path, texts: list[str]) -> float:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    return statistics.fmean(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts[:2000]))


def _written(root: str, name: str, texts: list[str]) -> str:
    path = Path(root) / f"{name}.json"
    path.write_text(json.dumps(texts))
    return str(path)


@contextmanager
def _client(settings: HostSettings, root: str, texts: list[str], number: int) -> Iterator[Callable[[str], None]]:
    given = json.dumps({name: getattr(settings, name) for name in ("model", "device")})
    path = _written(root, f"client-{number}", texts)
    with _process(CLIENT, given, root, str(os.getpid()), path, str(TEXTS_A_REQUEST), str(IN_FLIGHT)) as process:
        yield process


@contextmanager
def _process(code: str, *arguments: str) -> Iterator[Any]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@contextmanager
def _asked(code: str, *arguments: str) -> Iterator[Callable[[str], list[float]]]:
    with _process(code, *arguments) as process:

        def ask(line: str) -> list[float]:
            print(line, file=process.stdin, flush=True)
            found: list[float] = json.loads(process.stdout.readline())
            return found

        yield ask


def _all(clients: list[Any]) -> list[list[float]]:
    for client in clients:
        print("go", file=client.stdin, flush=True)
    return [json.loads(client.stdout.readline()) for client in clients]


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _threads(pid: int) -> dict[str, float]:
    """Return the CPU seconds of a process's threads, by their numbers."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found[task.name] = (int(fields[11]) + int(fields[12])) / _TICK
    return found


def _check_vectors(directory: Path, root: str, texts: list[str]) -> None:
    """Every vector of each client's first request must be that of its text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    for number in range(CLIENTS):
        given = list(itertools.islice(texts, number * TEXTS, number * TEXTS + TEXTS_A_REQUEST))
        wanted = null_model.table()[[null_model.row_of(found.ids) for found in tokenizer.encode_batch(given)]]
        stored = np.load(Path(root) / f"client-{number}.json.npy")
        cosines = np.einsum("ij,ij->i", stored, wanted) / np.linalg.norm(wanted, axis=1)
        if cosines.min() < 0.9999:
            raise SystemExit(f"client {number}: a vector is not that of its text: cosine {cosines.min():.4f}")
