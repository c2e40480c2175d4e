"""Tell which changes may wait for a provider's batch, by their transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from embedline.catalog.values import Pipeline
from embedline.postgres.session import Session
from embedline.queue.outbox import ClaimedRow

# $2 are the starts of transactions, $3 the keys of each that were claimed just now. A transaction is known by its start, as
# the inbox keeps it. That it was large is noted: the last of its keys are claimed when few are left.
_WAITING = """
    WITH asked AS MATERIALIZED (
        SELECT a.started_at, a.taken FROM unnest($2::text[]::timestamptz[], $3::integer[]) AS a (started_at, taken)
    ), rule AS MATERIALIZED (
        SELECT r.* FROM embedline.bulk_rule AS r WHERE r.pipeline_id = $1
    ), left_behind AS (
        SELECT i.enqueued_at, sum(cardinality(i.{first})) AS count FROM {inbox} AS i
        WHERE i.enqueued_at = ANY (ARRAY(SELECT started_at FROM asked)) AND (SELECT bulk_rows FROM rule) IS NOT NULL
        GROUP BY i.enqueued_at
    ), large AS (
        INSERT INTO embedline.bulk_change (pipeline_id, enqueued_at)
        SELECT $1, a.started_at FROM asked AS a CROSS JOIN rule AS r
        LEFT JOIN left_behind AS l ON l.enqueued_at = a.started_at
        WHERE a.taken + coalesce(l.count, 0) > r.bulk_rows
        ON CONFLICT DO NOTHING RETURNING enqueued_at
    )
    SELECT ARRAY(
        SELECT a.started_at::text FROM asked AS a CROSS JOIN rule AS r
        CROSS JOIN LATERAL (SELECT (a.started_at AT TIME ZONE 'UTC')::time AS clock) AS c
        WHERE CASE WHEN r.starts_at < r.ends_at THEN c.clock >= r.starts_at AND c.clock < r.ends_at
                ELSE c.clock >= r.starts_at OR c.clock < r.ends_at END
            OR a.started_at IN (SELECT enqueued_at FROM large)
            OR a.started_at IN (SELECT b.enqueued_at FROM embedline.bulk_change AS b WHERE b.pipeline_id = $1)
    ) AS starts
"""
_PURGE = "DELETE FROM embedline.bulk_change WHERE enqueued_at < clock_timestamp() - interval '2 days'"


def mark(session: Session, pipeline: Pipeline, rows: Sequence[ClaimedRow], starts: Sequence[str]) -> None:
    """Mark the claimed rows that may wait.

    `starts` are those of the transactions that changed them last.
    """
    counts = Counter(starts)
    query = _WAITING.format(inbox=pipeline.generated("inbox"), first=pipeline.quoted_key_columns[0])
    types = ["bigint", "text[]", "integer[]"]
    waiting = set(session.scalar(query, types, pipeline.pipeline_id, list(counts), list(counts.values())) or ())
    for row, start in zip(rows, starts, strict=True):
        row.may_wait = start in waiting


def purge(session: Session) -> None:
    """Forget transactions whose keys are long claimed."""
    session.query(_PURGE)
