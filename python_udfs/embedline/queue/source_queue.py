"""The queues of a pipeline's source together: inbox, outbox, backfill."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.catalog.values import Pipeline
from embedline.postgres.claims import Claims
from embedline.postgres.session import Session
from embedline.queue import backfill, inbox
from embedline.queue.claim import Claim
from embedline.queue.outbox import ClaimedRow


def peek(session: Session, pipeline: Pipeline, live: list[int]) -> dict[str, bool]:
    """Return what can be claimed now, or is to be freed, in one statement.

    `live` are the workers whose claims count.
    """
    return session.query(
        f"""
        SELECT s.fresh, s.due, s.fresh OR s.due AS queued, s.unread,
            EXISTS (SELECT FROM {pipeline.generated("deleted")})
            OR EXISTS (SELECT FROM {pipeline.generated("lent")}) AS deleted,
            EXISTS (SELECT FROM {pipeline.outbox} WHERE claimed_by IS NULL AND crash_count > 0
                AND not_before <= (SELECT clock_timestamp()))
            OR EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done
                AND claimed_by IS NULL AND crash_count > 0) AS suspected,
            EXISTS (SELECT FROM {pipeline.generated("claim")} WHERE claimed_by <> ALL ($1))
            OR EXISTS (SELECT FROM {pipeline.outbox} WHERE claimed_by IS NOT NULL AND claimed_by <> ALL ($1))
            OR EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done
                AND claimed_by <> ALL ($1)) AS orphaned
        FROM (
            SELECT EXISTS (SELECT FROM {pipeline.generated("inbox")}) AS fresh,
                -- Asked of the first in the index; asked of any that is due, all of a long queue would be read in vain.
                coalesce((SELECT not_before FROM {pipeline.outbox} WHERE claimed_by IS NULL AND crash_count = 0
                    ORDER BY not_before LIMIT 1) <= clock_timestamp(), false) AS due,
                EXISTS (SELECT FROM embedline.backfill_range WHERE pipeline_id = $2 AND NOT done
                    AND claimed_by IS NULL AND crash_count = 0) AS unread
        ) AS s
        """,
        ["integer[]", "bigint"],
        live,
        pipeline.pipeline_id,
    )[0]


def claimants(session: Session, pipeline: Pipeline) -> set[int]:
    """Return the workers that have something of the pipeline in flight, alive or not."""
    found = session.scalar(
        f"""
        SELECT array_agg(DISTINCT c.claimed_by) FROM (
            SELECT claimed_by FROM {pipeline.generated("claim")}
            UNION ALL SELECT claimed_by FROM {pipeline.outbox} WHERE claimed_by IS NOT NULL
            UNION ALL SELECT claimed_by FROM embedline.backfill_range WHERE pipeline_id = $1 AND claimed_by IS NOT NULL
        ) AS c
        """,
        ["bigint"],
        pipeline.pipeline_id,
    )
    return set(found or ())


def narrow(session: Session, pipeline: Pipeline, claim: Claim, put_back: Sequence[ClaimedRow], claims: Claims) -> None:
    """Take rows out of a claim that are in the outbox again.

    Other workers may have them at once.
    """
    if not put_back:
        return
    gone = {row.key for row in put_back}
    kept = [row.key for row in claim.rows if row.key not in gone]
    if claim.claim_id is not None:
        inbox.narrow_claim(session, pipeline, claim.claim_id, kept, claims)
    if claim.range_id is not None and claims.is_resident:
        backfill.show_keys(session, pipeline, claim.range_id, kept)
