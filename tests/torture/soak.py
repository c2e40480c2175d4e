"""An hour of steady writes: `make soak`. Each minute it prints memory, queue and lag; at the end whether they stayed flat.

50 writes a second, each a transaction of its own that is due at a fixed time. Workers are resident and recycled. The model is
a local one, so its host is there, too. A write's lag runs from the time at which it was due until a search's view shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

import throwaway
from embedline.dev.cluster.server import Cluster
from generated_names import PAGE
from killing import model_host_pids
from support import assert_exact, create_pipeline, install, settle, wait_until
from torture.sessions import Worker, running
from working import insert_rows

RATE, ROWS, WORKERS = 50, 5000, 2
# Seconds after which a worker is recycled; scheduled ones live for minutes.
_WORKER_SECONDS = 120
_SAMPLE_SECONDS, _POLL_SECONDS = 5.0, 0.02
_QUEUES = ("inbox", "outbox", "claim", "deleted", "hidden", "lent")
# The verdict compares the last third of the minutes with the one before it; the first third warms up. A figure is flat if
# its median grew by no more than this share, or by no more than this amount in its unit.
_GROWTH, _MEMORY_MB, _QUEUE_MB, _LAG_MS = 0.15, 15.0, 4.0, 100.0
_LEAST_MINUTES = 3


@dataclass
class Write:
    """A write that is to be found: its key, its text, when it was due and found, of time.perf_counter."""

    key: int
    body: str
    due: float
    found: float = 0.0


@dataclass
class Minute:
    """What was measured in a minute: most megabytes of memory and of the queue's tables, dead rows in them, lags in ms."""

    workers_mb: float = 0.0
    host_mb: float = 0.0
    queued: int = 0
    queue_mb: float = 0.0
    dead_rows: int = 0
    lags: list[float] = field(default_factory=list)

    def lag(self, share: float) -> float:
        """Return the lag that a share of the writes did not exceed; 0 without any."""
        ordered = sorted(self.lags)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


class Soak:
    """The writer, the watcher and the sampler of a run, each in a thread of its own."""

    def __init__(self, cluster: Cluster, seconds: float, workers: Sequence[Worker]) -> None:
        self.minutes: list[Minute] = []
        self.written = 0
        self.late_ms: list[float] = []
        self._cluster = cluster
        self._workers = workers
        self._start = time.perf_counter() + 1
        self._end = self._start + seconds
        self._waiting: dict[int, Write] = {}
        self._lock = threading.Lock()
        self._is_written = threading.Event()
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Write until the time is over and everything is found."""
        threads = [
            threading.Thread(target=self._guarded, args=(part,)) for part in (self._write, self._watch, self._sample)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _guarded(self, part: Callable[[psycopg.Connection], None]) -> None:
        try:
            with contextlib.closing(psycopg.connect(self._cluster.dsn(), autocommit=True)) as connection:
                part(connection)
        except BaseException as error:
            self._errors.append(error)
            self._is_written.set()

    def _minute(self) -> Minute:
        number = max(int((time.perf_counter() - self._start) // 60), 0)
        while len(self.minutes) <= number:
            if self.minutes:
                print(_line(len(self.minutes), self.minutes[-1]), flush=True)
            self.minutes.append(Minute())
        return self.minutes[number]

    def _write(self, connection: psycopg.Connection) -> None:
        rng, keys, last = random.Random(1), list(range(1, ROWS + 1)), ROWS
        for number in range(int((self._end - self._start) * RATE)):
            due = self._start + number / RATE
            time.sleep(max(due - time.perf_counter(), 0))
            if self._errors:
                return
            kind, body = rng.random(), f"edition {number} of a text about {rng.choice(('rivers', 'bread', 'law'))}"
            if kind < 0.3:
                last += 1
                keys.append(last)
                connection.execute("INSERT INTO page VALUES (%s, %s)", (last, body))
                self._expect(Write(last, body, due))
            elif kind < 0.6:
                place = rng.randrange(len(keys))
                keys[place], keys[-1] = keys[-1], keys[place]
                key = keys.pop()
                with self._lock:
                    self._waiting.pop(key, None)
                connection.execute("DELETE FROM page WHERE id = %s", (key,))
            else:
                key = rng.choice(keys)
                connection.execute("UPDATE page SET body = %s WHERE id = %s", (body, key))
                self._expect(Write(key, body, due))
            self.written += 1
            self.late_ms.append((time.perf_counter() - due) * 1000)
        self._is_written.set()

    def _expect(self, write: Write) -> None:
        with self._lock:
            self._waiting[write.key] = write

    def _watch(self, connection: psycopg.Connection) -> None:
        found = (
            "SELECT w.id FROM unnest(%s::bigint[], %s::text[]) AS w (id, body)"
            " JOIN page_embedding AS e ON e.id = w.id AND e.chunk = w.body"
        )
        limit = self._end + 60
        while not (self._is_written.is_set() and not self._waiting):
            if time.perf_counter() > limit:
                raise AssertionError(f"{len(self._waiting)} writes are not found")
            with self._lock:
                asked = list(self._waiting.values())
            rows = (
                connection.execute(found, ([w.key for w in asked], [w.body for w in asked])).fetchall() if asked else ()
            )
            now, keys = time.perf_counter(), {row[0] for row in rows}
            for write in asked:
                if write.key in keys:
                    self._minute().lags.append((now - write.due) * 1000)
                    with self._lock:
                        if self._waiting.get(write.key) is write:
                            del self._waiting[write.key]
            time.sleep(_POLL_SECONDS)

    def _sample(self, connection: psycopg.Connection) -> None:
        tables = [PAGE(suffix) for suffix in _QUEUES]
        # Counted, because a resident worker's deletions reach the server's statistics only when its CALL ends.
        query = (
            "SELECT sum((s.found).tuple_count)::bigint, sum((s.found).dead_tuple_count)::bigint, sum(s.size) / 1048576.0"
            " FROM (SELECT pgstattuple(t) AS found, pg_total_relation_size(t) AS size FROM unnest(%s::regclass[]) AS t) AS s"
        )
        while not self._is_written.wait(_SAMPLE_SECONDS):
            minute = self._minute()
            live, dead, size = connection.execute(query, (tables,)).fetchone() or (0, 0, 0)
            minute.queued = max(minute.queued, int(live))
            minute.dead_rows = max(minute.dead_rows, int(dead))
            minute.queue_mb = max(minute.queue_mb, float(size))
            pids = [worker.pid for worker in self._workers if worker.pid is not None]
            minute.workers_mb = max(minute.workers_mb, sum(map(_anonymous_mb, pids)))
            minute.host_mb = max(minute.host_mb, sum(map(_anonymous_mb, model_host_pids(self._cluster))))


def _anonymous_mb(pid: int) -> float:
    """Return a process's own memory; shared buffers are no one's."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _line(number: int, minute: Minute) -> str:
    return (
        f"minute {number:>3}  workers {minute.workers_mb:6.1f} MB  model host {minute.host_mb:6.1f} MB"
        f"  queued {minute.queued:>5}  dead {minute.dead_rows:>6}  queue {minute.queue_mb:6.2f} MB"
        f"  lag p50 {minute.lag(0.5):6.0f} ms  p95 {minute.lag(0.95):6.0f} ms"
    )


def verdict(minutes: Sequence[Minute]) -> list[tuple[str, bool, str]]:
    """Return for each figure its name, whether it stayed flat, and both medians."""
    third = len(minutes) // 3
    before, after = minutes[-2 * third : -third], minutes[-third:]
    figures: tuple[tuple[str, Callable[[Minute], float], float, str], ...] = (
        ("memory of the workers", lambda m: m.workers_mb, _MEMORY_MB, "MB"),
        ("memory of the model host", lambda m: m.host_mb, _MEMORY_MB, "MB"),
        ("tables of the queue", lambda m: m.queue_mb, _QUEUE_MB, "MB"),
        ("lag p50", lambda m: m.lag(0.5), _LAG_MS, "ms"),
        ("lag p95", lambda m: m.lag(0.95), _LAG_MS, "ms"),
    )
    found = []
    for name, of, amount, unit in figures:
        first, second = statistics.median(map(of, before)), statistics.median(map(of, after))
        is_flat = second <= max(first * (1 + _GROWTH), first + amount)
        found.append((name, is_flat, f"{first:.1f} {unit}, then {second:.1f} {unit}"))
    return found


def _stop(connection: psycopg.Connection, workers: Sequence[Worker]) -> bool:
    connection.execute("UPDATE embedline.worker SET stop_requested = true WHERE NOT stop_requested")
    return not any(worker.is_alive() for worker in workers)


def soak(cluster: Cluster, seconds: float) -> Soak:
    """Run it on a server that has Embedline and static-256."""
    with contextlib.closing(psycopg.connect(cluster.dsn(), autocommit=True)) as connection:
        connection.execute("CREATE EXTENSION pgstattuple")
        connection.execute("CREATE TABLE page (id bigint PRIMARY KEY, body text)")
        insert_rows(connection, 1, ROWS)
        create_pipeline(connection, content="body", chunking="none", index_method="none")
        settle(connection, 120)
        rested = threading.Event()
        workers = [Worker(cluster.dsn(), rested, seconds=_WORKER_SECONDS) for _ in range(WORKERS)]
        with running(workers, rested):
            wait_until(lambda: all(worker.pid for worker in workers), 30, "the workers work")
            run = Soak(cluster, seconds, workers)
            run.run()
            rested.set()
            # A CALL lasts up to two minutes, and one may just be beginning.
            wait_until(lambda: _stop(connection, workers), 60, "the workers have ended in order")
        settle(connection, 120)
        rows = assert_exact(connection)
    print(f"{run.written} writes; {rows} rows, each with the vector of its text")
    return run


def main() -> int:
    """Run the soak from a shell; return the number to exit with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    seconds = parser.parse_args().seconds
    if seconds < 60 * _LEAST_MINUTES:
        parser.error(f"a verdict needs {_LEAST_MINUTES} minutes")
    settings = {"synchronous_commit": "on", "full_page_writes": "on", "fsync": "on", "autovacuum_naptime": "10s"}
    cluster = throwaway.start_server(settings)
    try:
        install(cluster.dsn(), models=("static-256",))
        run = soak(cluster, seconds)
    finally:
        throwaway.remove_server(cluster)
    # The last minute is not a whole one.
    minutes = run.minutes[: int(seconds // 60)]
    print(f"writes began late by p95 {sorted(run.late_ms)[int(len(run.late_ms) * 0.95)]:.1f} ms")
    judged = verdict(minutes)
    for name, is_flat, told in judged:
        print(f"{name:<26}{'flat' if is_flat else 'GROWS'}: {told}")
    return 0 if all(is_flat for _, is_flat, _ in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
