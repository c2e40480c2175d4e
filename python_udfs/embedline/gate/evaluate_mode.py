"""Compare what a version's search finds by another mode with what it finds now.

The model, the vectors and the index are the same, so their fidelity is not measured. Labelled queries are needed: known items
are made from the words of the chunks, which decides for keywords before anything is measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedline.catalog import progress
from embedline.catalog.values import Pipeline
from embedline.core import statistics
from embedline.core.scores import score_rankings
from embedline.errors import InvalidParameter
from embedline.gate import report
from embedline.gate.options import GateOptions
from embedline.gate.queries import QuerySet, load_queries
from embedline.gate.report import Row
from embedline.postgres.session import Session
from embedline.search.modes import find_documents
from embedline.search.query_batches import QueryVectors, embed_queries
from embedline.search.request import MODES


@dataclass(frozen=True)
class ModeComparison:
    """What a comparison of two modes has shown."""

    verdict: statistics.Verdict
    queries: QuerySet
    rows: list[Row]


def compare_mode(
    session: Session, pipeline: Pipeline, mode: str, canaries: str | None, options: GateOptions
) -> ModeComparison:
    """Ask all canaries by the version's mode and by `mode`, in turns."""
    before = pipeline.version.search_mode
    if mode not in MODES:
        raise InvalidParameter(f'mode "{mode}" is not known', hint=f"Use one of {', '.join(MODES)}.")
    if mode == before:
        raise InvalidParameter(
            f'version {pipeline.version.number} of pipeline "{pipeline.name}" is searched by mode "{mode}" already',
            hint=f"Compare it with one of {', '.join(other for other in MODES if other != before)}.",
        )
    if canaries is None:
        raise InvalidParameter(
            "modes are compared by labelled queries; queries made from the corpus would favour keywords",
            hint="Give a table: evaluate(…, canaries => 'canary'), with columns query, key and grade.",
        )
    progress.report(session, "reading the queries", 0, None)
    queries = load_queries(session, [pipeline], canaries, options.query_count, options.breakdown, options.seed)
    vectors = embed_queries(session, pipeline, queries.texts)
    keys, seconds = _ask(session, pipeline, (before, mode), queries, vectors, options.k)
    scores = [score_rankings(keys[m], queries.grades, options.k) for m in (before, mode)]
    compared = statistics.judge_columns(scores[0], scores[1], options.margin, options.seed)
    verdict = compared[statistics.DECIDING].verdict
    rows = [
        Row("verdict", verdict=verdict, detail=f"old is {before}, new is {mode}; {queries.note}"),
        *report.quality_rows(compared, options.k, options.margin, queries.more_come_from),
        report.overlap_row(keys[before], keys[mode], options.k),
    ]
    if options.breakdown is not None:
        rows += report.group_rows(scores[0], scores[1], queries.groups, options.breakdown, options)
    detail = f"the best chunks of documents, {len(queries.texts)} queries, without their embedding"
    rows += report.latency_rows("search", seconds[before], seconds[mode], detail)
    return ModeComparison(verdict, queries, rows)


def _ask(
    session: Session, pipeline: Pipeline, modes: Sequence[str], queries: QuerySet, vectors: QueryVectors, k: int
) -> tuple[dict[str, list[list[str]]], dict[str, list[float]]]:
    """Return the keys that each mode finds for each query, and the seconds."""
    keys: dict[str, list[list[str]]] = {mode: [] for mode in modes}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number, text in enumerate(queries.words):
        progress.report(session, "ranking the queries", number, len(queries.texts))
        literal = vectors.literal(number) if vectors.usable[number] else None
        for mode in modes:
            began = time.perf_counter()
            keys[mode].append(find_documents(session, pipeline, mode, text, literal, k))
            seconds[mode].append(time.perf_counter() - began)
    return keys, seconds


def evidence_of(pipeline: Pipeline, mode: str, canaries: str | None, compared: ModeComparison) -> dict[str, Any]:
    """Return what is stored of a comparison."""
    return {
        "canaries": canaries, "queries": compared.queries.note, "mode": mode, "keyword": pipeline.keyword,
        "models": [pipeline.version.model.config.name], "rows": [row.as_dict() for row in compared.rows],
    }  # fmt: skip
