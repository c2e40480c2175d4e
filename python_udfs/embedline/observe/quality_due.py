"""Decide which measurements of quality are due."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from embedline.catalog.settings import load_settings
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.observe.quality_series import KINDS, Kind
from embedline.postgres.relations import data_name
from embedline.postgres.session import Session
from embedline.search.exact_rows import random_chunks

# Seconds before the next measurement: after a poor one, so that an alert ends soon, and after a failure.
_SECONDS_AFTER_POOR, _SECONDS_AFTER_ERROR = 25, 300
# Measurements of a kind take this share of the time at most.
_COST_SHARE = 0.01
# Share of rows that were changed or deleted since the last check, from which a check is due at once.
_CHANGED_SHARE = 0.1
# Chunks that stand for all. If a tenth of the rows are gone, 16 to 25 of 200 are (two standard deviations).
_SAMPLED_CHUNKS = 200
# Kinds that a change of many rows affects.
OF_ROWS: tuple[Kind, ...] = ("canary", "reach", "fidelity")
_KEEP_SAMPLE = """
    WITH {random_chunks}
    INSERT INTO embedline.quality_state (pipeline_id, chunk_ids)
    SELECT $2, coalesce((SELECT array_agg(p.chunk_id) FROM picked AS p), '{{}}')
    ON CONFLICT (pipeline_id) DO UPDATE SET chunk_ids = excluded.chunk_ids
"""
_GONE = """
    SELECT count(*) FILTER (WHERE v.chunk_id IS NULL)::double precision / count(*) AS share
    FROM embedline.quality_state AS s CROSS JOIN unnest(s.chunk_ids) AS c (chunk_id)
    LEFT JOIN {vectors} AS v ON v.chunk_id = c.chunk_id
    WHERE s.pipeline_id = {pipeline_id} HAVING count(*) > 0
"""
# For each pipeline the kinds that are due, and those that are due if many rows have changed.
_DUE = """
    WITH last AS (
        SELECT p.pipeline_id, p.name, v.number, k.kind, q.measured_at, q.error,
            q.is_poor OR q.version_id <> v.version_id AS is_pressing,
            make_interval(secs => coalesce(q.seconds, 0) / $6) AS rest, coalesce(v.completed_at, v.created_at) AS completed_at
        FROM embedline.pipeline AS p
        JOIN embedline.version AS v ON v.version_id = p.serving_version_id
        CROSS JOIN unnest($1) AS k (kind)
        LEFT JOIN LATERAL (
            SELECT c.* FROM embedline.quality_check AS c WHERE c.pipeline_id = p.pipeline_id AND c.kind = k.kind
            ORDER BY c.measured_at DESC LIMIT 1) AS q ON true
        WHERE p.state = 'active' AND NOT p.is_resting AND v.state = 'complete' AND ($2 IS NULL OR p.name = $2)
            AND EXISTS (SELECT FROM pg_class AS s WHERE s.oid = p.source)
            AND (k.kind <> 'canary' OR EXISTS (SELECT FROM embedline.canary AS y WHERE y.pipeline_id = p.pipeline_id))
    ), judged AS (
        SELECT l.*, CASE
            WHEN l.measured_at IS NULL THEN l.kind = 'canary' OR l.completed_at + make_interval(secs => $3) <= clock_timestamp()
            ELSE l.measured_at + greatest(l.rest, make_interval(secs => CASE
                WHEN l.error IS NOT NULL THEN $5 WHEN l.is_pressing THEN $4 ELSE $3 END)) <= clock_timestamp()
            END AS is_due,
            l.kind = ANY ($7) AND l.error IS NULL
                AND l.measured_at + greatest(l.rest, make_interval(secs => $4)) <= clock_timestamp() AS is_due_after_changes
        FROM last AS l
    )
    SELECT j.pipeline_id, j.name, j.number, array_agg(j.kind) FILTER (WHERE j.is_due) AS due,
        array_agg(j.kind) FILTER (WHERE j.is_due_after_changes AND NOT j.is_due) AS due_after_changes
    FROM judged AS j WHERE j.is_due OR j.is_due_after_changes
    GROUP BY j.pipeline_id, j.name, j.number ORDER BY min(j.measured_at) NULLS FIRST
"""
_DUE_TYPES = ["text[]", "text", *["double precision"] * 4, "text[]"]


@dataclass(frozen=True)
class Task:
    """The kinds to measure of one pipeline."""

    pipeline_name: str
    pipeline_id: int
    kinds: frozenset[Kind]


def keep_sample(session: Session, pipeline: Pipeline) -> None:
    """Keep some random chunks.

    By these the next call of `due_tasks` tells how many rows have changed.
    """
    statement = _KEEP_SAMPLE.format(random_chunks=random_chunks(pipeline))
    session.query(statement, ["integer", "bigint"], _SAMPLED_CHUNKS, pipeline.pipeline_id)


def due_tasks(session: Session, pipeline_name: str | None) -> Iterator[Task]:
    """Yield the pipelines with measurements that are due.

    Those that have waited the longest come first.
    """
    hours = load_settings(session).quality_check_hours
    if not hours:
        return
    rows = session.query(
        _DUE, _DUE_TYPES, list(KINDS), pipeline_name, 3600 * hours, _SECONDS_AFTER_POOR, _SECONDS_AFTER_ERROR,
        _COST_SHARE, list(OF_ROWS),
    )  # fmt: skip
    for row in rows:
        kinds: set[Kind] = set(row["due"] or ())
        if (
            row["due_after_changes"]
            and _share_gone(session, row["pipeline_id"], row["name"], row["number"]) >= _CHANGED_SHARE
        ):
            kinds |= set(row["due_after_changes"])
        if kinds:
            yield Task(str(row["name"]), int(row["pipeline_id"]), frozenset(kinds))


def _share_gone(session: Session, pipeline_id: int, name: str, number: int) -> float:
    """Return which share of the sampled chunks is gone; a changed row has new ones."""
    statement = _GONE.format(vectors=data_name(names.of_version(name, number)), pipeline_id=int(pipeline_id))
    rows = session.execute(statement)
    return float(rows[0]["share"]) if rows else 0.0
