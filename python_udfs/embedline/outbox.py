"""The queue: claiming, giving back, finishing, and giving up changed keys.

A claim is a mark on outbox rows (or on a backfill range) that holds exactly as long as its worker's session advisory
lock. Without a worker id the same statements serve embed_pending, which holds row locks to the end of its transaction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedline.catalog import Pipeline
from embedline.database import CLAIM_LOCK_CLASS, Session, live_workers, quote_ident
from embedline.retry import MAX_CRASHES, ROWS_PER_CLAIM_AFTER_CRASHES

Key = tuple[str, ...]
_MAX_ERROR_CHARACTERS = 500


@dataclass
class ClaimedRow:
    """One source row to look at. `outbox_ids` are all claimed changes of it; empty for a row of a backfill range."""

    key: Key
    outbox_ids: list[int] = field(default_factory=list)
    attempts: int = 1
    crash_count: int = 0


@dataclass(frozen=True)
class ClaimedRange:
    """A claimed stretch of a backfill range and how far the claim reads."""

    range_id: int
    next_tid: str
    exhausted: bool


def claim_changes(session: Session, pipeline: Pipeline, limit: int, worker_id: int | None) -> list[ClaimedRow]:
    """Claim up to `limit` changes in the order they came, folded by key. Attempts are counted before the work begins."""
    if worker_id is not None:
        # Claims of one pipeline follow each other (each takes milliseconds): a claim sees every earlier one, so a key is
        # never in two workers' hands. embed_pending must not hold such a lock to the end of its caller's transaction.
        session.query(
            "SELECT pg_advisory_xact_lock($1, $2)", ["integer", "integer"], CLAIM_LOCK_CLASS, pipeline.pipeline_id
        )
    _take_inbox(session, pipeline, limit)
    live = live_workers(session)
    crashed = session.scalar(
        f"SELECT max(crash_count) FROM {pipeline.outbox} WHERE claimed_by IS NOT NULL AND NOT claimed_by = ANY ($1)",
        ["integer[]"],
        live,
    )
    if crashed is not None:
        wanted = "o.claimed_by IS NOT NULL AND NOT o.claimed_by = ANY ($1) AND o.crash_count = $3"
        limit = min(limit, ROWS_PER_CLAIM_AFTER_CRASHES.get(int(crashed) + 1, 1))
    else:
        wanted = "o.claimed_by IS NULL AND (o.not_before IS NULL OR o.not_before <= now()) AND $3 IS NOT NULL"
    mark = (
        f"UPDATE {pipeline.outbox} AS t SET claimed_by = $4, attempts = t.attempts + 1,"
        " crash_count = t.crash_count + c.crashed FROM folded AS c WHERE t.outbox_id = c.outbox_id"
        " RETURNING t.outbox_id, c.key, t.attempts, t.crash_count"
        if worker_id is not None
        else "SELECT outbox_id, key, attempts + 1 AS attempts, crash_count + crashed AS crash_count FROM folded"
        " WHERE $4::integer IS NULL"
    )
    rows = session.query(
        f"""
        WITH candidate AS MATERIALIZED (
            SELECT o.outbox_id, {pipeline.key_list_of("o")}, o.attempts, o.crash_count,
                (o.claimed_by IS NOT NULL)::integer AS crashed
            FROM {pipeline.outbox} AS o
            WHERE {wanted}
                -- A key that a living worker has in hand waits for it: nothing is embedded twice at the same time.
                AND NOT EXISTS (
                    SELECT FROM {pipeline.outbox} AS busy
                    WHERE busy.claimed_by = ANY ($1) AND {pipeline.key_join("busy", "o")})
            ORDER BY o.outbox_id
            LIMIT $2
            FOR UPDATE OF o SKIP LOCKED
        ), folded AS (
            -- Equal keys may be spelled differently (1.0 and 1.00): all go by the spelling of the first.
            SELECT c.outbox_id, c.attempts, c.crash_count, c.crashed, first_value({pipeline.key_texts_of("c")}) OVER (
                PARTITION BY {pipeline.key_list_of("c")} ORDER BY c.outbox_id) AS key
            FROM candidate AS c
        )
        {mark}
        """,
        ["integer[]", "integer", "integer", "integer"],
        live,
        limit,
        int(crashed or 0),
        worker_id,
    )
    folded: dict[Key, ClaimedRow] = {}
    for row in sorted(rows, key=lambda r: int(r["outbox_id"])):
        claimed = folded.setdefault(tuple(row["key"]), ClaimedRow(tuple(row["key"]), attempts=0))
        claimed.outbox_ids.append(int(row["outbox_id"]))
        claimed.attempts = max(claimed.attempts, int(row["attempts"]))
        claimed.crash_count = max(claimed.crash_count, int(row["crash_count"]))
    return list(folded.values())


def _take_inbox(session: Session, pipeline: Pipeline, limit: int) -> None:
    """Move about `limit` keys, as applications appended them, to the outbox, where each has its own attempts and claim.

    Both statements are one, so that a key is always in exactly one of the two tables. SKIP LOCKED: two workers share
    the work. No order and no index: the scan reads from the front, where the oldest are.
    """
    keys = ", ".join(f"taken.{quote_ident(column)}" for column in pipeline.key_columns)
    session.query(
        f"""
        WITH front AS MATERIALIZED (
            SELECT ctid AS place, cardinality({quote_ident(pipeline.key_columns[0])}) AS key_count
            FROM {pipeline.generated("inbox")} LIMIT $1 FOR UPDATE SKIP LOCKED
        ), counted AS (
            SELECT place, sum(key_count) OVER (ROWS UNBOUNDED PRECEDING) - key_count AS before FROM front
        ), taken AS (
            DELETE FROM {pipeline.generated("inbox")}
            WHERE ctid = ANY (ARRAY(SELECT place FROM counted WHERE before < $1)) RETURNING *
        )
        INSERT INTO {pipeline.outbox} ({pipeline.key_list}, enqueued_at)
        SELECT k.*, taken.enqueued_at FROM taken CROSS JOIN LATERAL unnest({keys}) AS k
        """,
        ["integer"],
        limit,
    )


def claim_backfill(
    session: Session, pipeline: Pipeline, limit: int, worker_id: int | None
) -> tuple[ClaimedRange, list[ClaimedRow]] | None:
    """Claim the next rows of an open backfill range; None where no range is open or all are in other hands."""
    while True:
        rows = session.query(
            """
            WITH candidate AS MATERIALIZED (
                SELECT r.range_id, r.claimed_by FROM embedline.backfill_range AS r
                WHERE r.pipeline_id = $1 AND NOT r.done AND (r.claimed_by IS NULL OR NOT r.claimed_by = ANY ($2))
                ORDER BY r.range_id
                LIMIT 1
                FOR UPDATE SKIP LOCKED
            )
            UPDATE embedline.backfill_range AS r
            SET claimed_by = $3, crash_count = r.crash_count + (c.claimed_by IS NOT NULL)::integer
            FROM candidate AS c WHERE r.range_id = c.range_id
            RETURNING r.range_id, r.relation::bigint AS relation, r.next_tid::text AS next_tid, r.end_tid::text AS end_tid,
                r.crash_count, r.file_node = pg_relation_filenode(r.relation) AS unmoved
            """,
            ["bigint", "integer[]", "integer"],
            pipeline.pipeline_id,
            live_workers(session),
            worker_id,
        )
        if not rows:
            return None
        row = rows[0]
        if row["unmoved"]:
            return _read_range(session, pipeline, row, limit)
        _restart_ranges(session, pipeline, int(row["relation"]))


def _read_range(
    session: Session, pipeline: Pipeline, row: dict[str, object], limit: int
) -> tuple[ClaimedRange, list[ClaimedRow]]:
    crashes = int(str(row["crash_count"]))
    limit = min(limit, ROWS_PER_CLAIM_AFTER_CRASHES.get(crashes, limit if crashes == 0 else 1))
    found = session.query(
        f"SELECT r.row_tid::text AS row_tid, {pipeline.key_texts_of('r')} AS key"
        f" FROM {pipeline.generated('range')}($1::bigint::oid::regclass, $2::tid, $3::tid, $4) AS r",
        ["bigint", "text", "text", "integer"],
        row["relation"],
        row["next_tid"],
        row["end_tid"],
        limit,
    )
    exhausted = len(found) < limit
    next_tid = str(row["end_tid"])
    if not exhausted:
        block, offset = str(found[-1]["row_tid"]).strip("()").split(",")
        next_tid = f"({block},{int(offset) + 1})"
    rows = [ClaimedRow(tuple(r["key"]), crash_count=crashes) for r in found]
    return ClaimedRange(int(str(row["range_id"])), next_tid, exhausted), rows


def _restart_ranges(session: Session, pipeline: Pipeline, relation: int) -> None:
    # VACUUM FULL, CLUSTER, TRUNCATE and some ALTER TABLE write the table anew: every row has moved.
    session.query(
        """
        WITH gone AS (DELETE FROM embedline.backfill_range WHERE pipeline_id = $1 AND relation = $2::oid)
        INSERT INTO embedline.backfill_range (pipeline_id, relation, file_node, next_tid, end_tid)
        SELECT $1, c.oid, pg_relation_filenode(c.oid), format('(%s,0)', b)::tid,
            format('(%s,0)', least(b + 128, size.blocks))::tid
        FROM pg_class AS c
        CROSS JOIN LATERAL (SELECT pg_relation_size(c.oid) / current_setting('block_size')::bigint AS blocks) AS size
        CROSS JOIN LATERAL generate_series(0, size.blocks - 1, 128) AS b
        WHERE c.oid = $2::oid
        """,
        ["bigint", "bigint"],
        pipeline.pipeline_id,
        relation,
    )


def finish_range(session: Session, claimed: ClaimedRange) -> None:
    """Note how far a backfill range has come and give its claim back."""
    session.query(
        "UPDATE embedline.backfill_range SET next_tid = $2::tid, done = $3, claimed_by = NULL, crash_count = 0"
        " WHERE range_id = $1",
        ["bigint", "text", "boolean"],
        claimed.range_id,
        claimed.next_tid,
        claimed.exhausted,
    )


def finish(session: Session, pipeline: Pipeline, rows: Sequence[ClaimedRow], worker_id: int | None) -> None:
    """Take finished changes out of the outbox, fenced by the claim."""
    ids = [outbox_id for row in rows for outbox_id in row.outbox_ids]
    if ids:
        session.query(
            f"DELETE FROM {pipeline.outbox} WHERE outbox_id = ANY ($1) AND claimed_by IS NOT DISTINCT FROM $2"
            if worker_id is not None
            else f"DELETE FROM {pipeline.outbox} WHERE outbox_id = ANY ($1) AND $2::integer IS NULL",
            ["bigint[]", "integer"],
            ids,
            worker_id,
        )


def give_back(
    session: Session, pipeline: Pipeline, row: ClaimedRow, delay_seconds: float, *, charged: bool, error: str | None
) -> None:
    """Put a row back to be tried again after a delay; only a `charged` try counts towards the limit of tries."""
    message = None if error is None else error[:_MAX_ERROR_CHARACTERS]
    if not row.outbox_ids:
        session.query(
            f"INSERT INTO {pipeline.outbox} ({pipeline.key_list}, attempts, not_before, last_error)"
            f" SELECT k.*, $%d, clock_timestamp() + make_interval(secs => $%d), $%d FROM unnest({pipeline.key_arrays()}) AS k"
            % tuple(len(row.key) + n for n in (1, 2, 3)),
            [*pipeline.key_parameter_types, "smallint", "double precision", "text"],
            *([part] for part in row.key),
            int(charged),
            delay_seconds,
            message,
        )
        return
    session.query(
        f"""
        UPDATE {pipeline.outbox} SET claimed_by = NULL, attempts = $2, last_error = coalesce($4, last_error),
            not_before = clock_timestamp() + make_interval(secs => $3)
        WHERE outbox_id = ANY ($1)
        """,
        ["bigint[]", "smallint", "double precision", "text"],
        row.outbox_ids,
        row.attempts if charged else row.attempts - 1,
        delay_seconds,
        message,
    )


def bury(
    session: Session,
    pipeline: Pipeline,
    row: ClaimedRow,
    stage: str,
    error_code: str,
    message: str,
    content_hash: bytes | None,
) -> None:
    """Write a dead letter: the row leaves the queue with its reason, and its outdated chunks leave search."""
    arrays = [[part] for part in row.key]
    count = len(row.key)
    for table in (pipeline.chunk,):
        session.query(
            f"DELETE FROM {table} AS t USING unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
            f" WHERE {pipeline.key_join('t', 'k')}",
            pipeline.key_parameter_types,
            *arrays,
        )
    session.query(
        f"""
        INSERT INTO {pipeline.document} AS d ({pipeline.key_list}, content_hash, state, embedded_at)
        SELECT k.*, ${count + 1}, 'dead', clock_timestamp() FROM unnest({pipeline.key_arrays()}) AS k
        ON CONFLICT ({pipeline.key_list}) DO UPDATE SET content_hash = excluded.content_hash, state = 'dead',
            embedded_at = excluded.embedded_at
        """,
        [*pipeline.key_parameter_types, "bytea"],
        *arrays,
        content_hash,
    )
    session.query(
        """
        INSERT INTO embedline.dead_letter (pipeline_id, key, stage, error_code, message, content_hash, attempts)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        ON CONFLICT (pipeline_id, key) DO UPDATE SET stage = excluded.stage, error_code = excluded.error_code,
            message = excluded.message, content_hash = excluded.content_hash, attempts = excluded.attempts, created_at = now()
        """,
        ["bigint", "jsonb", "text", "text", "text", "bytea", "integer"],
        pipeline.pipeline_id,
        key_json(pipeline, row.key),
        stage,
        error_code,
        message[:_MAX_ERROR_CHARACTERS],
        content_hash,
        row.attempts,
    )


def key_json(pipeline: Pipeline, key: Key) -> str:
    """Return a key as a JSON object of source column to text value, as embedline.dead_letter stores it."""
    return json.dumps(
        {column.removeprefix("key_"): value for column, value in zip(pipeline.key_columns, key, strict=True)}
    )


def was_fatal(row: ClaimedRow) -> bool:
    """Whether the row's workers died so often that the row is taken for the cause."""
    return row.crash_count >= MAX_CRASHES


def note_error(session: Session, pipeline: Pipeline, message: str) -> None:
    """Show an error of the pipeline in embedline.status."""
    session.query(
        "UPDATE embedline.pipeline_health SET last_error = $2, last_error_at = clock_timestamp() WHERE pipeline_id = $1",
        ["bigint", "text"],
        pipeline.pipeline_id,
        message[:_MAX_ERROR_CHARACTERS],
    )


def release_claims(session: Session, pipeline: Pipeline, worker_id: int) -> None:
    """Give back whatever a worker that ends in order still has claimed; the tries are not counted."""
    session.query(
        f"UPDATE {pipeline.outbox} SET claimed_by = NULL, attempts = greatest(attempts - 1, 0) WHERE claimed_by = $1",
        ["integer"],
        worker_id,
    )
    session.query(
        "UPDATE embedline.backfill_range SET claimed_by = NULL WHERE pipeline_id = $1 AND claimed_by = $2",
        ["bigint", "integer"],
        pipeline.pipeline_id,
        worker_id,
    )
