"""The queue of a version that is filled: lists of chunks, ranges of ids.

A list holds chunks that a writer left in its own transaction, that wait for a retry, or that a worker has in flight.
Of a range only the missing chunks are embedded; the tables tell which these are. A claim is a mark that counts
exactly as long as its worker's session advisory lock, as in the outbox. embed_pending marks nothing and keeps the
rows locked.

Each function takes the pipeline with the version that is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from embedline.catalog.values import Pipeline
from embedline.core.retry import ROWS_PER_CLAIM_AFTER_CRASHES
from embedline.postgres.claims import Claims
from embedline.postgres.session import Session
from embedline.queue.claim import Claim
from embedline.queue.outbox import ClaimedRow, Retry

# Lists that one claim reads.
_LISTS_PER_CLAIM = 64
# Chunks of a list that the sweep of a backfill writes, and lists of one sweep.
_SWEPT_CHUNKS, _SWEPT_LISTS = 1000, 100

# Chunks that were written moments ago and are in flight. A version that lacks no others is up to date.
FRESH = (
    "NOT q.of_backfill AND q.attempts <= 1 AND q.crash_count = 0"
    " AND q.enqueued_at > clock_timestamp() - interval '10 seconds'"
)

_CANDIDATES = """
    SELECT queue_id, cardinality(chunk_ids) AS count, chunk_ids[1:$2] AS chunk_ids, attempts, of_backfill
    FROM embedline.version_queue
    WHERE version_id = $1 AND claimed_by IS NULL AND chunk_ids IS NOT NULL AND crash_count = $3
        AND not_before <= (SELECT clock_timestamp())
        AND (NOT of_backfill OR (SELECT backfill_rate IS NULL OR backfill_due_at <= clock_timestamp()
            FROM embedline.version WHERE version_id = $1))
    ORDER BY not_before, queue_id LIMIT $4 FOR UPDATE SKIP LOCKED
"""
_MARK = """
    UPDATE embedline.version_queue SET claimed_by = $2, attempts = attempts + 1 WHERE queue_id = ANY ($1)
"""
# The chunks beyond the limit become a list of their own, for the next claim.
_SPLIT = """
    WITH whole AS (
        SELECT * FROM embedline.version_queue WHERE queue_id = $1
    ), rest AS (
        INSERT INTO embedline.version_queue (version_id, chunk_ids, attempts, crash_count, of_backfill, enqueued_at, not_before,
            last_error)
        SELECT version_id, chunk_ids[$2 + 1:], attempts, crash_count, of_backfill, enqueued_at, not_before, last_error FROM whole
    )
    UPDATE embedline.version_queue SET chunk_ids = chunk_ids[1:$2] WHERE queue_id = $1
"""
_RANGE = """
    SELECT queue_id, first_id, end_id FROM embedline.version_queue
    WHERE version_id = $1 AND claimed_by IS NULL AND first_id IS NOT NULL
    ORDER BY queue_id LIMIT 1 FOR UPDATE SKIP LOCKED
"""
_HAND_OUT = """
    INSERT INTO embedline.version_queue (version_id, chunk_ids, attempts, of_backfill, claimed_by)
    VALUES ($1, $2, 1, true, $3) RETURNING queue_id
"""
_NARROW = "UPDATE embedline.version_queue SET first_id = $2, end_id = $3 WHERE queue_id = $1"
_THROTTLE = """
    UPDATE embedline.version SET backfill_due_at =
        greatest(backfill_due_at, clock_timestamp()) + make_interval(secs => $2::double precision / backfill_rate)
    WHERE version_id = $1
"""
_PEEK = """
    SELECT
        EXISTS (SELECT FROM embedline.version_queue WHERE version_id = $1 AND claimed_by IS NULL AND chunk_ids IS NOT NULL
            AND crash_count = 0 AND not_before <= (SELECT clock_timestamp()) AND (NOT of_backfill OR r.allows)) AS queued,
        EXISTS (SELECT FROM embedline.version_queue WHERE version_id = $1 AND claimed_by IS NULL AND first_id IS NOT NULL)
            AND r.allows AS unread,
        EXISTS (SELECT FROM embedline.version_queue WHERE version_id = $1 AND claimed_by IS NULL AND crash_count > 0
            AND not_before <= (SELECT clock_timestamp())) AS suspected,
        EXISTS (SELECT FROM embedline.version_queue WHERE version_id = $1 AND claimed_by IS NOT NULL
            AND claimed_by <> ALL ($2)) AS orphaned
    FROM (
        SELECT coalesce((SELECT backfill_rate IS NULL OR backfill_due_at <= clock_timestamp() FROM embedline.version
            WHERE version_id = $1), false) AS allows
    ) AS r
"""


def peek(session: Session, pipeline: Pipeline, live: list[int]) -> dict[str, bool]:
    """Return what can be claimed.

    `queued` lists, `unread` ranges that the rate allows, `suspected` and `orphaned` lists.
    """
    return session.query(_PEEK, ["bigint", "integer[]"], pipeline.version.version_id, live)[0]


def claim_lists(
    session: Session, pipeline: Pipeline, limit: int, claims: Claims, *, crash_count: int = 0
) -> Claim | None:
    """Claim up to `limit` chunks of lists that are due.

    Return None if there are none. Tries are counted before the work begins. A row of the claim has the chunk's id as its
    key. `crash_count` selects the chunks that were in flight in that many crashes, a few at a time.
    """
    if pipeline.version.backfill_rate is not None:
        # No more at a time than a second's worth.
        limit = min(limit, pipeline.version.backfill_rate)
    if crash_count:
        limit = min(limit, ROWS_PER_CLAIM_AFTER_CRASHES.get(crash_count, 1))
    found = session.query(
        _CANDIDATES,
        ["bigint", "integer", "integer", "integer"],
        pipeline.version.version_id,
        limit,
        crash_count,
        1 if crash_count else _LISTS_PER_CLAIM,
    )
    queue_ids: list[int] = []
    claim = Claim([], of_backfill=any(row["of_backfill"] for row in found), queue_ids=queue_ids)
    for row in found:
        room = limit - len(claim.rows)
        if row["count"] > room and claim.rows:
            break
        if row["count"] > room:
            session.query(_SPLIT, ["bigint", "integer"], row["queue_id"], room)
        queue_ids.append(row["queue_id"])
        claim.rows += [
            ClaimedRow((str(chunk_id),), attempts=row["attempts"] + 1, crash_count=crash_count)
            for chunk_id in row["chunk_ids"][:room]
        ]
    if not claim.rows:
        return None
    if claim.of_backfill and pipeline.version.backfill_rate is not None:
        session.query(_THROTTLE, ["bigint", "integer"], pipeline.version.version_id, len(claim.rows))
    session.query(_MARK, ["bigint[]", "integer"], queue_ids, claims.worker_id)
    return claim


def most_crashes(session: Session, pipeline: Pipeline) -> int:
    """Return the number of crashes that the most suspected chunks were in.

    Only chunks that are due count.
    """
    return int(
        session.scalar(
            "SELECT coalesce(max(crash_count), 0) FROM embedline.version_queue WHERE version_id = $1"
            " AND claimed_by IS NULL AND not_before <= (SELECT clock_timestamp())",
            ["bigint"],
            pipeline.version.version_id,
        )
    )


def claim_range(session: Session, pipeline: Pipeline, limit: int, claims: Claims) -> Claim | None:
    """Claim the next `limit` missing chunks of an open range.

    Return None if no range is open. The range is narrowed at once, so that another worker can go on behind. The claimed
    chunks are a list from here on.
    """
    version = pipeline.version
    if version.backfill_rate is not None:
        # No more at a time than a second's worth.
        limit = min(limit, version.backfill_rate)
    while True:
        rows = session.query(_RANGE, ["bigint"], version.version_id)
        if not rows:
            return None
        row = rows[0]
        ids = _missing(session, pipeline, row["first_id"], row["end_id"], limit)
        if len(ids) < limit:
            session.query("DELETE FROM embedline.version_queue WHERE queue_id = $1", ["bigint"], row["queue_id"])
        else:
            newest_first = version.backfill_order == "newest_first"
            narrowed = (row["first_id"], ids[-1]) if newest_first else (ids[-1] + 1, row["end_id"])
            session.query(_NARROW, ["bigint", "bigint", "bigint"], row["queue_id"], *narrowed)
        if ids:
            if version.backfill_rate is not None:
                session.query(_THROTTLE, ["bigint", "integer"], version.version_id, len(ids))
            queue_id = session.scalar(
                _HAND_OUT, ["bigint", "bigint[]", "integer"], version.version_id, ids, claims.worker_id
            )
            return Claim([ClaimedRow((str(i),)) for i in ids], of_backfill=True, queue_ids=[int(queue_id)])


def _missing(session: Session, pipeline: Pipeline, first_id: int, end_id: int, limit: int) -> list[int]:
    order = "DESC" if pipeline.version.backfill_order == "newest_first" else ""
    rows = session.query(
        f"""
        SELECT array_agg(m.chunk_id ORDER BY m.chunk_id {order}) AS ids FROM (
            SELECT c.chunk_id FROM {pipeline.chunk} AS c
            WHERE c.chunk_id >= $1 AND c.chunk_id < $2 AND {_is_missing(pipeline)}
            ORDER BY c.chunk_id {order} LIMIT $3
        ) AS m
        """,
        ["bigint", "bigint", "bigint"],
        first_id,
        end_id,
        limit,
    )
    return list(rows[0]["ids"] or [])


def _is_missing(pipeline: Pipeline) -> str:
    """Return the condition that a chunk is missing: no vector, no dead letter."""
    return (
        f"NOT EXISTS (SELECT FROM {pipeline.vectors} AS v WHERE v.chunk_id = c.chunk_id) AND NOT EXISTS ("
        f"SELECT FROM embedline.version_dead_letter AS d WHERE d.version_id = {pipeline.version.version_id}"
        " AND d.chunk_id = c.chunk_id)"
    )


def finish(session: Session, queue_ids: Sequence[int], claims: Claims) -> None:
    """Remove settled lists from the queue, fenced by the claim."""
    session.query(
        f"DELETE FROM embedline.version_queue WHERE queue_id = ANY ($1){claims.fence(2)}",
        ["bigint[]", *claims.types],
        list(queue_ids),
        *claims.values,
    )


def requeue(session: Session, pipeline: Pipeline, rows: Sequence[ClaimedRow], retry: Retry) -> list[int]:
    """Queue chunks again, to be tried together after a delay.

    Return the numbers of their lists.
    """
    numbers: list[int] = []

    def history(row: ClaimedRow) -> tuple[int, int]:
        return retry.attempts(row), row.crash_count

    for (attempts, crash_count), members in groupby(sorted(rows, key=history), key=history):
        added = session.scalar(
            """
            INSERT INTO embedline.version_queue (version_id, chunk_ids, attempts, crash_count, of_backfill, last_error,
                not_before)
            VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp() + make_interval(secs => $7)) RETURNING queue_id
            """,
            ["bigint", "bigint[]", "smallint", "smallint", "boolean", "text", "double precision"],
            pipeline.version.version_id,
            [int(row.key[0]) for row in members],
            attempts,
            crash_count,
            retry.of_backfill,
            retry.message,
            retry.delay_seconds,
        )
        numbers.append(int(added))
    return numbers


def reclaim_from_dead_workers(session: Session, pipeline: Pipeline, live: list[int]) -> None:
    """Free the lists of dead workers; their chunks are suspected now."""
    session.query(
        "UPDATE embedline.version_queue SET claimed_by = NULL, attempts = greatest(attempts - 1, 0),"
        " crash_count = crash_count + 1 WHERE version_id = $1 AND claimed_by IS NOT NULL AND claimed_by <> ALL ($2)",
        ["bigint", "integer[]"],
        pipeline.version.version_id,
        live,
    )


def release(session: Session, worker_id: int, queue_ids: Sequence[int] | None = None) -> None:
    """Free all lists of a worker, or some; the tries are not counted."""
    session.query(
        "UPDATE embedline.version_queue SET claimed_by = NULL, attempts = greatest(attempts - 1, 0)"
        " WHERE claimed_by = $1 AND ($2 IS NULL OR queue_id = ANY ($2))",
        ["integer", "bigint[]"],
        worker_id,
        None if queue_ids is None else list(queue_ids),
    )


def enqueue_range(session: Session, pipeline: Pipeline) -> None:
    """Queue all chunks of the version's set as one range.

    Nothing may write chunks meanwhile.
    """
    session.query(
        f"""
        INSERT INTO embedline.version_queue (version_id, first_id, end_id, of_backfill)
        SELECT $1, m.first_id, m.last_id + 1, true
        FROM (SELECT min(chunk_id) AS first_id, max(chunk_id) AS last_id FROM {pipeline.chunk}) AS m WHERE m.first_id IS NOT NULL
        """,
        ["bigint"],
        pipeline.version.version_id,
    )


def enqueue_lists(session: Session, pipeline: Pipeline, chunk_ids: Sequence[int]) -> None:
    """Queue chunks as lists of a thousand."""
    for first in range(0, len(chunk_ids), _SWEPT_CHUNKS):
        session.query(
            "INSERT INTO embedline.version_queue (version_id, chunk_ids, of_backfill) VALUES ($1, $2, true)",
            ["bigint", "bigint[]"],
            pipeline.version.version_id,
            list(chunk_ids[first : first + _SWEPT_CHUNKS]),
        )


def forget_dead_letters(session: Session, pipeline: Pipeline) -> None:
    """Remove the version's dead letters of chunks that are gone or embedded."""
    session.query(
        f"DELETE FROM embedline.version_dead_letter AS d WHERE d.version_id = $1 AND (NOT EXISTS ("
        f"SELECT FROM {pipeline.chunk} AS c WHERE c.chunk_id = d.chunk_id)"
        f" OR EXISTS (SELECT FROM {pipeline.vectors} AS v WHERE v.chunk_id = d.chunk_id))",
        ["bigint"],
        pipeline.version.version_id,
    )


def is_behind(session: Session, pipeline: Pipeline) -> bool:
    """Return True if chunks are queued for the version.

    After a cutover the serving one may still have some to embed.
    """
    return bool(
        session.scalar(
            "SELECT EXISTS (SELECT FROM embedline.version_queue WHERE version_id = $1)",
            ["bigint"],
            pipeline.version.version_id,
        )
    )


def enqueue_missing(session: Session, pipeline: Pipeline) -> int:
    """Queue up to 100,000 missing chunks that are not queued; return their number."""
    return int(
        session.scalar(
            f"""
            WITH missing AS (
                SELECT c.chunk_id, row_number() OVER () AS n FROM {pipeline.chunk} AS c
                WHERE {_is_missing(pipeline)} AND c.chunk_id NOT IN (
                    SELECT u.chunk_id FROM embedline.version_queue AS q CROSS JOIN LATERAL unnest(q.chunk_ids) AS u (chunk_id)
                    WHERE q.version_id = $1)
                LIMIT {_SWEPT_CHUNKS * _SWEPT_LISTS}
            ), queued AS (
                INSERT INTO embedline.version_queue (version_id, chunk_ids, of_backfill)
                SELECT $1, array_agg(chunk_id), true FROM missing GROUP BY (n - 1) / {_SWEPT_CHUNKS}
                RETURNING cardinality(chunk_ids) AS count
            )
            SELECT coalesce(sum(count), 0) FROM queued
            """,
            ["bigint"],
            pipeline.version.version_id,
        )
    )


def close(session: Session, pipeline: Pipeline) -> bool:
    """Sweep once a version's backfill is through.

    Mark it complete if no chunk is missing. Return True if any was. Chunks of the last seconds may be in the queue, because
    under steady writes it never is empty. A version that is further behind is not complete: its model does not keep up with
    the writes.
    """
    version_id = pipeline.version.version_id
    if pipeline.version.state != "backfilling":
        return False
    locked = session.scalar(
        """
        SELECT v.version_id FROM embedline.version AS v
        WHERE v.version_id = $1 AND v.state = 'backfilling'
            AND NOT EXISTS (SELECT FROM embedline.version_queue AS q WHERE q.version_id = $1 AND q.of_backfill)
            -- Chunks of rows that are not read yet are missing, too.
            AND NOT EXISTS (SELECT FROM embedline.pipeline AS p JOIN embedline.version AS s ON s.version_id = p.serving_version_id
                WHERE p.pipeline_id = v.pipeline_id AND s.version_id <> v.version_id AND s.state = 'backfilling')
            AND NOT EXISTS (SELECT FROM embedline.backfill_range AS r WHERE r.pipeline_id = v.pipeline_id AND NOT r.done)
        FOR UPDATE OF v SKIP LOCKED
        """,
        ["bigint"],
        version_id,
    )
    if locked is None:
        return False
    if session.scalar(
        f"SELECT 1 FROM embedline.version_queue AS q WHERE q.version_id = $1 AND NOT ({FRESH}) LIMIT 1",
        ["bigint"],
        version_id,
    ):
        return False
    forget_dead_letters(session, pipeline)
    if enqueue_missing(session, pipeline):
        return True
    session.query(
        "UPDATE embedline.version SET state = 'complete', completed_at = clock_timestamp() WHERE version_id = $1",
        ["bigint"],
        version_id,
    )
    session.execute(f"ANALYZE (SKIP_LOCKED) {pipeline.vectors}")
    return False
