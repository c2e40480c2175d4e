"""Index fidelity: how much of what exact search finds the version's HNSW index finds, on the same vectors. Needs no labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedline import gate
from embedline.catalog import Pipeline
from embedline.database import Session
from embedline.errors import NotReady
from embedline.exact_search import nearest_distances
from embedline.gate import Verdict
from embedline.ranking import QueryVectors, distance_expression, set_ef_search, version_view

# Queries measured at most: the mean's standard error is then below 0.01 (a query's recall has a deviation of about 0.1).
MAX_QUERIES = 200
# Two distances are the same within this: pgvector adds up in float32.
_SAME_DISTANCE = 1e-5
# Tried for the advice where the index is too poor.
_EF_SEARCHES = (80, 160, 320, 640, 1000)

_INDEXES = """
    SELECT c.relname AS name, i.indisvalid AS valid FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_am AS a ON a.oid = c.relam
    JOIN pg_class AS t ON t.oid = i.indrelid JOIN pg_namespace AS n ON n.oid = t.relnamespace
    WHERE n.nspname = 'embedline_data' AND t.relname = $1 AND a.amname = 'hnsw' AND i.indexprs IS NULL
    ORDER BY i.indisvalid DESC, c.relname
"""


@dataclass(frozen=True)
class Fidelity:
    """Mean recall@k of the index with its interval over so many queries; recall is None where search is exact."""

    verdict: Verdict
    detail: str
    recall: float | None = None
    low: float | None = None
    high: float | None = None
    queries: int = 0
    index: str | None = None


def require_index(session: Session, pipeline: Pipeline) -> str | None:
    """Return the name of the valid index of the version's own column; None where it is to have none. Raises NotReady."""
    version = pipeline.version
    if version.index_method == "none":
        return None
    rows = session.query(_INDEXES, ["text"], f"{pipeline.name}_v{version.number}")
    if not rows or not rows[0]["valid"]:
        raise NotReady(
            f'version {version.number} of pipeline "{pipeline.name}" has no valid vector index yet',
            hint=f"SELECT embedline.build_vector_index('{pipeline.name}', {version.number});",
        )
    return str(rows[0]["name"])


def measure(
    session: Session, pipeline: Pipeline, queries: QueryVectors, k: int, min_recall: float, seed: int
) -> Fidelity:
    """Measure the index as search uses it, with sampled queries; a version without one is searched exactly and passes."""
    index = require_index(session, pipeline)
    if index is None:
        return Fidelity("pass", "index_method none: search is exact")
    usable = np.flatnonzero(queries.usable)
    if len(usable) == 0:
        return Fidelity("inconclusive", "the model gives no query a direction", index=index)
    chosen = np.sort(np.random.default_rng(seed).permutation(usable)[:MAX_QUERIES])
    exact = nearest_distances(session, pipeline, queries.matrix[chosen], k)
    is_preferred = _uses(session, pipeline, index, queries.literal(int(chosen[0])), k)
    with _index_forced(session):
        if not _uses(session, pipeline, index, queries.literal(int(chosen[0])), k):
            raise NotReady(
                f'the planner cannot use index "{index}" for version {pipeline.version.number} of "{pipeline.name}"',
                hint=f"SELECT embedline.index_statement('{pipeline.name}', {pipeline.version.number}); shows the index it needs.",
            )
        set_ef_search(session, k)
        recalls = _recalls(session, pipeline, queries, chosen, k, exact)
        fidelity = _judge(recalls, min_recall, seed, index)
        advice = "" if fidelity.verdict == "pass" else _advice(session, pipeline, queries, chosen, k, exact, min_recall)
    how = "as the planner does" if is_preferred else "forced: the planner takes exact search for so few rows"
    detail = f"{index}, {how}; {len(chosen)} queries; at least {min_recall:g} is asked for{advice}"
    return Fidelity(fidelity.verdict, detail, fidelity.recall, fidelity.low, fidelity.high, len(chosen), index)


def _judge(recalls: npt.NDArray[np.float64], min_recall: float, seed: int, index: str) -> Fidelity:
    """A mean that is high enough passes; one that is too low fails only where that is not the sample's chance."""
    low, high = gate.mean_interval(recalls, seed)
    mean = float(recalls.mean())
    verdict: Verdict = "pass" if mean >= min_recall else "fail" if high < min_recall else "inconclusive"
    return Fidelity(verdict, "", mean, low, high, len(recalls), index)


def _statement(session: Session, pipeline: Pipeline) -> str:
    distance = distance_expression(session, pipeline, "e")
    return f"SELECT {distance} AS distance FROM {version_view(session, pipeline)} AS e ORDER BY {distance} LIMIT $2"


def _recalls(
    session: Session, pipeline: Pipeline, queries: QueryVectors, chosen: npt.NDArray[np.intp], k: int,
    exact: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Return recall@k of each query by distances, so that equal vectors may stand in for each other.

    As ann-benchmarks counts it: Aumüller, Bernhardsson and Faithfull, Information Systems 87 (2020), section 3.6.
    """
    statement, wanted = _statement(session, pipeline), exact.shape[1]
    farthest = exact[:, -1] + _SAME_DISTANCE * (1 + np.abs(exact[:, -1]))
    recalls = np.zeros(len(chosen))
    for position, query in enumerate(chosen):
        rows = session.query(statement, ["text", "bigint"], queries.literal(int(query)), k)
        found = sum(float(row["distance"]) <= farthest[position] for row in rows)
        recalls[position] = min(found, wanted) / wanted
    return recalls


def _advice(
    session: Session, pipeline: Pipeline, queries: QueryVectors, chosen: npt.NDArray[np.intp], k: int,
    exact: npt.NDArray[np.float64], min_recall: float,
) -> str:  # fmt: skip
    for ef_search in _EF_SEARCHES:
        session.query("SELECT set_config('hnsw.ef_search', $1, true)", ["text"], str(ef_search))
        recall = float(_recalls(session, pipeline, queries, chosen, k, exact).mean())
        if recall >= min_recall:
            return f"; search(..., ef_search => {ef_search}) has {recall:.3f}"
    return "; no ef_search reaches it: build the index with a larger m or ef_construction"


def _uses(session: Session, pipeline: Pipeline, index: str, vector: str, k: int) -> bool:
    plan = session.query(f"EXPLAIN (FORMAT json) {_statement(session, pipeline)}", ["text", "bigint"], vector, k)
    return json.dumps(index) in str(next(iter(plan[0].values())))


@contextmanager
def _index_forced(session: Session) -> Iterator[None]:
    """Have the planner take the index also where a table is so small that it would rather read it whole."""
    settings = ("enable_seqscan", "enable_sort")
    for name in settings:
        session.query("SELECT set_config($1, 'off', true)", ["text"], name)
    try:
        yield
    finally:
        for name in settings:
            session.query("SELECT set_config($1, 'on', true)", ["text"], name)
