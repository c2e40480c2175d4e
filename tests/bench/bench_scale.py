"""Whether the drain slows down with what is stored: 20,000 new rows where 10,000, 100,000 and 1,000,000 are embedded.

Each size has its own source and pipeline, all in one database, and rounds take the sizes in turn. The rows that are
there before were embedded by the worker itself, as a backfill. After each round the new rows are deleted and the tables
vacuumed. No vector index: with one, its own inserts would be measured.
"""

from __future__ import annotations

import statistics

from harness import Bench, Figure
from workers import (
    Session,
    check_count,
    check_vector,
    create_pipeline,
    drain,
    fill,
    recreate_source,
    register_stub,
    spread,
)

from generated_names import Generated
from stub_provider import StubProvider, stub_provider

ROWS, DIMENSIONS = 20_000, 384
SIZES = {"bench_10k": 10_000, "bench_100k": 100_000, "bench_1m": 1_000_000}
FLAT = 0.8


def run(bench: Bench) -> None:
    """Store the rows, then drain 20,000 live inserts at each size in turn, in `bench.rounds` rounds."""
    rates: dict[str, list[float]] = {pipeline: [] for pipeline in SIZES}
    with stub_provider(DIMENSIONS) as provider, bench.connect() as session:
        model = register_stub(session, provider)
        for pipeline, size in SIZES.items():
            _store(bench, session, provider, model, pipeline, size)
        task = bench.progress.add_task("Draining", total=(bench.rounds + 1) * len(SIZES))
        for number in range(bench.rounds + 1):
            for pipeline, size in list(SIZES.items())[:: 1 if number % 2 else -1]:
                seconds = _drain(session, provider, pipeline, size)
                if number > 0:
                    rates[pipeline].append(ROWS / seconds)
                bench.progress.update(task, advance=1)
    medians = {pipeline: statistics.median(found) for pipeline, found in rates.items()}
    for pipeline, size in SIZES.items():
        detail = spread(rates[pipeline], ",.0f")
        bench.add(Figure(f"{size:,} rows stored: rate", medians[pipeline], "rows/s", detail=detail))
    flatness = min(medians.values()) / max(medians.values())
    bench.add(Figure("slowest against fastest", flatness, "×", FLAT, "medians of the three sizes", at_least=True))


def _store(bench: Bench, session: Session, provider: StubProvider, model: str, pipeline: str, size: int) -> None:
    task = bench.progress.add_task(f"Embedding {size:,} rows", total=1)
    recreate_source(session, pipeline)
    fill(session, range(1, size + 1), pipeline)
    create_pipeline(session, model, pipeline)
    provider.counts()
    seconds = drain(session, pipeline)
    check_count(session, size, provider.counts()["texts"], size, pipeline)
    _vacuum(session, pipeline)
    bench.add(Figure(f"backfill of {size:,} rows: rate", size / seconds, "rows/s"))
    bench.progress.update(task, advance=1)


def _drain(session: Session, provider: StubProvider, pipeline: str, size: int) -> float:
    new = range(size + 1, size + ROWS + 1)
    fill(session, new, pipeline)
    session.execute("CHECKPOINT")
    provider.counts()
    seconds = drain(session, pipeline)
    check_count(session, size + ROWS, provider.counts()["texts"], ROWS, pipeline)
    check_vector(session, provider, new[0], pipeline)
    session.execute(f"DELETE FROM {pipeline}_source WHERE id >= %s", (new[0],))
    _vacuum(session, pipeline)
    return seconds


def _vacuum(session: Session, pipeline: str) -> None:
    generated = (f"{Generated(pipeline)(table)}" for table in ("document", "chunk", "v1", "inbox", "claim"))
    session.execute(f"VACUUM ANALYZE {pipeline}_source, {', '.join(generated)}")
