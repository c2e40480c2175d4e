"""Run the gate of a version: index fidelity, and its model's quality.

Quality is compared with the serving version. The evidence is stored.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from embedline.catalog import progress
from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.values import Pipeline, Version
from embedline.core import statistics
from embedline.core.processes import prepare_environment
from embedline.core.scores import score_rankings
from embedline.core.statistics import FloatArray, Verdict
from embedline.errors import NotReady
from embedline.gate import report
from embedline.gate.evaluate_mode import compare_mode, evidence_of
from embedline.gate.index_fidelity import Fidelity, measure, require_index
from embedline.gate.options import GateOptions
from embedline.gate.queries import QuerySet, load_queries
from embedline.gate.report import Row
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.queue.coverage import missing_chunks
from embedline.search.query_batches import DocumentSearch, QueryVectors, embed_queries, embedding_seconds, rank_all

# Queries whose embedding is timed, one at a time as search does it.
_TIMED_QUERIES = 30

# Largest shares of missing chunks, because gaps would decide. A small table under steady writes always has some in
# flight.
_MOST_MISSING, _MOST_ON_THEIR_WAY = 0.01, 0.1
_MISSING = """
    SELECT missing - dead_letters AS missing, chunks FROM embedline.versions WHERE pipeline = $1 AND version = $2
"""
# Not stored, because it is no evidence. Then cutover needs no gate.
_NOTHING = Row("verdict", verdict="inconclusive", detail="the pipeline has no chunks: there is nothing to measure")
_RECORD = """
    INSERT INTO embedline.evaluation (pipeline_id, version_id, baseline_number, baseline_version_id, baseline_fingerprint,
        kind, verdict, fidelity_verdict, quality_verdict, query_source, query_count, k, margin, seed, fingerprint, evidence)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
"""
_RECORD_TYPES = [
    *("bigint", "bigint", "integer", "bigint", "text", "text", "text", "text", "text", "text", "integer", "integer"),
    *("double precision", "bigint", "text", "jsonb"),
]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is to be stored.

    `verdicts` are the whole, the index's and the quality's.
    """

    kind: Literal["gate", "preview", "mode"]
    verdicts: tuple[Verdict, Verdict, Verdict]
    queries: QuerySet
    options: GateOptions
    fingerprint: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class _Subject:
    """A version with its queries' vectors and its answers."""

    pipeline: Pipeline
    vectors: QueryVectors
    search: DocumentSearch

    def scores(self, queries: QuerySet, k: int) -> FloatArray:
        """Return the measures of each query, shape (queries, measures)."""
        return score_rankings(self.search.rankings.keys, queries.grades, k)


@entry_point
def evaluate(
    session: Session, pipeline_name: str, version_number: int, canaries: str | None, k: int, margin: float,
    query_count: int, breakdown: str | None, seed: int, min_recall: float, mode: str | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure a version against the serving one and store the evidence.

    With a mode, the version's search by that mode is measured against its search as it is now. Returns the rows that a
    person reads.
    """
    require_given(k=k, margin=margin, query_count=query_count, seed=seed, min_recall=min_recall)
    options = GateOptions(k, margin, query_count, breakdown, seed, min_recall)
    prepare_environment()
    new = load_version(session, pipeline_name, version_number)
    with progress.reported(session, "evaluate", new):
        if mode is not None:
            return _evaluate_mode(session, new, mode, canaries, options)
        return _evaluate(session, new, canaries, options)


def _evaluate_mode(
    session: Session, pipeline: Pipeline, mode: str, canaries: str | None, options: GateOptions
) -> list[dict[str, Any]]:
    _require_complete(session, pipeline)
    compared = compare_mode(session, pipeline, mode, canaries, options)
    # The index is the same on both sides.
    verdicts: tuple[Verdict, Verdict, Verdict] = (compared.verdict, "pass", compared.verdict)
    evidence = evidence_of(pipeline, mode, canaries, compared)
    of_mode = Evaluation("mode", verdicts, compared.queries, options, pipeline.version.fingerprint, evidence)
    record(session, pipeline, pipeline.version, of_mode)
    return [row.as_dict() for row in compared.rows]


def _evaluate(session: Session, new: Pipeline, canaries: str | None, options: GateOptions) -> list[dict[str, Any]]:
    pipeline_name, k, seed = new.name, options.k, options.seed
    old = load_pipeline(session, pipeline_name)
    _require_complete(session, new)
    if old.version.state != "complete":
        raise NotReady(
            f'version {old.version.number} of pipeline "{pipeline_name}", which serves, is not complete: its rows are read again',
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{pipeline_name}'; shows how far it is.",
        )
    require_index(session, new)
    if not any(_counted(session, version)["chunks"] for version in (old, new)):
        return [_NOTHING.as_dict()]
    versions = [new] if new.version.version_id == old.version.version_id else [old, new]
    progress.report(session, "reading the queries", 0, None)
    queries = load_queries(session, versions, canaries, options.query_count, options.breakdown, seed)
    subjects = _ask(session, versions, queries, k)
    measured = measure(session, new, subjects[-1].vectors, k, options.min_recall, seed)
    quality, rows = _compare(subjects, queries, options)
    verdict = report.overall(measured.verdict, quality)
    note = (
        queries.note if len(subjects) == 2 else f"this version serves, there is none to compare it with; {queries.note}"
    )
    rows = [
        report.verdict_row(verdict, measured, quality, note),
        *report.fidelity_rows(measured, k), *rows, *_latency(session, subjects, queries),
    ]  # fmt: skip
    asked = {"canaries": canaries, "queries": queries.note, "min_recall": options.min_recall}
    evidence = asked | _evidence(subjects, measured, rows)
    verdicts = (verdict, measured.verdict, quality)
    baseline = old.version if len(subjects) == 2 else None
    record(session, new, baseline, Evaluation("gate", verdicts, queries, options, new.version.fingerprint, evidence))
    return [row.as_dict() for row in rows]


def _require_complete(session: Session, pipeline: Pipeline) -> None:
    """Raise NotReady if the version is being filled or too far behind.

    Its rankings would show the gaps.
    """
    counted = _counted(session, pipeline)
    missing, chunks = counted["missing"], counted["chunks"]
    is_behind = missing > _MOST_MISSING * chunks and (
        missing > _MOST_ON_THEIR_WAY * chunks or missing_chunks(session, pipeline) > _MOST_MISSING * chunks
    )
    if pipeline.version.state != "complete" or is_behind:
        raise NotReady(
            f'version {pipeline.version.number} of pipeline "{pipeline.name}" is not complete yet',
            detail=f"It lacks {counted['missing']} of {counted['chunks']} vectors.",
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{pipeline.name}'; shows how far it is.",
        )


def _counted(session: Session, pipeline: Pipeline) -> dict[str, Any]:
    return session.query(_MISSING, ["text", "integer"], pipeline.name, pipeline.version.number)[0]


def _ask(session: Session, versions: Sequence[Pipeline], queries: QuerySet, k: int) -> list[_Subject]:
    vectors = [embed_queries(session, version, queries.texts) for version in versions]
    searches = [DocumentSearch(session, version, v, k) for version, v in zip(versions, vectors, strict=True)]
    rank_all(searches, len(queries.texts))
    return [_Subject(*parts) for parts in zip(versions, vectors, searches, strict=True)]


def _compare(subjects: Sequence[_Subject], queries: QuerySet, options: GateOptions) -> tuple[Verdict, list[Row]]:
    """Return the verdict on quality and its rows.

    A version that serves has nothing to be compared with.
    """
    scores = [subject.scores(queries, options.k) for subject in subjects]
    if len(subjects) == 1:
        # Never "pass": once another version serves, this row must not allow a cutover back without a gate.
        return "inconclusive", report.own_quality_rows(scores[0], options.k, options.seed)
    verdict, rows = _judge_kinds(scores, queries, options)
    found = [subject.search.rankings.keys for subject in subjects]
    rows.append(report.overlap_row(found[0], found[1], options.k))
    if options.breakdown is not None:
        rows += report.group_rows(scores[0], scores[1], queries.groups, options.breakdown, options)
    return verdict, rows


def _judge_kinds(scores: Sequence[FloatArray], queries: QuerySet, options: GateOptions) -> tuple[Verdict, list[Row]]:
    """Judge words and files apart, each by its own canaries; all of them have to pass.

    A model's towers are trained apart, and one can become worse where the other becomes better.
    """
    kinds = np.array(queries.kinds)
    verdicts: list[Verdict] = []
    rows: list[Row] = []
    for kind in dict.fromkeys(queries.kinds):
        old, new = (found[kinds == kind] for found in scores)
        compared = statistics.judge_columns(old, new, options.margin, options.seed)
        shown = report.quality_rows(compared, options.k, options.margin, queries.more_come_from)
        is_only = len(verdicts) == 0 and (kinds == kind).all()
        rows += shown if is_only else [replace(row, measure=f"{row.measure} by {kind}") for row in shown]
        verdicts.append(compared[statistics.DECIDING].verdict)
    return functools.reduce(report.overall, verdicts), rows


def _latency(session: Session, subjects: Sequence[_Subject], queries: QuerySet) -> list[Row]:
    """Return rows for the time of embedding and of search.

    The versions take turns.
    """
    texts = queries.texts[:_TIMED_QUERIES]
    embedding: list[list[float]] = [[] for _ in subjects]
    for done, text in enumerate(texts):
        progress.report(session, "timing the embedding", done, len(texts))
        for subject, seconds in zip(subjects, embedding, strict=True):
            seconds.append(embedding_seconds(session, subject.pipeline, text))
    searching = [subject.search.rankings.seconds for subject in subjects]
    return [
        row
        for what, seconds, detail in (
            ("embedding", embedding, f"one query at a time, {len(texts)} queries"),
            ("search", searching, f"the best chunks of documents, {len(queries.texts)} queries"),
        )
        for row in report.latency_rows(what, seconds[0] if len(seconds) == 2 else None, seconds[-1], detail)
    ]


def _evidence(subjects: Sequence[_Subject], measured: Fidelity, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "index": measured.chosen.index if measured.chosen else None,
        "models": [subject.pipeline.version.model.config.name for subject in subjects],
        "rows": [row.as_dict() for row in rows],
    }


def record(session: Session, pipeline: Pipeline, baseline: Version | None, evaluation: Evaluation) -> None:
    """Store an evaluation of the pipeline's version against a baseline, if it has one."""
    queries, options = evaluation.queries, evaluation.options
    session.query(
        _RECORD, _RECORD_TYPES, pipeline.pipeline_id, pipeline.version.version_id,
        *((baseline.number, baseline.version_id, baseline.fingerprint) if baseline else (None, None, None)),
        evaluation.kind, *evaluation.verdicts, queries.source, len(queries.texts), options.k, options.margin,
        options.seed, evaluation.fingerprint, json.dumps(evaluation.evidence),
    )  # fmt: skip
