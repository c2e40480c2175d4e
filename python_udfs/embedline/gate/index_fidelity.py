"""Measure index fidelity: the share of the exact results that vector indexes find.

Both use the same vectors, so no labels are needed. The index that search uses decides. Shadow indexes of less precision
are measured beside it, each as search would use it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedline.catalog import progress
from embedline.catalog.values import Pipeline
from embedline.core import statistics
from embedline.core.retrieval_metrics import recall_by_distance
from embedline.core.sql_text import quote_literal
from embedline.core.statistics import Verdict
from embedline.errors import NotReady
from embedline.indexes import lists, precision
from embedline.indexes.definitions import VectorIndex
from embedline.postgres.session import Session
from embedline.search.exact_ranking import nearest_distances
from embedline.search.query_batches import QueryVectors
from embedline.search.ranking import Ranker

# Most queries measured. The mean's standard error is then below 0.01, because a query's recall has a deviation of about
# 0.1.
MAX_QUERIES = 200
# Values of ef_search to try for the advice if the index is too poor.
_EF_SEARCHES = (80, 160, 320, 640, 1000)


@dataclass(frozen=True)
class IndexFigures:
    """The figures of one index.

    They are mean recall@k with its interval, the seconds of each search, and its bytes. `name` is None for the column's
    own.
    """

    name: str | None
    index: str
    recall: float
    low: float
    high: float
    seconds: tuple[float, ...]
    bytes: int


@dataclass(frozen=True)
class Fidelity:
    """The verdict on the index that search uses, and the figures of all.

    `chosen` is None if search is exact.
    """

    verdict: Verdict
    detail: str
    chosen: IndexFigures | None = None
    figures: tuple[IndexFigures, ...] = ()


@dataclass(frozen=True)
class _Sample:
    """Some of the queries with their exact results.

    `exact` are the k smallest distances of each in order, shape (queries, k).
    """

    vectors: list[str]
    exact: npt.NDArray[np.float64]
    k: int


def require_index(session: Session, pipeline: Pipeline) -> None:
    """Raise NotReady if the version should have an index and it is not valid."""
    version = pipeline.version
    if version.index_method == "none":
        return
    if not any(candidate.name is None for candidate in precision.candidates(session, pipeline)):
        raise NotReady(
            f'version {version.number} of pipeline "{pipeline.name}" has no valid vector index yet',
            hint=f"SELECT embedline.build_vector_index('{pipeline.name}', {version.number});",
        )


def measure(
    session: Session, pipeline: Pipeline, queries: QueryVectors, k: int, min_recall: float, seed: int
) -> Fidelity:
    """Measure the version's indexes with sampled queries.

    If search uses no index, it is exact and passes.
    """
    found = precision.candidates(session, pipeline)
    chosen_name = precision.chosen_index(session, pipeline).precision
    usable = np.flatnonzero(queries.usable)
    if not found or len(usable) == 0:
        if found:
            return Fidelity("inconclusive", "the model gives no query a direction")
        return Fidelity("pass", "no vector index: search is exact")
    chosen = np.sort(np.random.default_rng(seed).permutation(usable)[:MAX_QUERIES])
    exact = nearest_distances(session, pipeline, queries.matrix[chosen], k)
    sample = _Sample([queries.literal(int(query)) for query in chosen], exact, k)
    figures = tuple(_figures(session, pipeline, candidate, sample, seed) for candidate in found)
    deciding = next((f for f in figures if f.name == chosen_name), None)
    if deciding is None:
        return Fidelity("pass", "no index of the column itself: search is exact", None, figures)
    verdict: Verdict = (
        "pass" if deciding.recall >= min_recall else "fail" if deciding.high < min_recall else "inconclusive"
    )
    index = next(c.index for c in found if c.name == chosen_name)
    how = (
        "as the planner does"
        if _is_used(session, pipeline, index, sample)
        else "forced: the planner takes exact search for so few rows"
    )
    detail = f"{deciding.index}, {how}; {len(chosen)} queries; at least {min_recall:g} is asked for"
    if verdict != "pass":
        detail += _advice(session, pipeline, index, sample, min_recall)
    return Fidelity(verdict, detail, deciding, figures)


def _figures(
    session: Session, pipeline: Pipeline, candidate: precision.Candidate, sample: _Sample, seed: int
) -> IndexFigures:
    index = candidate.index
    with _index_forced(session):
        if not _is_used(session, pipeline, index, sample):
            raise NotReady(
                f'the planner cannot use index "{index.name}"',
                hint=f"SELECT * FROM embedline.index_progress('{pipeline.name}'); shows the indexes.",
            )
        recalls, seconds = _ask(Ranker(session, pipeline, index=index, ranks_new=False), sample)
    low, high = statistics.mean_interval(recalls, seed)
    return IndexFigures(candidate.name, index.name, float(recalls.mean()), low, high, tuple(seconds), candidate.bytes)


def _ask(ranker: Ranker, sample: _Sample) -> tuple[npt.NDArray[np.float64], list[float]]:
    """Return recall@k and seconds of each query, as search answers it.

    Recall goes by distances, because equal vectors may stand in for each other. ann-benchmarks counts it so: Aumüller,
    Bernhardsson and Faithfull, Information Systems 87 (2020), section 3.6.
    """
    recalls, seconds = np.zeros(len(sample.vectors)), []
    ranker.nearest(sample.vectors[0], sample.k)  # warm
    for position, vector in enumerate(sample.vectors):
        progress.report(ranker.session, "measuring the index", position, len(sample.vectors))
        began = time.perf_counter()
        rows = ranker.nearest(vector, sample.k)
        seconds.append(time.perf_counter() - began)
        recalls[position] = recall_by_distance([row["distance"] for row in rows], sample.exact[position])
    return recalls, seconds


def _advice(session: Session, pipeline: Pipeline, index: VectorIndex, sample: _Sample, min_recall: float) -> str:
    if index.method == "ivfflat":
        return _list_advice(session, pipeline, index, sample, min_recall)
    with _index_forced(session):
        for ef_search in _EF_SEARCHES:
            recall = float(_ask(Ranker(session, pipeline, ef_search, index, ranks_new=False), sample)[0].mean())
            if recall >= min_recall:
                return f"; search(..., ef_search => {ef_search}) has {recall:.3f}"
    if index.precision is not None:
        # The whole vectors rank its candidates, so they cannot repair a candidate that it misses.
        return f"; no ef_search reaches it: add the index again with oversampling above {index.oversampling:g}"
    return "; no ef_search reaches it: build the index with a larger m or ef_construction"


def _list_advice(session: Session, pipeline: Pipeline, index: VectorIndex, sample: _Sample, min_recall: float) -> str:
    # With all lists probed the ranking is exact, so some number of them is enough.
    all_lists = lists.list_count(session, index)
    with _index_forced(session):
        for probes in (*(2**power for power in range(all_lists.bit_length()) if 2**power < all_lists), all_lists):
            recall = float(_ask(Ranker(session, pipeline, probes, index, ranks_new=False), sample)[0].mean())
            if recall >= min_recall:
                break
    return (
        f"; {probes} probes of {all_lists} lists have {recall:.3f}:"
        f" SELECT * FROM embedline.verify({quote_literal(pipeline.name)}); measures the probes again"
    )


def _is_used(session: Session, pipeline: Pipeline, index: VectorIndex, sample: _Sample) -> bool:
    plan = Ranker(session, pipeline, index=index, ranks_new=False).plan(sample.vectors[0], sample.k)
    return json.dumps(index.name) in plan


@contextmanager
def _index_forced(session: Session) -> Iterator[None]:
    """Make the planner use the index even if a table is small enough to be read whole."""
    settings: Sequence[str] = ("enable_seqscan", "enable_sort")
    for name in settings:
        session.query("SELECT set_config($1, 'off', true)", ["text"], name)
    try:
        yield
    finally:
        for name in settings:
            session.query("SELECT set_config($1, 'on', true)", ["text"], name)
