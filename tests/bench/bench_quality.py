"""What search finds by vectors, by keywords and by both, on labelled queries, with intervals of 95 %.

Beside it is PostgreSQL's own ranking of words, ts_rank_cd, with the query's words joined by OR, and that ranking fused with the
vectors by reciprocal ranks.

The manual's own index gives the queries: each term, and the pages that its entry names. Other collections are measured where
their files are given, in the form of BEIR (corpus.jsonl, queries.jsonl, qrels/test.tsv; github.com/beir-cellar/beir):
EMBEDLINE_BENCH_COLLECTIONS=/data/cranfield,/data/scifact. EMBEDLINE_BENCH_MODEL names another model for these.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import Bench, Figure, scalar
from workers import Session

from embedline.client import build_index
from embedline.core import statistics
from embedline.core.scores import score_rankings
from embedline.dev.demo.manual import manual_folder, read_index_terms, read_pages

MODES, K = ("vector", "keyword", "hybrid"), 10
RECALL, NDCG = (statistics.MEASURES.index(measure) for measure in ("recall", "ndcg"))
# Promised recall@10 on the manual.
PROMISED = {"keyword": 0.89, "hybrid": 0.90}
WORDS, FUSED, WINDOW, RRF_K = "ts_rank_cd", "vector and ts_rank_cd", 50, 60
_PREPARE_WORDS = """
    CREATE TABLE bench_words AS SELECT id, to_tsvector('english', chunk) AS words FROM bench_embedding;
    CREATE INDEX ON bench_words USING gin (words);
    ANALYZE bench_words
"""
_BY_WORDS = """
    SELECT w.id FROM bench_words AS w, (
        SELECT string_agg(quote_literal(u.lexeme), ' | ')::tsquery AS query FROM unnest(to_tsvector('english', %s)) AS u
    ) AS q WHERE w.words @@ q.query GROUP BY w.id ORDER BY max(ts_rank_cd(w.words, q.query)) DESC, w.id LIMIT %s
"""


@dataclass(frozen=True)
class Collection:
    """Documents by key, and queries with the grades of the keys that answer them."""

    name: str
    documents: Mapping[str, str]
    queries: Mapping[str, Mapping[str, float]]


def run(bench: Bench) -> None:
    """Measure the manual, then the collections that are given."""
    given = [Path(folder) for folder in os.environ.get("EMBEDLINE_BENCH_COLLECTIONS", "").split(",") if folder]
    with bench.connect() as session:
        _measure(bench, session, _manual(session), "static-256", PROMISED)
        for folder in given:
            _measure(bench, session, _read(folder), os.environ.get("EMBEDLINE_BENCH_MODEL", "minilm"), {})


def _manual(session: Session) -> Collection:
    folder = manual_folder(session.info.server_version // 10000)
    pages = {page.name: f"{page.title}\n\n{page.body}" for page in read_pages(folder)}
    terms = {term: {page: 1.0 for page in found & pages.keys()} for term, found in read_index_terms(folder).items()}
    return Collection("manual", pages, {term: grades for term, grades in terms.items() if grades})


def _read(folder: Path) -> Collection:
    documents = {
        str(row["_id"]): f"{row.get('title') or ''}\n\n{row['text']}".strip() for row in _rows(folder / "corpus.jsonl")
    }
    texts = {str(row["_id"]): str(row["text"]) for row in _rows(folder / "queries.jsonl")}
    queries: dict[str, dict[str, float]] = {}
    with (folder / "qrels" / "test.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if float(row["score"]) > 0 and row["corpus-id"] in documents:
                queries.setdefault(texts[row["query-id"]], {})[row["corpus-id"]] = float(row["score"])
    return Collection(folder.name, documents, queries)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def _measure(bench: Bench, session: Session, collection: Collection, model: str, promised: Mapping[str, float]) -> None:
    _embed(bench, session, collection, model)
    grades = [dict(wanted) for wanted in collection.queries.values()]
    found: dict[str, list[list[str]]] = {mode: [] for mode in (*MODES, WORDS, FUSED)}
    task = bench.progress.add_task(f"Asking {collection.name}", total=len(grades))
    search = "SELECT key FROM embedline.search('bench', %s, %s, per_document => true, mode => %s)"
    for query in collection.queries:
        for mode in MODES:
            found[mode].append([key for (key,) in session.execute(search, (query, K, mode))])
        words = [key for (key,) in session.execute(_BY_WORDS, (query, WINDOW))]
        vectors = [key for (key,) in session.execute(search, (query, WINDOW, "vector"))]
        found[WORDS].append(words[:K])
        found[FUSED].append(_fused(vectors, words)[:K])
        bench.progress.update(task, advance=1)
    scores = {mode: score_rankings(rankings, grades, K) for mode, rankings in found.items()}
    for mode, of_mode in scores.items():
        recall, ndcg = of_mode[:, RECALL], of_mode[:, NDCG]
        detail = f"{_interval(recall)}; nDCG@{K} {np.mean(ndcg):.3f} {_interval(ndcg)}; {len(grades)} queries"
        label = f"{collection.name}, {model}, {mode}: recall@{K}, %"
        limit = promised.get(mode)
        bench.add(Figure(label, float(np.mean(recall)) * 100, "%", limit and limit * 100, detail, at_least=True))
    for mode in ("keyword", "hybrid"):
        compared = statistics.judge(scores["vector"][:, NDCG], scores[mode][:, NDCG], 0.0)
        detail = f"from {compared.low * 100:+.1f} to {compared.high * 100:+.1f} points"
        label = f"{collection.name}: nDCG@{K} of {mode} beyond vector, points"
        bench.add(Figure(label, compared.difference * 100, "", None, detail))


def _fused(*rankings: list[str]) -> list[str]:
    """Return the keys by the sum of their reciprocal ranks."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, 1):
            scores[key] = scores.get(key, 0.0) + 1 / (RRF_K + rank)
    return sorted(scores, key=lambda key: -scores[key])


def _interval(scores: statistics.FloatArray) -> str:
    low, high = statistics.mean_interval(scores)
    return f"[{low:.3f}, {high:.3f}]"


def _embed(bench: Bench, session: Session, collection: Collection, model: str) -> None:
    if scalar(session, "SELECT count(*) FROM embedline.pipeline WHERE name = 'bench'"):
        session.execute("SELECT embedline.drop_pipeline('bench')")
    session.execute("DROP TABLE IF EXISTS bench_document, bench_words")
    session.execute("CREATE TABLE bench_document (id text PRIMARY KEY, body text NOT NULL)")
    with session.cursor().copy("COPY bench_document (id, body) FROM STDIN") as copy:
        for row in collection.documents.items():
            copy.write_row(row)
    session.execute(
        "SELECT embedline.create_pipeline('bench', 'bench_document', 'body', %s, keyword => 'english')", (model,)
    )
    task = bench.progress.add_task(f"Embedding {collection.name}", total=len(collection.documents))
    while embedded := scalar(session, "SELECT embedline.embed_pending(200, 'bench')"):
        bench.progress.update(task, advance=embedded)
    build_index.build(build_index.PsycopgClient(session), "bench")
    session.execute("VACUUM ANALYZE")
    session.execute(_PREPARE_WORDS)
