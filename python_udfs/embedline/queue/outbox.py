"""The outbox: changed keys with a history of their own.

They failed before, were busy, or were in flight when a worker died. A worker's claim is a mark on outbox rows that counts
exactly as long as its session advisory lock. embed_pending marks nothing: it holds row locks to the end of its caller's
transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embedline.catalog.values import Pipeline
from embedline.core.sql_text import quote_ident
from embedline.postgres.claims import Claims
from embedline.postgres.session import Session

Key = tuple[str, ...]
_MAX_ERROR_CHARACTERS = 500
# Seconds until a key that another worker has in flight is tried again.
_BUSY_SECONDS = 0.1
# Tenants of one claim.
_TENANTS_A_CLAIM = 100


@dataclass(slots=True)
class ClaimedRow:
    """One source row that is in flight.

    `outbox_ids` are its claimed rows of the outbox; none if it came from the inbox or from a range of the backfill.
    """

    key: Key
    outbox_ids: list[int] = field(default_factory=list)
    attempts: int = 1
    crash_count: int = 0
    # Whether its change may wait for a provider's batch.
    may_wait: bool = False


@dataclass(frozen=True)
class Retry:
    """When and how rows are tried again.

    Only a `charged` try counts towards the limit of tries. A backfill is not complete before its rows (`of_backfill`) are
    through.
    """

    delay_seconds: float
    charged: bool
    error: str | None
    of_backfill: bool = False

    @property
    def message(self) -> str | None:
        """Return the error at the length that is stored."""
        return None if self.error is None else self.error[:_MAX_ERROR_CHARACTERS]

    def attempts(self, row: ClaimedRow) -> int:
        """Return the tries of a row that count."""
        return row.attempts if self.charged else row.attempts - 1


def in_flight_query(pipeline: Pipeline, live: str) -> str:
    """Return the query of the keys that living workers have in flight.

    `live` is the parameter with their ids.
    """
    arrays = ", ".join(f"c.{quote_ident(column)}" for column in pipeline.key_columns)
    slices = ", ".join(f"r.keys[{i + 1}:{i + 1}]::{key_type}[]" for i, key_type in enumerate(pipeline.key_types))
    return (
        f"SELECT {pipeline.key_list_of('k')} FROM {pipeline.generated('claim')} AS c CROSS JOIN LATERAL unnest({arrays})"
        f" AS k ({pipeline.key_list}) WHERE c.claimed_by = ANY ({live})"
        f" UNION ALL SELECT {pipeline.key_list_of('k')} FROM embedline.backfill_range AS r"
        f" CROSS JOIN LATERAL unnest({slices}) AS k ({pipeline.key_list})"
        f" WHERE r.pipeline_id = {pipeline.pipeline_id} AND NOT r.done AND r.claimed_by = ANY ({live})"
        f" UNION ALL SELECT {pipeline.key_list_of('b')} FROM {pipeline.outbox} AS b WHERE b.claimed_by = ANY ({live})"
    )


def claim_due(
    session: Session, pipeline: Pipeline, limit: int, claims: Claims, live: list[int], *, crash_count: int = 0
) -> list[ClaimedRow]:
    """Claim up to `limit` rows that are due, folded by key.

    Tries are counted before the work begins. `crash_count` selects the rows that were in flight in that many crashes: these
    are tried apart from all others.
    """
    return _claimed(
        session.query(
            f"""
            WITH candidate AS MATERIALIZED (
                SELECT o.outbox_id, {pipeline.key_list_of("o")}, o.attempts, o.crash_count
                FROM {pipeline.outbox} AS o
                WHERE o.claimed_by IS NULL AND o.not_before <= (SELECT clock_timestamp()) AND o.crash_count = $3
                ORDER BY o.not_before, o.outbox_id LIMIT $1 FOR UPDATE OF o SKIP LOCKED
            )
            {_mark(pipeline, is_marked=claims.is_resident)}
            """,
            ["integer", "integer[]", "integer", *claims.types],
            limit,
            live,
            crash_count,
            *claims.values,
        )
    )


def most_crashes(session: Session, pipeline: Pipeline) -> int | None:
    """Return the number of crashes that the most suspected rows were in.

    Only rows that are due count; None if there are none.
    """
    found: int | None = session.scalar(
        f"SELECT max(crash_count) FROM {pipeline.outbox} WHERE claimed_by IS NULL AND crash_count > 0"
        " AND not_before <= (SELECT clock_timestamp())"
    )
    return found


def claim_in_turns(
    session: Session, pipeline: Pipeline, limit: int, claims: Claims, live: list[int], after: str | None
) -> tuple[list[ClaimedRow], str | None]:
    """Claim up to `limit` due rows, as many of each tenant.

    Return them and the tenant after which to go on. Up to 100 tenants have their turn at once. The index (tenant,
    outbox_id) is read tenant by tenant, so the cost does not grow with the backlog of one. What some leave of their share
    goes to the rows that have waited longest.
    """
    tenants = _next_tenants(session, pipeline, after)
    rows = _claimed(
        session.query(
            f"""
            WITH candidate AS MATERIALIZED (
                SELECT d.* FROM unnest($3::text[]) AS t (tenant) CROSS JOIN LATERAL (
                    SELECT o.outbox_id, {pipeline.key_list_of("o")}, o.attempts, o.crash_count FROM {pipeline.outbox} AS o
                    WHERE o.tenant = t.tenant AND o.claimed_by IS NULL
                        AND o.not_before <= (SELECT clock_timestamp()) AND o.crash_count = 0
                    ORDER BY o.outbox_id LIMIT $1 FOR UPDATE OF o SKIP LOCKED
                ) AS d
            )
            {_mark(pipeline, is_marked=claims.is_resident)}
            """,
            ["integer", "integer[]", "text[]", *claims.types],
            max(1, limit // (len(tenants) + 1)),
            live,
            tenants,
            *claims.values,
        )
    )
    if len(rows) < limit:
        taken = {row.key for row in rows}
        rest = claim_due(session, pipeline, limit - len(rows), claims, live)
        rows += [row for row in rest if row.key not in taken]
    return rows, tenants[-1] if len(tenants) == _TENANTS_A_CLAIM else None


def _next_tenants(session: Session, pipeline: Pipeline, after: str | None) -> list[str]:
    row = session.query(
        f"""
        WITH RECURSIVE turn AS (
            (SELECT o.tenant, 1 AS n FROM {pipeline.outbox} AS o WHERE o.tenant > $1 ORDER BY o.tenant LIMIT 1)
            UNION ALL
            SELECT (SELECT o.tenant FROM {pipeline.outbox} AS o WHERE o.tenant > turn.tenant ORDER BY o.tenant LIMIT 1),
                turn.n + 1
            FROM turn WHERE turn.tenant IS NOT NULL AND turn.n < $2
        )
        SELECT array_agg(tenant ORDER BY n) FILTER (WHERE tenant IS NOT NULL) AS tenants FROM turn
        """,
        ["text", "integer"],
        after or "",
        _TENANTS_A_CLAIM,
    )[0]
    return list(row["tenants"] or [])


def _mark(pipeline: Pipeline, *, is_marked: bool) -> str:
    """Return the end of a claiming statement, which returns the free candidates.

    They are marked with $4 if wanted.
    """
    judged = f"""
        , judged AS MATERIALIZED (
            -- Equal keys may be spelled differently (1.0 and 1.00): all go by the spelling of the first.
            SELECT c.*, ({pipeline.key_list_of("c")}) IN ({in_flight_query(pipeline, "$2")}) AS busy,
                first_value({pipeline.key_texts_of("c")}) OVER (
                    PARTITION BY {pipeline.key_list_of("c")} ORDER BY c.outbox_id) AS key
            FROM candidate AS c
        )"""
    if not is_marked:
        return f"""{judged}
            SELECT outbox_id, key, attempts + 1 AS attempts, crash_count FROM judged WHERE NOT busy"""
    return f"""{judged}
        , claimed AS (
            UPDATE {pipeline.outbox} AS t SET claimed_by = CASE WHEN j.busy THEN NULL ELSE $4 END,
                attempts = t.attempts + (NOT j.busy)::integer,
                not_before = CASE WHEN j.busy THEN clock_timestamp() + make_interval(secs => {_BUSY_SECONDS})
                    ELSE t.not_before END
            FROM judged AS j WHERE t.outbox_id = j.outbox_id
            RETURNING t.outbox_id, j.key, t.attempts, t.crash_count, j.busy
        )
        SELECT outbox_id, key, attempts, crash_count FROM claimed WHERE NOT busy"""


def _claimed(rows: Sequence[dict[str, Any]]) -> list[ClaimedRow]:
    folded: dict[Key, ClaimedRow] = {}
    for row in sorted(rows, key=lambda r: int(r["outbox_id"])):
        key: Key = tuple(row["key"])
        claimed = folded.setdefault(key, ClaimedRow(key, attempts=0))
        claimed.outbox_ids.append(row["outbox_id"])
        claimed.attempts = max(claimed.attempts, row["attempts"])
        claimed.crash_count = max(claimed.crash_count, row["crash_count"])
    return list(folded.values())


def finish(session: Session, pipeline: Pipeline, rows: Sequence[ClaimedRow], claims: Claims) -> None:
    """Remove finished changes from the outbox, fenced by the claim."""
    ids = [outbox_id for row in rows for outbox_id in row.outbox_ids]
    if ids:
        session.query(
            f"DELETE FROM {pipeline.outbox} WHERE outbox_id = ANY ($1){claims.fence(2)}",
            ["bigint[]", *claims.types],
            ids,
            *claims.values,
        )


def requeue(
    session: Session, pipeline: Pipeline, rows: Sequence[ClaimedRow], retry: Retry, *, enqueued_at: str | None = None
) -> list[int]:
    """Put rows back, to be tried again together after a delay.

    Return their numbers in the outbox. Rows of the inbox keep the time of their change, because the vectors of deleted rows
    are kept for older changes.
    """
    fresh = [row for row in rows if not row.outbox_ids]
    known = [row for row in rows if row.outbox_ids]
    count = len(pipeline.key_columns)
    numbers = [outbox_id for row in known for outbox_id in row.outbox_ids]
    if fresh:
        added = session.query(
            f"INSERT INTO {pipeline.outbox} ({pipeline.key_list}, attempts, crash_count, not_before, last_error, of_backfill,"
            " enqueued_at)"
            f" SELECT k.*, (SELECT clock_timestamp()) + make_interval(secs => ${count + 3}), ${count + 4}, ${count + 5},"
            f" coalesce(${count + 6}::timestamptz, now())"
            f" FROM unnest({pipeline.key_arrays()}, ${count + 1}, ${count + 2}) AS k RETURNING outbox_id",
            [*pipeline.key_parameter_types, "smallint[]", "smallint[]", "double precision", "text", "boolean", "text"],
            *key_columns([row.key for row in fresh], count),
            [retry.attempts(row) for row in fresh],
            [row.crash_count for row in fresh],
            retry.delay_seconds,
            retry.message,
            retry.of_backfill,
            enqueued_at,
        )
        numbers += [int(row["outbox_id"]) for row in added]
    if known:
        pairs = [(i, retry.attempts(row)) for row in known for i in row.outbox_ids]
        session.query(
            f"""
            UPDATE {pipeline.outbox} AS o SET claimed_by = NULL, attempts = g.attempts,
                last_error = coalesce($4, o.last_error), not_before = (SELECT clock_timestamp()) + make_interval(secs => $3)
            FROM unnest($1, $2) AS g (outbox_id, attempts) WHERE o.outbox_id = g.outbox_id
            """,
            ["bigint[]", "smallint[]", "double precision", "text"],
            [outbox_id for outbox_id, _ in pairs],
            [attempts for _, attempts in pairs],
            retry.delay_seconds,
            retry.message,
        )
    return numbers


def reclaim_from_dead_workers(session: Session, pipeline: Pipeline, dead: list[int]) -> None:
    """Free outbox rows that were in flight when their worker died."""
    session.query(
        f"UPDATE {pipeline.outbox} SET claimed_by = NULL, crash_count = crash_count + 1 WHERE claimed_by = ANY ($1)",
        ["integer[]"],
        dead,
    )


def release(session: Session, pipeline: Pipeline, worker_id: int, outbox_ids: list[int] | None = None) -> None:
    """Free all rows of a worker, or some of them; the tries are not counted."""
    session.query(
        f"UPDATE {pipeline.outbox} SET claimed_by = NULL, attempts = greatest(attempts - 1, 0)"
        " WHERE claimed_by = $1 AND ($2 IS NULL OR outbox_id = ANY ($2))",
        ["integer", "bigint[]"],
        worker_id,
        outbox_ids,
    )


def key_columns(keys: Sequence[Key], count: int) -> list[list[str]]:
    """Turn keys into one list for each key column, as array parameters take them."""
    return [[key[i] for key in keys] for i in range(count)]
