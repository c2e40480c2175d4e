"""Measure the quality of a pipeline in steps.

A worker can do other work between them. Each measure is a generator that returns what it found. A measure that does not
apply returns nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from embedline.catalog.settings import load_settings
from embedline.catalog.values import Pipeline
from embedline.core import vectors
from embedline.core.json_values import as_mapping
from embedline.core.retrieval_metrics import recall_at_k
from embedline.core.vectors import FloatMatrix
from embedline.errors import NotReady
from embedline.models import circuit
from embedline.models.document_embedding import embed_texts, lowest_cosine
from embedline.models.pool import embedder_for
from embedline.observe.quality_series import Kind, Measured, compared, compared_by_query
from embedline.postgres.claims import CALLERS_TRANSACTION
from embedline.postgres.session import Session
from embedline.search.index_recall import Measurement
from embedline.search.query_batches import DocumentSearch, QueryVectors, embed_queries
from embedline.spending import ledger

Steps = Generator[None, None, list[Measured]]

_K = 10
# Queries embedded in one step.
_STEP_TEXTS = 32
# Real queries of a measurement of the index. The mean's standard error is then below 0.01.
_REAL_QUERIES = 200
# Texts of our own, so that no text of a user's is kept: several languages and scripts, code, numbers.
_PROBES = (
    "The invoice must be paid within thirty days of its date.",
    "A cat sleeps on the warm windowsill.",
    "How do I reset the password of my account?",
    "Der Zug nach Hamburg fährt heute von Gleis sieben.",
    "La réunion de demain est reportée à la semaine prochaine.",
    "El paciente no tiene fiebre desde ayer.",
    "Обновление будет установлено после перезагрузки.",
    "この製品の保証期間は一年です。",
    "请在提交之前检查所有字段。",
    "يرجى الاتصال بنا قبل زيارة المكتب.",
    "SELECT name, count(*) FROM orders GROUP BY name;",
    "def area(radius): return 3.14159 * radius ** 2",
    "Error 504: the upstream server did not answer in time.",
    "Water boils at 100 degrees Celsius at sea level.",
    "The striker scored twice in the final.",
    "Interest rates rose by a quarter of a percent.",
)  # fmt: skip
_CANARIES = (
    "SELECT position, query, grades, baseline_recall FROM embedline.canary WHERE pipeline_id = $1 ORDER BY position"
)
_KEEP_RECALLS = """
    UPDATE embedline.canary AS c SET last_recall = s.recall, baseline_recall = coalesce(c.baseline_recall, s.recall)
    FROM unnest($2, $3) AS s (position, recall) WHERE c.pipeline_id = $1 AND c.position = s.position
"""
# Sampled queries within their retention, or else the canaries.
_REAL = """
    SELECT s.query FROM (
        SELECT DISTINCT q.query FROM embedline.query_sample AS q JOIN embedline.pipeline AS p USING (pipeline_id)
        WHERE q.pipeline_id = $1 AND q.asked_at > clock_timestamp() - p.query_retention
    ) AS s ORDER BY random() LIMIT $2
"""
_CANARY_TEXTS = "SELECT query FROM embedline.canary WHERE pipeline_id = $1 ORDER BY random() LIMIT $2"
# The reference counts for the model that gave it, and until all rows were embedded again by another.
_REFERENCE = """
    SELECT d.probe, d.reference FROM embedline.drift_probe AS d JOIN embedline.version AS v USING (version_id)
    WHERE d.version_id = $1 AND d.fingerprint = $2
        AND (v.vectors_valid_from IS NULL OR v.vectors_valid_from < d.referenced_at) ORDER BY d.position
"""
_SET_REFERENCE = """
    INSERT INTO embedline.drift_probe AS d (version_id, position, probe, reference, fingerprint)
    VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (version_id, position) DO UPDATE SET probe = excluded.probe, reference = excluded.reference,
        fingerprint = excluded.fingerprint, referenced_at = clock_timestamp()
"""
# Batches of the last hour, or since the last measurement.
_LAG = """
    SELECT count(*) AS batches, percentile_disc(0.95) WITHIN GROUP (ORDER BY b.lag_seconds) AS lag
    FROM embedline.finished_batch AS b
    WHERE b.pipeline_id = $1 AND b.kind = 'change' AND b.lag_seconds IS NOT NULL AND b.finished_at > greatest(
        clock_timestamp() - interval '1 hour',
        (SELECT max(q.measured_at) FROM embedline.quality_check AS q WHERE q.pipeline_id = $1 AND q.kind = 'lag'))
"""
_OLDEST = "SELECT extract(epoch FROM t.oldest_pending_age) FROM embedline.status AS t WHERE t.pipeline = $1"


def canary(session: Session, pipeline: Pipeline, _: Collection[Kind]) -> Steps:
    """Measure recall@10 of the labelled queries, as search answers them.

    A row that is gone is not found.
    """
    rows = session.query(_CANARIES, ["bigint"], pipeline.pipeline_id)
    if not rows:
        return []
    queries = yield from _embed(session, pipeline, [str(row["query"]) for row in rows])
    search, recalls = DocumentSearch(session, pipeline, queries, _K), np.zeros(len(rows))
    for number, row in enumerate(rows):
        relevant = [key for key, grade in as_mapping(row["grades"]).items() if grade > 0]
        recalls[number] = recall_at_k(search.find(number), relevant, _K)
        yield
    measured = compared_by_query(session, pipeline, [row["baseline_recall"] for row in rows], recalls)
    session.query(
        _KEEP_RECALLS,
        ["bigint", "integer[]", "double precision[]"],
        pipeline.pipeline_id,
        [row["position"] for row in rows],
        recalls.tolist(),
    )
    return [measured]


def index(session: Session, pipeline: Pipeline, kinds: Collection[Kind]) -> Steps:
    """Measure the share of the exact results that the index finds.

    Queries are made up, and real ones if there are any. One pass over the vectors serves both. Like each measurement of
    the index it also chooses hnsw.ef_search or ivfflat.probes.
    """
    if not pipeline.version.has_index:
        return []
    real: FloatMatrix | None = None
    texts = _real_queries(session, pipeline) if "fidelity" in kinds else []
    if texts:
        queries = yield from _embed(session, pipeline, texts)
        real = queries.matrix[queries.usable]
    measurement = Measurement(session, pipeline, real)
    yield from measurement.steps()
    measured = []
    made_up = [kind for kind in measurement.kinds if kind.name != "real" and kind.recalls]
    if made_up and "reach" in kinds:
        worst = min(made_up, key=lambda kind: kind.recall)
        measured.append(compared(session, pipeline, "reach", np.array(worst.recalls)))
    measured += [
        compared(session, pipeline, "fidelity", np.array(kind.recalls))
        for kind in measurement.kinds
        if kind.name == "real" and kind.recalls
    ]
    return measured


def drift(session: Session, pipeline: Pipeline, _: Collection[Kind]) -> Steps:
    """Embed the probe texts again, and compare with their first vectors."""
    version, model = pipeline.version, pipeline.version.model
    if "text" not in model.modalities:
        return []
    known = session.query(_REFERENCE, ["bigint", "text"], version.version_id, model.fingerprint)
    texts = [str(row["probe"]) for row in known] or list(_PROBES)
    _require_available(session, pipeline)
    with _metered(session, pipeline, texts):
        fresh = embed_texts(session, pipeline, embedder_for(session, model), texts)
    yield
    if not known:
        for position, (text, vector) in enumerate(zip(texts, fresh, strict=True), 1):
            session.query(
                _SET_REFERENCE, ["bigint", "integer", "text", "real[]", "text"],
                version.version_id, position, text, vector.tolist(), model.fingerprint,
            )  # fmt: skip
        return [Measured("drift", 1.0, len(texts))]
    reference = np.array([row["reference"] for row in known], dtype=np.float32)
    cosines = np.einsum("ij,ij->i", vectors.normalise(reference).astype(np.float64), vectors.normalise(fresh))
    lowest = float(cosines.min())
    return [Measured("drift", lowest, len(texts), is_poor=lowest < lowest_cosine(model.config))]


def lag(session: Session, pipeline: Pipeline, _: Collection[Kind]) -> Steps:
    """Measure the seconds from commit to write, by the times of the queue.

    95 % of the batches were faster, and no change waits for longer.
    """
    batches = session.query(_LAG, ["bigint"], pipeline.pipeline_id)[0]
    oldest = session.scalar(_OLDEST, ["text"], pipeline.name)
    yield
    seconds = max(float(batches["lag"] or 0), float(oldest or 0))
    limit = load_settings(session).alert_lag_seconds
    return [Measured("lag", seconds, int(batches["batches"]), is_poor=seconds > limit)]


Measure = Callable[[Session, Pipeline, Collection[Kind]], Steps]
# Each measure with the kinds that it gives.
MEASURES: tuple[tuple[Measure, tuple[Kind, ...]], ...] = (
    (canary, ("canary",)),
    (index, ("reach", "fidelity")),
    (drift, ("drift",)),
    (lag, ("lag",)),
)


def _real_queries(session: Session, pipeline: Pipeline) -> list[str]:
    for statement in (_REAL, _CANARY_TEXTS):
        rows = session.query(statement, ["bigint", "integer"], pipeline.pipeline_id, _REAL_QUERIES)
        if rows:
            return [str(row["query"]) for row in rows]
    return []


def _embed(session: Session, pipeline: Pipeline, texts: Sequence[str]) -> Generator[None, None, QueryVectors]:
    _require_available(session, pipeline)
    parts = []
    for start in range(0, len(texts), _STEP_TEXTS):
        part = texts[start : start + _STEP_TEXTS]
        with _metered(session, pipeline, part):
            parts.append(embed_queries(session, pipeline, part))
        yield
    return QueryVectors(
        np.concatenate([part.matrix for part in parts]), np.concatenate([part.usable for part in parts])
    )


def _require_available(session: Session, pipeline: Pipeline) -> None:
    model = pipeline.version.model
    if circuit.is_open(session, model.model_id):
        raise NotReady(
            f'model "{model.config.name}" is unavailable for now',
            hint=f"SELECT embedline.resume_model('{model.config.name}');",
        )


@contextmanager
def _metered(session: Session, pipeline: Pipeline, texts: Sequence[str]) -> Iterator[None]:
    """Reserve a request in the ledger.

    Raises NotReady if a budget or a limit refuses it.
    """
    # A token has about four characters; two are on the safe side.
    tokens = functools.reduce(lambda total, text: total + 1 + len(text) // 2, texts, 0)
    grant = ledger.reserve(session, pipeline, [tokens], CALLERS_TRANSACTION)
    if not grant.count:
        raise NotReady(grant.reason or "a limit refuses the request")
    try:
        yield
    finally:
        if grant.reservation_id is not None:
            ledger.settle(session, grant.reservation_id, None)
