"""Read and write while the demo upgrades the model."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

READERS = 2
_READ_SECONDS = 0.05
_WRITE_SECONDS = 1.0
# Cosine between a chunk asked for and the best row, below which query and rows are of two models. all-MiniLM-L6-v2 and
# bge-small gave 0.96 and more to a chunk of their own, and 0.36 at most to vectors of the other.
_MIXED_COSINE = 0.42
# Chunks of a few sentences: long enough to be like no other, short enough to be embedded in milliseconds.
_PROBES = "SELECT chunk FROM {view} WHERE length(chunk) BETWEEN 40 AND 400 ORDER BY chunk LIMIT 50"


@dataclass
class Tally:
    """The observations of readers and the writer.

    Times are of time.monotonic, in seconds.
    """

    reads: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    mixed: int = 0
    writes: int = 0

    @property
    def longest(self) -> float:
        """Return the longest time of a read."""
        return max((seconds for _, seconds in self.reads), default=0.0)

    def longest_between(self, begin: float, end: float) -> float:
        """Return the longest time of a read that overlaps a span of time."""
        return max((s for start, s in self.reads if start < end and start + s > begin), default=0.0)


class LiveTraffic:
    """Context in which two readers search and a writer edits pages.

    The readers rank through the routing view and by search.
    """

    def __init__(self, dsn: str, table: str, pages: Sequence[str], questions: Sequence[str]) -> None:
        self.tally = Tally()
        self._dsn, self._table, self._pages, self._questions = dsn, table, pages, questions
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._read, args=(seed,), daemon=True) for seed in range(READERS)]
        self._threads.append(threading.Thread(target=self._write, daemon=True))

    def __enter__(self) -> LiveTraffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def _read(self, seed: int) -> None:
        draw = random.Random(seed)
        # Both models have the same width, so only the vectors tell if a query met the rows of another model.
        routing_view = sql.Identifier("public", f"{self._table}_embedding")
        view = sql.SQL(
            "WITH asked AS MATERIALIZED (SELECT embedline.embed_query({pipeline}, %(text)s) AS vector)"
            " SELECT 1 - (embedding <=> (SELECT vector FROM asked)) FROM {view}"
            " ORDER BY embedding <=> (SELECT vector FROM asked) LIMIT 5"
        ).format(pipeline=sql.Literal(self._table), view=routing_view)
        search = sql.SQL("SELECT score FROM embedline.search({pipeline}, %(text)s, 5)").format(
            pipeline=sql.Literal(self._table)
        )
        with psycopg.connect(self._dsn, autocommit=True, application_name="embedline demo reader") as connection:
            probes = [row[0] for row in connection.execute(sql.SQL(_PROBES).format(view=routing_view))]
            connection.execute(view, {"text": "warm"})
            while not self._stop.wait(draw.uniform(0, 2 * _READ_SECONDS)):
                is_probe = draw.random() < 0.5
                statement, texts = (view, probes) if is_probe else (search, self._questions)
                start = time.monotonic()
                try:
                    rows = connection.execute(statement, {"text": draw.choice(texts)}, prepare=True).fetchall()
                except psycopg.Error as error:
                    with self._lock:
                        self.tally.failures.append(str(error))
                    continue
                with self._lock:
                    self.tally.reads.append((start, time.monotonic() - start))
                    self.tally.mixed += is_probe and bool(rows) and rows[0][0] < _MIXED_COSINE
                    if not rows:
                        self.tally.failures.append("a search found nothing")

    def _write(self) -> None:
        draw = random.Random(7)
        update = sql.SQL("UPDATE {} SET body = body || %s WHERE page = %s").format(
            sql.Identifier("public", self._table)
        )
        with psycopg.connect(self._dsn, autocommit=True, application_name="embedline demo writer") as connection:
            while not self._stop.wait(draw.uniform(0, 2 * _WRITE_SECONDS)):
                note = f"\n\nRevised, for the {self.tally.writes + 1}th time in this demo."
                connection.execute(update, (note, draw.choice(self._pages)))
                self.tally.writes += 1
