"""A worker's memory over 1,000,000 rows: the backend's own, from /proc, so the bench must run on the server's machine.

One worker takes them as a backfill through the stub. What the backend has of shared_buffers is not its own and is left
out: VmRSS less RssShmem. Memory goes up and down with the batches in work; so these have the most rows that they may have
all the time, and growth compares medians, of the last 100,000 rows and of those that follow the first 100,000.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Bench, Figure
from rich.progress import TaskID
from workers import check_count, check_vector, create_pipeline, drain, fill, recreate_source, register_stub

from embedline.catalog.settings import PacingLimits
from stub_provider import StubProvider, stub_provider

ROWS, STRETCH, DIMENSIONS = 1_000_000, 100_000, 384
MOST_MB, MOST_GROWTH = 300, 1.05
SAMPLE_SECONDS = 0.25
LARGEST_BATCH = PacingLimits().max_rows


@dataclass(frozen=True)
class Sample:
    """Texts sent so far, and the backend's own memory then, in MB."""

    texts: int
    own: float


def run(bench: Bench) -> None:
    """Drain the rows in one session while another thread reads its memory."""
    samples: list[Sample] = []
    done = threading.Event()
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        model = register_stub(session, provider)
        recreate_source(session)
        fill(session, range(1, ROWS + 1))
        create_pipeline(session, model)
        # Batches follow what the machine gives, and memory follows them: held at their largest, what grows is a leak.
        for setting in ("min_rows", "max_rows"):
            session.execute("SELECT embedline.configure(%s, %s)", (setting, LARGEST_BATCH))
        provider.counts()
        task = bench.progress.add_task("Embedding", total=ROWS)
        watcher = threading.Thread(target=_watch, args=(bench, provider, session.info.backend_pid, samples, done, task))
        watcher.start()
        try:
            seconds = drain(session)
        finally:
            done.set()
            watcher.join()
        check_count(session, ROWS, samples[-1].texts, ROWS)
        check_vector(session, provider, 471_100)
    _report(bench, samples, seconds)


def _report(bench: Bench, samples: list[Sample], seconds: float) -> None:
    most = max(sample.own for sample in samples)
    # The last write is followed by the ANALYZE that ends a backfill: up to 50 MB, once, and given back.
    working = [sample for sample in samples if sample.texts < ROWS]
    detail = f"{len(samples)} samples; while rows were embedded {max(sample.own for sample in working):.0f} MB"
    bench.add(Figure("the backend's own memory, most", most, "MB", MOST_MB, detail))
    medians = [
        statistics.median(sample.own for sample in working if first <= sample.texts < first + STRETCH)
        for first in range(STRETCH, ROWS, STRETCH)
    ]
    slope = np.polyfit(range(len(medians)), medians, 1)[0]
    detail = f"{medians[-1]:.1f} MB against {medians[0]:.1f} MB; {slope:+.2f} MB for each 100,000 rows"
    label = "median of the last 100,000 rows against that of the second"
    bench.add(Figure(label, medians[-1] / medians[0], "×", MOST_GROWTH, detail))
    bench.add(Figure("rate over all rows", ROWS / seconds, "rows/s"))


def _watch(
    bench: Bench, provider: StubProvider, pid: int, samples: list[Sample], done: threading.Event, task: TaskID
) -> None:
    texts = 0
    while True:
        is_last = done.is_set()
        sent = provider.counts().get("texts", 0)
        texts += sent
        bench.progress.update(task, advance=sent)
        samples.append(_sample(pid, texts))
        if is_last:
            return
        time.sleep(SAMPLE_SECONDS)


def _sample(pid: int, texts: int) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines if line.endswith(" kB")}
    return Sample(texts, found["VmRSS"] - found["RssShmem"])
