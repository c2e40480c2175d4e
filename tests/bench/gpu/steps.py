"""Run one step of the measurement on a GPU: `steps.py STEP key=value ...`.

Environment: EMBEDLINE_DSN, RESULTS, MODEL_DIR, SHORT, LONG, DEVICE, N, NLONG.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

# The host of the model that computes nothing is the tests' own.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from observing import (  # noqa: E402
    DEVICE,
    MODEL_DIR,
    RESULTS,
    Cpu,
    Gpu,
    cpu_of,
    environment_of,
    host,
    host_logs,
    memory_of,
    result,
    say,
)

from generated_names import Generated  # noqa: E402

DSN = os.environ.get("EMBEDLINE_DSN", "")
VECTORS = Generated("d").version(1)
N = int(os.environ.get("N", "200000"))
NLONG = int(os.environ.get("NLONG", "12000"))
_PAGE_CHARACTERS = 4000
_VECTOR = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
_END_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
"""
_REPORTS = """
    SELECT batch_rows, requests_in_flight, claim_seconds, embed_seconds, write_seconds
    FROM embedline.worker WHERE embed_seconds IS NOT NULL AND write_seconds IS NOT NULL
"""


def connect() -> Any:
    """Open a session."""
    import psycopg

    return psycopg.connect(DSN, autocommit=True)


def scalar(session: Any, query: str, parameters: Any = None) -> Any:
    """Return the first column of the first row, None if there is none."""
    row = session.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def short_texts() -> list[str]:
    """Return the short texts, one a line of their file."""
    return Path(os.environ["SHORT"]).read_text(encoding="utf-8").splitlines()[:N]


def step_load() -> None:
    """Fill the two source tables."""
    texts = short_texts()
    joined = "\n\n".join(Path(os.environ["LONG"]).read_text(encoding="utf-8").split("\f"))
    stride = max(1, (len(joined) - _PAGE_CHARACTERS) // NLONG)
    with connect() as session:
        started = time.monotonic()
        session.execute("DROP TABLE IF EXISTS docs, pages")
        for table in ("docs", "pages"):
            session.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, body text NOT NULL)")
        with session.cursor().copy("COPY docs (id, body) FROM STDIN") as copy:
            for number, text in enumerate(texts, 1):
                copy.write_row((number, text))
        with session.cursor().copy("COPY pages (id, body) FROM STDIN") as copy:
            for number in range(NLONG):
                copy.write_row((number + 1, joined[number * stride : number * stride + _PAGE_CHARACTERS]))
        for table in ("docs", "pages"):
            session.execute(f"VACUUM ANALYZE {table}")
        took = time.monotonic() - started
        result("load_s", took, "s", f"{len(texts)} short rows, {NLONG} pages of {_PAGE_CHARACTERS} characters")
        for name in ("server_version", "shared_buffers", "max_wal_size", "synchronous_commit"):
            say(f"{name} = {scalar(session, f'SHOW {name}')}")
        say(f"vector {scalar(session, _VECTOR)}")


def step_models(precisions: str = "auto,float32") -> None:
    """Register the models with the default memory limit; auto names no precision."""
    create = "SELECT embedline.create_model(%s, 'sentence-transformers', %s, options => %s::jsonb)"
    with connect() as session:
        for precision in precisions.split(","):
            options = {"device": DEVICE} | ({} if precision == "auto" else {"precision": precision})
            started = time.monotonic()
            try:
                scalar(session, create, (f"minilm-{precision}", MODEL_DIR, json.dumps(options)))
            except Exception as error:
                result(f"create_model_{precision}", "failed", "-", " | ".join(str(error).splitlines())[:600])
                continue
            pid = host(precision)
            detail = f"host {pid}, {memory_of(pid)}; {environment_of(pid)}"
            result(f"create_model_{precision}_s", time.monotonic() - started, "s", detail)
        # The log names the precision that was taken.
        host_logs()
        for row in session.execute("SELECT name::text, dimensions, max_tokens, options FROM embedline.model"):
            say(str(row))


def clear(session: Any) -> None:
    """End other sessions' work and drop all pipelines."""
    session.execute(_END_OTHERS)
    time.sleep(0.2)
    for (name,) in session.execute("SELECT name::text FROM embedline.pipeline").fetchall():
        session.execute("SELECT embedline.drop_pipeline(%s)", (name,))


class Drain:
    """Resident workers, each in a session of its own, and their progress."""

    def __init__(self, workers: int, limit: float) -> None:
        self._limit = limit
        self._stopping = threading.Event()
        self.progress: list[tuple[float, int]] = []
        self.reports: list[tuple[Any, ...]] = []
        self.errors: list[str] = []
        self.used: list[float] = []
        self._workers = [threading.Thread(target=self._work) for _ in range(workers)]
        self._watcher = threading.Thread(target=self._watch)

    def run(self) -> float:
        """Wait until the workers have ended; return when that was."""
        for thread in [*self._workers, self._watcher]:
            thread.start()
        for thread in self._workers:
            thread.join()
        ended = time.monotonic()
        self._stopping.set()
        self._watcher.join()
        return ended

    def reached(self, share: float, otherwise: float) -> float:
        """Return when that share of the vectors was there."""
        final = max((size for _, size in self.progress), default=0)
        return next((when for when, size in self.progress if size and size >= share * final), otherwise)

    def _work(self) -> None:
        call = "CALL embedline.run_worker(max_seconds => %s, pipeline_name => 'd', until_idle => true)"
        try:
            with connect() as session:
                session.execute(call, (self._limit,))
                self.used.append(cpu_of(session.info.backend_pid)[0])
        except Exception as error:
            self.errors.append(repr(error)[:300])

    def _watch(self) -> None:
        try:
            with connect() as session:
                while not self._stopping.wait(0.1):
                    size = scalar(session, "SELECT pg_relation_size(%s)", (VECTORS,))
                    self.progress.append((time.monotonic(), size))
                    if len(self.progress) % 5 == 0:
                        self.reports += session.execute(_REPORTS).fetchall()
        except Exception as error:
            self.errors.append(f"watch: {error!r}"[:200])


def step_drain(tag: str, precision: str = "auto", workers: str = "4", source: str = "docs", limit: str = "60") -> None:
    """Measure from create_pipeline to all embedded."""
    tag = f"drain_{tag}"
    control = connect()
    clear(control)
    control.execute("CHECKPOINT")
    total = scalar(control, f"SELECT count(*) FROM {source}")
    before = host(precision)
    drain, gpu, cpu = Drain(int(workers), float(limit)), Gpu(), Cpu(before)
    started = time.monotonic()
    create = "SELECT embedline.create_pipeline('d', %s::regclass, 'body', %s, index_method => 'none')"
    scalar(control, create, (source, f"minilm-{precision}"))
    ended = drain.run()
    pid = host(precision)
    if pid == before:
        cpu.report(tag)
    else:
        result(f"{tag}_host_started_by_worker", str(pid), "pid", environment_of(pid))
    chunks = scalar(control, f"SELECT count(*) FROM {VECTORS}")
    documents = scalar(control, "SELECT count(DISTINCT id) FROM d_embedding WHERE embedding IS NOT NULL")
    seconds = ended - started
    first, tenth, most = (drain.reached(share, ended) for share in (0.0, 0.15, 0.9))
    steady = 0.75 * chunks / (most - tenth) if most > tenth else 0.0
    complete = "" if documents == total else f"INCOMPLETE: {documents} of {total} rows; "
    unit = "rows" if source == "docs" else "chunks"
    detail = (
        f"{complete}{documents} rows, {chunks} vectors in {seconds:.2f} s with {workers} workers; steady {steady:.0f}/s"
    )
    result(
        f"{tag}_{unit}_per_s", chunks / seconds, f"{unit}/s", f"{detail}; first vectors after {first - started:.2f} s"
    )
    gpu.report(tag, first, most)
    each = " ".join(f"{value:.1f}" for value in drain.used)
    result(f"{tag}_backend_cpu", sum(drain.used) / seconds, "cores", f"seconds of each worker {each}")
    if drain.reports:
        rows = [[value or 0 for value in row] for row in drain.reports]
        size, flying, *parts = [statistics.median(column) for column in zip(*rows, strict=True)]
        shown = ", ".join(
            f"{name} {value:.3f} s" for name, value in zip(("claim", "embed", "write"), parts, strict=True)
        )
        result(f"{tag}_worker_batch_rows", float(size), "rows", f"medians: {flying:.1f} requests in flight, {shown}")
    status = "SELECT pending, backfill_complete, dead_letters, last_error FROM embedline.status WHERE pipeline = 'd'"
    say(f"{tag}: status {control.execute(status).fetchone()}")
    for error in drain.errors:
        result(f"{tag}_error", "1", "-", error)
    if drain.errors:
        host_logs()


def step_kill_host(precision: str = "auto") -> None:
    """End a model host, so that a worker starts the next."""
    pid = host(precision)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while host(precision) == pid and time.monotonic() < deadline:
        time.sleep(0.05)
    say(f"the host was {pid}, now it is {host(precision)}")


class Asking:
    """Threads that send requests of short texts, each over its own connection."""

    def __init__(self, settings: Any, owner: int, root: str | None, threads: int, items: int, in_flight: int) -> None:
        from embedline.core.embedding import ModelConfig
        from embedline.embedders.local import LocalEmbedder

        config = ModelConfig("bench", "sentence-transformers", MODEL_DIR)
        self.embedders = [
            LocalEmbedder(config, owner_pid=owner, runtime_root=root, settings=settings) for _ in range(threads)
        ]
        self.items, self.in_flight = items, in_flight
        self.texts = short_texts()
        say(f"probe {self.embedders[0].submit(self.texts[:items], 'document').result(120).dimensions} dimensions")

    def measure(self, tag: str, pid: int | None, seconds: float) -> None:
        """Ask for that long and put down the rate."""
        done, errors, times = [0] * len(self.embedders), [], []
        gpu, cpu = Gpu(), Cpu(pid)
        own, started = time.process_time(), time.monotonic()
        deadline = started + seconds

        def work(number: int) -> None:
            waiting: deque[tuple[float, Any]] = deque()
            at = number * (len(self.texts) // len(self.embedders))
            try:
                while time.monotonic() < deadline or waiting:
                    while time.monotonic() < deadline and len(waiting) < self.in_flight:
                        at = 0 if at + self.items > len(self.texts) else at
                        given = self.texts[at : at + self.items]
                        waiting.append((time.monotonic(), self.embedders[number].submit(given, "document")))
                        at += self.items
                    if waiting:
                        began, future = waiting.popleft()
                        done[number] += future.result(60).count
                        times.append(time.monotonic() - began)
            except Exception as error:
                errors.append(repr(error)[:300])

        workers = [threading.Thread(target=work, args=(number,)) for number in range(len(self.embedders))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        ended = time.monotonic()
        client = (time.process_time() - own) / (ended - started)
        result(
            f"{tag}_texts_per_s", sum(done) / (ended - started), "texts/s",
            f"{len(workers)} threads x {self.items} texts x {self.in_flight} in flight, {sum(done)} texts;"
            f" a request {1000 * statistics.median(times or [0]):.0f} ms; clients {client:.2f} cores; {environment_of(pid)}",
        )  # fmt: skip
        cpu.report(tag)
        gpu.report(tag, started + 0.5, ended)
        for error in errors:
            result(f"{tag}_error", "1", "-", error)
        for embedder in self.embedders:
            embedder.close()


def step_hostonly(
    tag: str, precision: str = "auto", threads: str = "8", items: str = "1024", seconds: str = "6", in_flight: str = "2",
    postmaster: str = "0",
) -> None:  # fmt: skip
    """Measure the server's model host without the database."""
    from embedline.core.embedding import ModelConfig
    from embedline.model_host.host_settings import settings_of

    options = {"device": DEVICE} | ({} if precision == "auto" else {"precision": precision})
    settings = settings_of(ModelConfig("bench", "sentence-transformers", MODEL_DIR, options=options))
    ask = Asking(settings, int(postmaster), None, int(threads), int(items), int(in_flight))
    ask.measure(f"hostonly_{tag}", host(precision), float(seconds))


def step_null(tag: str, threads: str = "8", items: str = "1024", seconds: str = "6", in_flight: str = "2") -> None:
    """Measure a host whose model computes nothing: what the cores allow."""

    from embedline.model_host.host_settings import HostSettings
    from injected_host import injected_host

    settings = HostSettings(MODEL_DIR, device="cpu")
    null_model = str(Path(__file__).parents[1] / "null_model.py")
    with (
        tempfile.TemporaryDirectory(prefix="el-") as root,
        injected_host(null_model, "load", settings, root) as process,
    ):
        ask = Asking(settings, os.getpid(), root, int(threads), int(items), int(in_flight))
        ask.measure(f"null_{tag}", process.pid, float(seconds))


def step_summary() -> None:
    """What the figures say of the targets: one line each, with the ratio."""
    figures: dict[str, float] = {}
    for line in Path(RESULTS).read_text().splitlines():
        fields = line.split(maxsplit=4)
        with contextlib.suppress(ValueError, IndexError):
            figures[fields[1]] = float(fields[2])
    short = best(figures, r"drain_\w+_rows_per_s")
    bare = best(figures, r"bare_f\d+_short_b\d+")
    long = best(figures, r"drain_\w+_chunks_per_s")
    for name, value, least, unit in (
        ("short_rows", short, 30_000, "rows/s"),
        ("times_bare_encode", short / bare if bare else 0.0, 4, "x"),
        ("long_chunks", long, 5_000, "chunks/s"),
    ):
        verdict = "PASS" if value >= least else "FAIL"
        result(
            f"target_{name}",
            value,
            unit,
            f"{verdict}, target {least}; best end to end {short:.0f}, best bare {bare:.0f}",
        )


def best(figures: dict[str, float], pattern: str) -> float:
    """Return the largest figure whose name matches, 0 if there is none."""
    return max((value for name, value in figures.items() if re.fullmatch(pattern, name)), default=0.0)


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    parameters = dict(item.split("=", 1) for item in given)
    say(f"step {name} {parameters}")
    globals()[f"step_{name}"](**parameters)
    sys.stdout.flush()
    # A daemon thread must not keep a finished step.
    os._exit(0)
