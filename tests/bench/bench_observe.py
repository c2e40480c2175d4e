"""What watching costs: the drain rate with all of it against none, and the time of a scrape.

Watched, a worker keeps each batch, sends spans to a receiver of OTLP, and is scraped each second. Unwatched, no row of a batch
is kept, the rounds of alerts are left out, and there is neither endpoint nor scrape. Both sides run in turn on one server; the
switch is made in the worker's session before its CALL. A busy machine spreads the rates by far more than watching costs, so the
processor time of both sessions is compared, too. The time of what watches is taken directly as well: of the worker's own thread
while it keeps batches, reads alerts and queues spans, and the processor time of the thread that sends them.
Then scrapes are timed with 1,000,000 rows that wait, as one row of the inbox each, and with 1,000 pipelines.
"""

from __future__ import annotations

import http.server
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from bench_pipelines import _create
from harness import Bench, Figure, scalar, timed
from workers import (
    Session,
    check_count,
    create_pipeline,
    fill,
    processor_seconds,
    recreate_source,
    register_stub,
    spread,
)

from generated_names import BENCH
from stub_provider import StubProvider, stub_provider

ROWS, DIMENSIONS, WAITING, PIPELINES, SCRAPES = 20_000, 384, 1_000_000, 1000, 15
SHARE, WAITING_MS, PIPELINES_MS = 0.99, 50.0, 300.0
# Promised of a worker's time, in percent.
WATCHING_PERCENT = 1.0
# Leaves out what a worker does to be watched. It is for this bench alone, so no setting does it.
_UNWATCHED = """
    DO LANGUAGE plpython3u $$
        from embedline.worker import batch_history, housekeeping
        batch_history.keep = lambda *_: None
        housekeeping.Housekeeping.do_round = lambda *_: None
    $$
"""
_WATCHED = """
    DO LANGUAGE plpython3u $$
        import os
        os.environ.update(OTEL_EXPORTER_OTLP_ENDPOINT='{0}', OTEL_BSP_SCHEDULE_DELAY='1000')
    $$
"""
# Takes the time of what watches, in the session of the worker.
_TIMED = """
    DO LANGUAGE plpython3u $$
        import time
        from embedline.observe import otlp
        from embedline.worker import batch_history, housekeeping

        def take_time(owner, name, clock):
            inner = getattr(owner, name)
            def timed(*arguments, **named):
                started = clock()
                try:
                    return inner(*arguments, **named)
                finally:
                    spent[0] += clock() - started
            setattr(owner, name, timed)

        spent = GD['bench_watching'] = [0.0]
        take_time(batch_history, 'keep', time.perf_counter)
        take_time(housekeeping.Housekeeping, 'do_round', time.perf_counter)
        take_time(otlp.OtlpExporter, 'record', time.perf_counter)
        take_time(otlp._Open, '__exit__', time.perf_counter)
        take_time(otlp.OtlpExporter, '_send', time.thread_time)
    $$
"""
_SPENT = """
    CREATE OR REPLACE FUNCTION pg_temp.bench_spent() RETURNS float8 LANGUAGE plpython3u AS $$
        spent = GD['bench_watching'][0]
        GD['bench_watching'][0] = 0.0
        return spent
    $$
"""


def run(bench: Bench) -> None:
    """Compare the rates, then time the scrapes."""
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        _compare(bench, session, provider)
        _time_waiting(bench, session)
    _time_pipelines(bench)


def _compare(bench: Bench, session: Session, provider: StubProvider) -> None:
    model = register_stub(session, provider)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    worked: dict[bool, list[float]] = {True: [], False: []}
    scraped: list[float] = []
    watching: list[float] = []
    task = bench.progress.add_task("Draining", total=2 * (bench.rounds + 1))
    with _receiver() as (address, received):
        for number in range(bench.rounds + 1):
            for watched in (True, False) if number % 2 else (False, True):
                recreate_source(session)
                create_pipeline(session, model)
                fill(session, range(1, ROWS + 1))
                session.execute("CHECKPOINT")
                provider.counts()
                elapsed, processor, scraper, spent = _drain(bench, watched, address)
                check_count(session, ROWS, provider.counts()["texts"], ROWS)
                if number > 0:
                    seconds[watched].append(elapsed)
                    worked[watched].append(processor)
                    scraped += [scraper / elapsed * 100] if watched else []
                    watching += [spent / elapsed * 100] if watched else []
                bench.progress.update(task, advance=1)
    if not any("traces" in path for path in received):
        raise SystemExit("no span has arrived")
    rates = [ROWS / statistics.median(seconds[watched]) for watched in (True, False)]
    shares = [without / watched for watched, without in zip(seconds[True], seconds[False], strict=True)]
    detail = f"{rates[0]:,.0f} against {rates[1]:,.0f} rows/s; {spread(shares, '.3f')}"
    bench.compare("processor time of the worker, watched", worked[True], worked[False])
    bench.add(Figure("  of a scrape each second, of a core", statistics.median(scraped), "%", None, spread(scraped)))
    bench.add(
        Figure(
            "  of what watches, of the worker's time",
            statistics.median(watching),
            "%",
            WATCHING_PERCENT,
            spread(watching),
        )
    )
    bench.add(Figure("rate watched, of the unwatched", statistics.median(shares), "×", SHARE, detail, at_least=True))


def _drain(bench: Bench, watched: bool, address: str) -> tuple[float, float, float, float]:
    """Drain in a session of its own, which has worked before.

    Return the seconds, the processor time of the worker, that of the scrapes, and the seconds of what watches.
    """
    with bench.connect() as session, bench.connect() as scraper:
        session.execute(_WATCHED.format(address) if watched else _UNWATCHED)
        # Imports are over before the clock starts.
        session.execute("CALL embedline.run_worker(max_seconds => 0)")
        # So are those of the exporter's thread, which takes half a second of a core once in a session.
        session.execute("DO LANGUAGE plpython3u $$import time; time.sleep(3)$$")
        scraper.execute("SELECT embedline.metrics()").fetchone()
        if watched:
            session.execute(_TIMED)
            session.execute(_SPENT)
        pids = (session.info.backend_pid, scraper.info.backend_pid)
        before = [processor_seconds(pid) for pid in pids]
        with _scrapes(scraper) if watched else nullcontext():
            elapsed = timed(lambda: session.execute("CALL embedline.run_worker(until_idle => true)"))
        worker, scrapes = (processor_seconds(pid) - start for pid, start in zip(pids, before, strict=True))
        spent = scalar(session, "SELECT pg_temp.bench_spent()") if watched else 0.0
        return elapsed, worker, scrapes, spent


@contextmanager
def _scrapes(session: Session) -> Iterator[None]:
    """Scrape each second."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1):
            session.execute("SELECT embedline.metrics()").fetchone()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _receiver() -> Iterator[tuple[str, list[str]]]:
    """Take what is sent over OTLP; yield the address and the paths."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", paths
        server.shutdown()


def _time_waiting(bench: Bench, session: Session) -> None:
    bench.progress.add_task(f"Queueing {WAITING:,} rows", total=None)
    session.execute(
        f"INSERT INTO {BENCH('inbox')} (key_id) SELECT ARRAY[g] FROM generate_series(1, %s) AS g", (WAITING,)
    )
    session.execute(f"VACUUM ANALYZE {BENCH('inbox')}")
    estimated = scalar(session, "SELECT pending FROM embedline.status WHERE pipeline = 'bench'")
    _time(bench, f"{WAITING:,} rows wait: a scrape", WAITING_MS, f"shown as {estimated:,}")
    session.execute("SELECT embedline.drop_pipeline('bench')")


def _time_pipelines(bench: Bench) -> None:
    with bench.connect() as session:
        task = bench.progress.add_task(f"Creating {PIPELINES:,} pipelines", total=PIPELINES)
        for number in range(PIPELINES):
            _create(session, number)
            bench.progress.update(task, advance=1)
        session.execute("CALL embedline.run_worker(until_idle => true)")
        session.execute("VACUUM ANALYZE")
    _time(bench, f"{PIPELINES:,} pipelines: a scrape", PIPELINES_MS, "")


def _time(bench: Bench, label: str, limit: float, detail: str) -> None:
    """Time scrapes of one session after its first, and those of them that read the alerts again."""
    with bench.connect() as session:
        first = timed(lambda: session.execute("SELECT embedline.metrics()").fetchone())
        again, seconds = [], []
        for number in range(SCRAPES):
            is_again = number % 5 == 0
            if is_again:
                session.execute("DO LANGUAGE plpython3u $$GD.pop('embedline.alerts', None)$$")
            elapsed = timed(lambda: session.execute("SELECT embedline.metrics()").fetchone()) * 1000
            (again if is_again else seconds).append(elapsed)
    shown = "; ".join(
        filter(None, [spread(seconds, ".0f") + " ms", f"a session's first {first * 1000:.0f} ms", detail])
    )
    bench.add(Figure(label, statistics.median(seconds), "ms", limit, shown))
    bench.add(
        Figure("  one that reads the alerts again", statistics.median(again), "ms", None, spread(again, ".0f") + " ms")
    )
