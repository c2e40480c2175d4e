"""The backfill: rows that were there before their triggers, read by block range, and the sweep that closes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from embedline.catalog import Pipeline
from embedline.database import Session
from embedline.outbox import ClaimedRow
from embedline.retry import MAX_CRASHES, ROWS_PER_CLAIM_AFTER_CRASHES

_SWEEP_ROWS = 100_000
_BLOCKS_PER_RANGE = 128


@dataclass
class ClaimedRange:
    """A claimed stretch of a block range: its rows, how far the claim reads, whether that is its end."""

    range_id: int
    next_tid: str
    exhausted: bool
    rows: list[ClaimedRow] = field(default_factory=list)


def claim_backfill(
    session: Session, pipeline: Pipeline, limit: int, worker_id: int | None, *, crash_count: int = 0
) -> ClaimedRange | None:
    """Claim the next rows of an open range; None where no range is open or all are in other hands."""
    while True:
        rows = session.query(
            """
            WITH candidate AS MATERIALIZED (
                SELECT r.range_id FROM embedline.backfill_range AS r
                WHERE r.pipeline_id = $1 AND NOT r.done AND r.claimed_by IS NULL AND least(r.crash_count, $4) = $3
                ORDER BY r.range_id
                LIMIT 1
                FOR UPDATE SKIP LOCKED
            )
            UPDATE embedline.backfill_range AS r SET claimed_by = $2
            FROM candidate AS c WHERE r.range_id = c.range_id
            RETURNING r.range_id, r.relation::bigint AS relation, r.next_tid::text AS next_tid, r.end_tid::text AS end_tid,
                r.file_node = pg_relation_filenode(r.relation) AS unmoved
            """,
            ["bigint", "integer", "smallint", "smallint"],
            pipeline.pipeline_id,
            worker_id,
            crash_count,
            MAX_CRASHES,
        )
        if not rows:
            return None
        row = rows[0]
        if row["unmoved"]:
            return _read_range(session, pipeline, row, limit, crash_count)
        _restart_ranges(session, pipeline, int(row["relation"]))


def _read_range(session: Session, pipeline: Pipeline, row: dict[str, object], limit: int, crashes: int) -> ClaimedRange:
    if crashes:
        limit = min(limit, ROWS_PER_CLAIM_AFTER_CRASHES.get(crashes, 1))
    keys = ", ".join(f"array_agg(r.{column}::text) AS {column}" for column in pipeline.quoted_key_columns)
    found = session.query(
        f"SELECT count(*) AS row_count, max(r.row_tid)::text AS last_tid, {keys}"
        f" FROM {pipeline.generated('range')}($1::bigint::oid::regclass, $2::tid, $3::tid, $4) AS r",
        ["bigint", "text", "text", "integer"],
        row["relation"],
        row["next_tid"],
        row["end_tid"],
        limit,
    )[0]
    exhausted = found["row_count"] < limit
    next_tid = str(row["end_tid"])
    if not exhausted:
        block, offset = str(found["last_tid"]).strip("()").split(",")
        next_tid = f"({block},{int(offset) + 1})"
    columns = (found[column] or () for column in pipeline.key_columns)
    rows = [ClaimedRow(key, crash_count=crashes) for key in zip(*columns, strict=True)]
    return ClaimedRange(int(str(row["range_id"])), next_tid, exhausted, rows)


def _restart_ranges(session: Session, pipeline: Pipeline, relation: int) -> None:
    # VACUUM FULL, CLUSTER, TRUNCATE and some ALTER TABLE write the table anew: every row has moved.
    session.query(
        """
        WITH gone AS (DELETE FROM embedline.backfill_range WHERE pipeline_id = $1 AND relation = $2::oid)
        INSERT INTO embedline.backfill_range (pipeline_id, relation, file_node, next_tid, end_tid)
        SELECT $1, c.oid, pg_relation_filenode(c.oid), format('(%s,0)', b)::tid,
            format('(%s,0)', least(b + $3, size.blocks))::tid
        FROM pg_class AS c
        CROSS JOIN LATERAL (SELECT pg_relation_size(c.oid) / current_setting('block_size')::bigint AS blocks) AS size
        CROSS JOIN LATERAL generate_series(0, size.blocks - 1, $3) AS b
        WHERE c.oid = $2::oid
        """,
        ["bigint", "bigint", "bigint"],
        pipeline.pipeline_id,
        relation,
        _BLOCKS_PER_RANGE,
    )


def finish_range(session: Session, claimed: ClaimedRange, worker_id: int | None) -> None:
    """Note how far a backfill range has come and give its claim back, fenced by the claim."""
    session.query(
        "UPDATE embedline.backfill_range SET next_tid = $2::tid, done = $3, claimed_by = NULL, crash_count = 0"
        " WHERE range_id = $1 AND claimed_by IS NOT DISTINCT FROM $4",
        ["bigint", "text", "boolean", "integer"],
        claimed.range_id,
        claimed.next_tid,
        claimed.exhausted,
        worker_id,
    )


def take_over(session: Session, pipeline: Pipeline, dead: list[int]) -> None:
    """Free ranges whose worker died while it had them."""
    session.query(
        "UPDATE embedline.backfill_range SET claimed_by = NULL, crash_count = crash_count + 1"
        " WHERE pipeline_id = $1 AND claimed_by = ANY ($2)",
        ["bigint", "integer[]"],
        pipeline.pipeline_id,
        dead,
    )


def release(session: Session, pipeline: Pipeline, worker_id: int, range_id: int | None = None) -> None:
    """Free what a worker has, or one range of it."""
    session.query(
        "UPDATE embedline.backfill_range SET claimed_by = NULL"
        " WHERE pipeline_id = $1 AND claimed_by = $2 AND ($3 IS NULL OR range_id = $3)",
        ["bigint", "integer", "bigint"],
        pipeline.pipeline_id,
        worker_id,
        range_id,
    )


def close_backfill(session: Session, pipeline: Pipeline) -> bool:
    """Sweep once all ranges are read; mark the version complete where no row is missing. True where work was found.

    An update of an unrelated column can move a row from a block not yet read to one already read, and is not captured:
    so the end of the ranges is not the end of the backfill. The sweep is one snapshot; whatever is neither embedded nor
    queued in it is queued.
    """
    if pipeline.version.state != "backfilling":
        return False
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
    # Rows of the backfill that are to be tried again. Not the whole queue: under steady writes that never empties.
    waiting = session.scalar(f"SELECT 1 FROM {pipeline.outbox} WHERE of_backfill LIMIT 1")
    if waiting:
        return False
    queued = session.scalar(
        f"""
        WITH queued AS (
            INSERT INTO {pipeline.outbox} ({pipeline.key_list}, of_backfill)
            SELECT m.*, true FROM {pipeline.generated("missing")}($1) AS m RETURNING 1
        )
        SELECT count(*) FROM queued
        """,
        ["integer"],
        _SWEEP_ROWS,
    )
    if queued:
        return True
    session.query(
        "UPDATE embedline.version SET state = 'complete', completed_at = clock_timestamp() WHERE version_id = $1",
        ["bigint"],
        pipeline.version.version_id,
    )
    # The planner must know these tables before the first search: without figures it does not choose the index.
    for table in (pipeline.document, pipeline.chunk, pipeline.vectors):
        session.execute(f"ANALYZE {table}")
    return False
