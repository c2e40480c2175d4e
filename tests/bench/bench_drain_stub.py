"""20,000 short rows through one worker and an HTTP stub that answers at once, against a script without any guarantee.

Ours is `CALL embedline.run_worker(until_idle => true)` in a session that has worked before, on rows that were inserted
(live changes) and on rows that were there before the pipeline (backfill). The script reads the same rows with psycopg,
asks the same stub through the openai package's async client, eight requests at a time, and writes the vectors with
COPY BINARY into a plain table: no retry, no chunk, no state, no foreign key. Requests of 512 texts were the fastest
of 100, 256, 512 and 2,048, and one transaction for all was no faster than one for each request.
"""

from __future__ import annotations

import asyncio
import base64
import statistics
import time
from typing import Any

import numpy as np
import openai
import psycopg
from harness import Bench, Figure, scalar
from pgvector.psycopg import register_vector
from rich.progress import TaskID
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

from stub_provider import StubProvider, stub_provider

ROWS = 20_000
DIMENSIONS = {384: 10_000, 1536: 4_000}
SHARE = 0.6
REQUEST_ITEMS, CONCURRENCY = 512, 8


def run(bench: Bench) -> None:
    """Drain the rows on each side in turn, for each dimension."""
    task = bench.progress.add_task("Draining", total=len(DIMENSIONS) * (bench.rounds + 1) * 3)
    for dimensions, rate in DIMENSIONS.items():
        with stub_provider(dimensions) as provider, bench.connect() as session:
            seconds = _rounds(bench, session, provider, task)
        for side in ("live", "backfill"):
            _report(bench, f"{dimensions}-d, {side}", seconds[side], seconds["script"], rate)


def _report(bench: Bench, label: str, ours: list[float], script: list[float], rate: int) -> None:
    mine, theirs = ROWS / statistics.median(ours), ROWS / statistics.median(script)
    detail = spread([ROWS / seconds for seconds in ours], ",.0f")
    bench.add(Figure(f"{label}: rate", mine, "rows/s", rate, detail, at_least=True))
    shares = [b / a for a, b in zip(ours, script, strict=True)]
    detail = f"script {theirs:,.0f} rows/s; {spread(shares)}"
    bench.add(Figure("  share of the script's rate", mine / theirs, "×", SHARE, detail, at_least=True))


def _rounds(bench: Bench, session: Session, provider: StubProvider, task: TaskID) -> dict[str, list[float]]:
    model = register_stub(session, provider)
    sides = {"live": _live, "backfill": _backfill, "script": _script}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(bench.rounds + 1):
        for side, measure in list(sides.items())[:: 1 if number % 2 else -1]:
            session.execute("DROP TABLE IF EXISTS bench_plain")
            recreate_source(session)
            elapsed = measure(bench, session, provider, model)
            if number > 0:
                seconds[side].append(elapsed)
            bench.progress.update(task, advance=1)
    return seconds


def _live(bench: Bench, session: Session, provider: StubProvider, model: str) -> float:
    create_pipeline(session, model)
    fill(session, range(1, ROWS + 1))
    return _work(session, provider)


def _backfill(bench: Bench, session: Session, provider: StubProvider, model: str) -> float:
    fill(session, range(1, ROWS + 1))
    create_pipeline(session, model)
    return _work(session, provider)


def _work(session: Session, provider: StubProvider) -> float:
    session.execute("CHECKPOINT")
    provider.counts()
    seconds = drain(session)
    check_count(session, ROWS, provider.counts()["texts"], ROWS)
    check_vector(session, provider, 4711)
    return seconds


def _script(bench: Bench, session: Session, provider: StubProvider, model: str) -> float:
    fill(session, range(1, ROWS + 1))
    session.execute(f"CREATE TABLE bench_plain (id bigint, embedding vector({provider.dimensions}))")
    session.execute("CHECKPOINT")
    with bench.connect() as connection:
        register_vector(connection)
        seconds = asyncio.run(_timed_script(connection, provider.url))
    if scalar(session, "SELECT count(*) FROM bench_plain") != ROWS:
        raise SystemExit("the script has not stored each row")
    return seconds


async def _timed_script(connection: psycopg.Connection[Any], url: str) -> float:
    # Like ours, it has its client and connection before the clock starts.
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        await client.embeddings.create(model="stub", input=["warm"], encoding_format="base64")
        start = time.perf_counter()
        await _embed_all(connection, client)
        return time.perf_counter() - start


async def _embed_all(connection: psycopg.Connection[Any], client: openai.AsyncOpenAI) -> None:
    rows = connection.execute("SELECT id, body FROM bench_source ORDER BY id").fetchall()
    batches = [rows[i : i + REQUEST_ITEMS] for i in range(0, len(rows), REQUEST_ITEMS)]
    slots = asyncio.Semaphore(CONCURRENCY)

    async def embed(batch: list[tuple[int, str]]) -> None:
        async with slots:
            answer = await client.embeddings.create(
                model="stub", input=[body for _, body in batch], encoding_format="base64"
            )
        with connection.cursor().copy("COPY bench_plain (id, embedding) FROM STDIN WITH (FORMAT binary)") as copy:
            copy.set_types(["int8", "vector"])
            for (row_id, _), item in zip(batch, answer.data, strict=True):
                copy.write_row((row_id, np.frombuffer(base64.b64decode(str(item.embedding)), dtype="<f4")))

    await asyncio.gather(*map(embed, batches))
