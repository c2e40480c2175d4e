"""Keep what was measured of batches: the last ones each, older ones as sums.

A batch that is through adds one row to embedline.finished_batch, in its own transaction. Sessions add rows and change none,
so they never wait for each other. Now and then one session moves old rows into sums by hour, and into totals.
"""

from __future__ import annotations

import json
import time

from embedline.catalog.settings import load_settings
from embedline.postgres.claims import Claims
from embedline.postgres.locks import HISTORY_LOCK
from embedline.postgres.session import Session
from embedline.postgres.spans import record
from embedline.worker.batch import Batch
from embedline.worker.meter import Stage

# Rows of embedline.finished_batch that metrics add up with each scrape: 15 ms. Older ones are in sums.
_KEPT_BATCHES = 50_000
# Rows moved at a time: a short transaction.
_MOVED_BATCHES = 20_000
# A caller's transaction moves old rows after this many batches: without a resident worker no other session does.
_CALLERS_ROUND = 1000
_STAGES = tuple(Stage)
_INSERT = f"""
    INSERT INTO embedline.finished_batch (pipeline_id, version_id, worker_id, kind, row_count, embedded_count, retried_count,
        dead_count, chunk_count, request_count, token_count, content_bytes, failures, lag_seconds,
        {", ".join(f"{stage}_ms" for stage in _STAGES)})
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13,
        CASE WHEN $14 IS NOT NULL THEN extract(epoch FROM clock_timestamp() - $14) END, $15, $16, $17, $18, $19)
    RETURNING batch_id
"""
_TYPES = [
    *["bigint", "bigint", "integer", "text", "integer", "integer", "integer"],
    *["integer", "integer", "integer", "bigint", "bigint", "jsonb", "timestamptz"],
    *["real"] * len(_STAGES),
]
_SUMS = (
    "batch_count",
    "row_count",
    "embedded_count",
    "retried_count",
    "dead_count",
    "chunk_count",
    "request_count",
    "token_count",
    "content_bytes",
    *(f"{stage}_ms" for stage in _STAGES),
)
_MOVE = f"""
    WITH old AS (
        DELETE FROM embedline.finished_batch WHERE batch_id IN (
            SELECT b.batch_id FROM embedline.finished_batch AS b
            WHERE b.finished_at < clock_timestamp() - make_interval(secs => 3600 * $1)
                OR b.batch_id <= (SELECT max(n.batch_id) FROM embedline.finished_batch AS n) - $2
            ORDER BY b.batch_id LIMIT $3
        )
        RETURNING *, 1 AS batch_count, date_trunc('hour', finished_at, 'UTC') AS hour
    ),
    failed AS (
        SELECT o.pipeline_id, o.version_id, f.key AS class, sum(f.value::bigint)::bigint AS count
        FROM old AS o CROSS JOIN LATERAL jsonb_each_text(o.failures) AS f
        GROUP BY o.pipeline_id, o.version_id, f.key
    ),
    failures AS (
        INSERT INTO embedline.request_failure AS r (pipeline_id, version_id, class, count)
        SELECT f.pipeline_id, f.version_id, f.class, f.count FROM failed AS f
        ON CONFLICT (pipeline_id, version_id, class) DO UPDATE SET count = r.count + excluded.count
    ),
    hours AS (
        INSERT INTO embedline.batch_hour AS h (pipeline_id, version_id, hour, {", ".join(_SUMS)})
        SELECT o.pipeline_id, o.version_id, o.hour, {", ".join(f"sum(o.{name})" for name in _SUMS)}
        FROM old AS o GROUP BY o.pipeline_id, o.version_id, o.hour
        ON CONFLICT (pipeline_id, version_id, hour) DO UPDATE
        SET {", ".join(f"{name} = h.{name} + excluded.{name}" for name in _SUMS)}
    )
    INSERT INTO embedline.batch_total AS t (pipeline_id, version_id, {", ".join(_SUMS)})
    SELECT o.pipeline_id, o.version_id, {", ".join(f"sum(o.{name})" for name in _SUMS)}
    FROM old AS o GROUP BY o.pipeline_id, o.version_id
    ON CONFLICT (pipeline_id, version_id) DO UPDATE
    SET {", ".join(f"{name} = t.{name} + excluded.{name}" for name in _SUMS)}
"""


def keep(session: Session, claims: Claims, batch: Batch) -> None:
    """Keep the measurements of a batch that is through, in its last transaction."""
    meter, key = batch.meter, batch.source.key
    kind = "fill" if key.kind == "version" else "backfill" if batch.claim.of_backfill else "change"
    batch_id = session.scalar(
        _INSERT,
        _TYPES,
        batch.pipeline.pipeline_id,
        batch.pipeline.version.version_id,
        claims.worker_id,
        kind,
        len(batch.rows) - batch.deferred_count,
        batch.embedded_count,
        sum(row.attempts > 1 for row in batch.rows),
        meter.dead_count,
        meter.chunk_count,
        meter.request_count,
        meter.token_count,
        batch.content_bytes,
        json.dumps(meter.failures) if meter.failures else None,
        batch.claim.enqueued_at,
        *[round(1000 * meter.seconds[stage], 3) for stage in _STAGES],
    )
    record("batch", time.monotonic() - batch.claimed_at, lambda: meter.attributes)
    if not claims.is_resident and batch_id % _CALLERS_ROUND == 0:
        move_old(session)


def move_old(session: Session) -> None:
    """Move old batches into their sums, unless another session does that now."""
    if session.scalar("SELECT pg_try_advisory_xact_lock($1)", ["bigint"], HISTORY_LOCK):
        hours = load_settings(session).batch_retention_hours
        session.query(_MOVE, ["double precision", "bigint", "integer"], hours, _KEPT_BATCHES, _MOVED_BATCHES)
