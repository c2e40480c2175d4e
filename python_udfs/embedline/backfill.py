"""Closing a backfill: counting what is missing, and saying complete only when nothing is."""

from __future__ import annotations

from embedline.catalog import Pipeline
from embedline.database import Session

_SWEEP_ROWS = 100_000


def close_backfill(session: Session, pipeline: Pipeline) -> bool:
    """Sweep once all ranges are read; mark the version complete where no row is missing. True where work was found.

    An update of an unrelated column can move a row from a block not yet read to one already read, and is not captured:
    so the end of the ranges is not the end of the backfill. The sweep is one snapshot; whatever is neither embedded nor
    queued in it is queued.
    """
    locked = session.scalar(
        """
        SELECT version_id FROM embedline.version
        WHERE version_id = $1 AND state = 'backfilling'
            AND NOT EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done)
        FOR UPDATE SKIP LOCKED
        """,
        ["bigint", "bigint"],
        pipeline.version.version_id,
        pipeline.pipeline_id,
    )
    if locked is None:
        return False
    queued = session.scalar(
        f"""
        WITH queued AS (
            INSERT INTO {pipeline.outbox} ({pipeline.key_list})
            SELECT * FROM {pipeline.generated("missing")}($1) RETURNING 1
        )
        SELECT count(*) FROM queued
        """,
        ["integer"],
        _SWEEP_ROWS,
    )
    if queued:
        return True
    if session.scalar(f"SELECT 1 FROM {pipeline.outbox} LIMIT 1") is not None:
        # Rows of the backfill that are still queued: look again when they are through, but do not wait for a queue
        # that never empties under steady writes.
        waiting = session.scalar(
            f"SELECT 1 FROM {pipeline.outbox} WHERE enqueued_at <= (SELECT created_at FROM embedline.version"
            " WHERE version_id = $1) LIMIT 1",
            ["bigint"],
            pipeline.version.version_id,
        )
        if waiting is not None:
            return False
    session.query(
        "UPDATE embedline.version SET state = 'complete', completed_at = clock_timestamp() WHERE version_id = $1",
        ["bigint"],
        pipeline.version.version_id,
    )
    # The planner must know these tables before the first search: without figures it does not choose the index.
    for table in (pipeline.document, pipeline.chunk, pipeline.vectors):
        session.execute(f"ANALYZE {table}")
    return False
