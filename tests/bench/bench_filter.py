"""Recall of searches with a filter, against exact ranking of the rows that it lets through, and their times.

100,000 package summaries with an HNSW index; filters let 0.1, 1, 10 and 50 % of the rows through. EMBEDLINE_BENCH_ROWS sets
the rows.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

from harness import Bench, Figure, percentile, scalar, timed
from packages import summaries
from workers import Session

from embedline.client import build_index
from embedline.core.retrieval_metrics import recall_at_k

MODEL, DEFAULT_ROWS, QUERIES, K, RECALL = "static-256", "100000", 200, 10, 0.98
# Of a thousand rows; n % 1000 is drawn for each row. The last one follows the texts: packages of one kind.
SHARES = {
    "0.1 %": "n = 0",
    "1 %": "n < 10",
    "10 %": "n < 100",
    "50 %": "n < 500",
    "packages of libraries": "body ILIKE '%%librar%%'",
}
EXACT = """
    SELECT id::text FROM bench_embedding WHERE {0}
    ORDER BY (embedding <=> (SELECT embedline.embed_query('bench', %s))) + 0::float8, id LIMIT %s
"""


def run(bench: Bench) -> None:
    """Embed the summaries, then compare each filter's results with exact ones."""
    rows = int(os.environ.get("EMBEDLINE_BENCH_ROWS", DEFAULT_ROWS))
    texts = summaries(rows + QUERIES).texts
    with bench.connect() as session:
        _embed(bench, session, texts[:rows])
        plain = [timed(lambda q=query: _search(session, q, None)) * 1000 for query in texts[rows:]]
        bench.add(
            Figure("no filter: p95", percentile(plain, 0.95), "ms", None, f"median {statistics.median(plain):.1f} ms")
        )
        for label, condition in SHARES.items():
            _measure(bench, session, label, condition, texts[rows:])


def _measure(bench: Bench, session: Session, label: str, condition: str, queries: list[str]) -> None:
    shares, seconds = [], []
    for query in queries:
        found: list[tuple[Any, ...]] = []
        seconds.append(timed(lambda q=query, into=found: into.extend(_search(session, q, condition))) * 1000)
        exact = [key for (key,) in session.execute(EXACT.format(condition), (query, K))]
        shares.append(recall_at_k([key for (key,) in found], set(exact), K))
    plan = session.execute(
        "SELECT chunk FROM embedline.search('bench', 'a query', filter => %s, explain => true)",
        (condition.replace("%%", "%"),),
    ).fetchall()
    way = "by the index" if any("embedding_idx" in line for (line,) in plan) else "exactly"
    detail = f"{way}; median {statistics.median(seconds):.1f} ms, p95 {percentile(seconds, 0.95):.1f} ms"
    bench.add(
        Figure(
            f"filter {label}: recall@{K}, %",
            statistics.mean(shares) * 100,
            "%",
            RECALL * 100,
            detail,
            at_least=True,
        )
    )


def _search(session: Session, query: str, condition: str | None) -> list[tuple[Any, ...]]:
    statement = "SELECT key FROM embedline.search('bench', %s, %s, filter => %s)"
    return session.execute(statement, (query, K, condition and condition.replace("%%", "%"))).fetchall()


def _embed(bench: Bench, session: Session, texts: list[str]) -> None:
    session.execute("CREATE TABLE bench_text (id bigint PRIMARY KEY, body text NOT NULL, n integer NOT NULL)")
    with session.cursor().copy("COPY bench_text (id, body, n) FROM STDIN") as copy:
        for number, text in enumerate(texts):
            copy.write_row((number, text, number * 7919 % 1000))
    session.execute("SELECT embedline.create_pipeline('bench', 'bench_text', 'body', %s)", (MODEL,))
    task = bench.progress.add_task("Embedding", total=len(texts))
    while embedded := scalar(session, "SELECT embedline.embed_pending(1000, 'bench')"):
        bench.progress.update(task, advance=embedded)
    bench.progress.update(task, description="Building the index")
    build_index.build(build_index.PsycopgClient(session), "bench")
    session.execute("VACUUM ANALYZE")
    bench.progress.remove_task(task)
