"""The queue of a version that is filled from the chunks: new chunks as lists, its backfill as ranges of chunk ids.

A list is what a writer of chunks left in its own transaction, what is to be tried again, or what a worker has in hand. Of a
range only what is missing is done: that is asked of the tables, not stored. A claim is a mark that counts exactly as long
as its worker's session advisory lock, as in the outbox; embed_pending marks nothing and keeps the rows locked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from embedline.catalog.load import Pipeline
from embedline.core.retry import ROWS_PER_CLAIM_AFTER_CRASHES
from embedline.postgres.session import Session
from embedline.queue.outbox import ClaimedRow

# Lists that one claim looks at.
_LISTS_PER_CLAIM = 64
# Chunks of a list that the sweep of a backfill writes, and lists of one sweep.
_SWEPT_CHUNKS, _SWEPT_LISTS = 1000, 100
_MAX_ERROR_CHARACTERS = 500

# Chunks that were written moments ago and are on their way: a version that is no further behind has all it can have.
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
# What is beyond the limit becomes a list of its own, for the next claim.
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
_LOOK = """
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


@dataclass
class QueueClaim:
    """Chunks in hand, as rows whose key is the chunk's id, and the rows of the queue that hold them."""

    rows: list[ClaimedRow]
    queue_ids: list[int]
    of_backfill: bool


def look(session: Session, lane: Pipeline, live: list[int]) -> dict[str, bool]:
    """Say what there is to claim: `queued` lists, `unread` ranges that the rate allows, `suspected` and `orphaned` lists."""
    return session.query(_LOOK, ["bigint", "integer[]"], lane.version.version_id, live)[0]


def claim_lists(
    session: Session, lane: Pipeline, limit: int, worker_id: int | None, *, crash_count: int = 0
) -> QueueClaim | None:
    """Claim up to `limit` chunks of lists that are due; None where there are none. Tries are counted before the work begins.

    With a `crash_count` only chunks that were in hand in so many crashes, a few at a time.
    """
    if lane.version.backfill_rate is not None:
        # No more at a time than a second's worth.
        limit = min(limit, lane.version.backfill_rate)
    if crash_count:
        limit = min(limit, ROWS_PER_CLAIM_AFTER_CRASHES.get(crash_count, 1))
    found = session.query(
        _CANDIDATES,
        ["bigint", "integer", "integer", "integer"],
        lane.version.version_id,
        limit,
        crash_count,
        1 if crash_count else _LISTS_PER_CLAIM,
    )
    claim = QueueClaim([], [], of_backfill=any(row["of_backfill"] for row in found))
    for row in found:
        room = limit - len(claim.rows)
        if row["count"] > room and claim.rows:
            break
        if row["count"] > room:
            session.query(_SPLIT, ["bigint", "integer"], row["queue_id"], room)
        claim.queue_ids.append(row["queue_id"])
        claim.rows += [
            ClaimedRow((str(chunk_id),), attempts=row["attempts"] + 1, crash_count=crash_count)
            for chunk_id in row["chunk_ids"][:room]
        ]
    if not claim.rows:
        return None
    if claim.of_backfill and lane.version.backfill_rate is not None:
        session.query(_THROTTLE, ["bigint", "integer"], lane.version.version_id, len(claim.rows))
    session.query(_MARK, ["bigint[]", "integer"], claim.queue_ids, worker_id)
    return claim


def most_crashes(session: Session, lane: Pipeline) -> int:
    """Return in how many crashes the chunks were that are under most suspicion and due."""
    return int(
        session.scalar(
            "SELECT coalesce(max(crash_count), 0) FROM embedline.version_queue WHERE version_id = $1"
            " AND claimed_by IS NULL AND not_before <= (SELECT clock_timestamp())",
            ["bigint"],
            lane.version.version_id,
        )
    )


def claim_range(session: Session, lane: Pipeline, limit: int, worker_id: int | None) -> QueueClaim | None:
    """Claim the next `limit` chunks that are missing of an open range; None where no range is open.

    The range is narrowed at once, so that another worker can go on behind; what is in hand is a list from here on.
    """
    version = lane.version
    if version.backfill_rate is not None:
        # No more at a time than a second's worth.
        limit = min(limit, version.backfill_rate)
    while True:
        rows = session.query(_RANGE, ["bigint"], version.version_id)
        if not rows:
            return None
        row = rows[0]
        ids = _missing(session, lane, row["first_id"], row["end_id"], limit)
        if len(ids) < limit:
            session.query("DELETE FROM embedline.version_queue WHERE queue_id = $1", ["bigint"], row["queue_id"])
        else:
            newest_first = version.backfill_order == "newest_first"
            narrowed = (row["first_id"], ids[-1]) if newest_first else (ids[-1] + 1, row["end_id"])
            session.query(_NARROW, ["bigint", "bigint", "bigint"], row["queue_id"], *narrowed)
        if ids:
            if version.backfill_rate is not None:
                session.query(_THROTTLE, ["bigint", "integer"], version.version_id, len(ids))
            queue_id = session.scalar(_HAND_OUT, ["bigint", "bigint[]", "integer"], version.version_id, ids, worker_id)
            return QueueClaim([ClaimedRow((str(i),)) for i in ids], [int(queue_id)], of_backfill=True)


def _missing(session: Session, lane: Pipeline, first_id: int, end_id: int, limit: int) -> list[int]:
    order = "DESC" if lane.version.backfill_order == "newest_first" else ""
    rows = session.query(
        f"""
        SELECT array_agg(m.chunk_id ORDER BY m.chunk_id {order}) AS ids FROM (
            SELECT c.chunk_id FROM {lane.chunk} AS c
            WHERE c.chunk_id >= $1 AND c.chunk_id < $2 AND {_is_missing(lane)}
            ORDER BY c.chunk_id {order} LIMIT $3
        ) AS m
        """,
        ["bigint", "bigint", "bigint"],
        first_id,
        end_id,
        limit,
    )
    return list(rows[0]["ids"] or [])


def _is_missing(lane: Pipeline) -> str:
    """The condition that a chunk has neither a vector of the version nor a dead letter."""
    return (
        f"NOT EXISTS (SELECT FROM {lane.vectors} AS v WHERE v.chunk_id = c.chunk_id) AND NOT EXISTS ("
        f"SELECT FROM embedline.version_dead_letter AS d WHERE d.version_id = {lane.version.version_id}"
        " AND d.chunk_id = c.chunk_id)"
    )


def finish(session: Session, queue_ids: Sequence[int], worker_id: int | None) -> None:
    """Take settled lists out of the queue, fenced by the claim."""
    session.query(
        "DELETE FROM embedline.version_queue WHERE queue_id = ANY ($1) AND claimed_by IS NOT DISTINCT FROM $2",
        ["bigint[]", "integer"],
        list(queue_ids),
        worker_id,
    )


def give_back(
    session: Session,
    lane: Pipeline,
    rows: Sequence[ClaimedRow],
    delay_seconds: float,
    *,
    charged: bool,
    error: str | None,
    of_backfill: bool,
) -> None:
    """Queue chunks again, to be tried together after a delay; only a `charged` try counts towards the limit of tries."""

    def history(row: ClaimedRow) -> tuple[int, int]:
        return row.attempts if charged else row.attempts - 1, row.crash_count

    for (attempts, crash_count), members in groupby(sorted(rows, key=history), key=history):
        session.query(
            """
            INSERT INTO embedline.version_queue (version_id, chunk_ids, attempts, crash_count, of_backfill, last_error,
                not_before)
            VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp() + make_interval(secs => $7))
            """,
            ["bigint", "bigint[]", "smallint", "smallint", "boolean", "text", "double precision"],
            lane.version.version_id,
            [int(row.key[0]) for row in members],
            attempts,
            crash_count,
            of_backfill,
            None if error is None else error[:_MAX_ERROR_CHARACTERS],
            delay_seconds,
        )


def take_over(session: Session, lane: Pipeline, live: list[int]) -> None:
    """Free lists whose worker died while it had them; their chunks are under suspicion now."""
    session.query(
        "UPDATE embedline.version_queue SET claimed_by = NULL, attempts = greatest(attempts - 1, 0),"
        " crash_count = crash_count + 1 WHERE version_id = $1 AND claimed_by IS NOT NULL AND claimed_by <> ALL ($2)",
        ["bigint", "integer[]"],
        lane.version.version_id,
        live,
    )


def release(session: Session, worker_id: int, queue_ids: Sequence[int] | None = None) -> None:
    """Free what a worker has of all versions, or some of it; the tries are not counted."""
    session.query(
        "UPDATE embedline.version_queue SET claimed_by = NULL, attempts = greatest(attempts - 1, 0)"
        " WHERE claimed_by = $1 AND ($2 IS NULL OR queue_id = ANY ($2))",
        ["integer", "bigint[]"],
        worker_id,
        None if queue_ids is None else list(queue_ids),
    )


def enqueue_range(session: Session, lane: Pipeline) -> None:
    """Queue whatever the version's chunk set holds now as one range. Nothing may write chunks meanwhile."""
    session.query(
        f"""
        INSERT INTO embedline.version_queue (version_id, first_id, end_id, of_backfill)
        SELECT $1, m.first_id, m.last_id + 1, true
        FROM (SELECT min(chunk_id) AS first_id, max(chunk_id) AS last_id FROM {lane.chunk}) AS m WHERE m.first_id IS NOT NULL
        """,
        ["bigint"],
        lane.version.version_id,
    )


def enqueue_lists(session: Session, lane: Pipeline, chunk_ids: Sequence[int]) -> None:
    """Queue chunks as lists of a thousand."""
    for first in range(0, len(chunk_ids), _SWEPT_CHUNKS):
        session.query(
            "INSERT INTO embedline.version_queue (version_id, chunk_ids, of_backfill) VALUES ($1, $2, true)",
            ["bigint", "bigint[]"],
            lane.version.version_id,
            list(chunk_ids[first : first + _SWEPT_CHUNKS]),
        )


def forget_dead_letters(session: Session, lane: Pipeline) -> None:
    """Remove the version's dead letters whose chunk is gone, or has its vector after all."""
    session.query(
        f"DELETE FROM embedline.version_dead_letter AS d WHERE d.version_id = $1 AND (NOT EXISTS ("
        f"SELECT FROM {lane.chunk} AS c WHERE c.chunk_id = d.chunk_id)"
        f" OR EXISTS (SELECT FROM {lane.vectors} AS v WHERE v.chunk_id = d.chunk_id))",
        ["bigint"],
        lane.version.version_id,
    )


def is_behind(session: Session, pipeline: Pipeline) -> bool:
    """Whether chunks are queued for the version: after a cutover the serving one may still have some to embed."""
    return bool(
        session.scalar(
            "SELECT EXISTS (SELECT FROM embedline.version_queue WHERE version_id = $1)",
            ["bigint"],
            pipeline.version.version_id,
        )
    )


def enqueue_missing(session: Session, lane: Pipeline) -> int:
    """Queue chunks that lack a vector and are neither queued nor dead letters, up to 100,000; return how many."""
    return int(
        session.scalar(
            f"""
            WITH missing AS (
                SELECT c.chunk_id, row_number() OVER () AS n FROM {lane.chunk} AS c
                WHERE {_is_missing(lane)} AND c.chunk_id NOT IN (
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
            lane.version.version_id,
        )
    )


def close(session: Session, lane: Pipeline) -> bool:
    """Sweep once a version's backfill is through; mark it complete where no chunk is missing. True where work was found.

    Chunks of the last seconds may be in the queue: waiting for that to be empty would never end under steady writes. A
    version that is further behind is not complete: its model does not keep up with what is written.
    """
    version_id = lane.version.version_id
    if lane.version.state != "backfilling":
        return False
    locked = session.scalar(
        """
        SELECT v.version_id FROM embedline.version AS v
        WHERE v.version_id = $1 AND v.state = 'backfilling'
            AND NOT EXISTS (SELECT FROM embedline.version_queue AS q WHERE q.version_id = $1 AND q.of_backfill)
            -- Chunks of rows that nobody has read yet are missing, too.
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
    forget_dead_letters(session, lane)
    if enqueue_missing(session, lane):
        return True
    session.query(
        "UPDATE embedline.version SET state = 'complete', completed_at = clock_timestamp() WHERE version_id = $1",
        ["bigint"],
        version_id,
    )
    session.execute(f"ANALYZE (SKIP_LOCKED) {lane.vectors}")
    return False
