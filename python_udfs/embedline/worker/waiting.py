"""Whether something waits for a worker that ends once nothing does."""

from __future__ import annotations

from collections.abc import Sequence

from embedline.postgres.session import Session
from embedline.postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of

# Whether something waits in an active pipeline of that name, or any, apart from those pipelines and versions.
_IS_WAITING = """
    WITH served AS MATERIALIZED (
        SELECT p.pipeline_id, p.name FROM embedline.pipeline AS p JOIN pg_class AS c ON c.oid = p.source
        WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1)
    )
    SELECT EXISTS (
        SELECT FROM embedline.version_queue AS q JOIN embedline.version AS v ON v.version_id = q.version_id
        JOIN served AS p ON p.pipeline_id = v.pipeline_id WHERE q.version_id <> ALL ($3)
            -- Others wait for a provider's batch.
            AND (q.first_id IS NOT NULL OR q.claimed_by IS NOT NULL OR q.not_before < clock_timestamp() + interval '1 hour')
    ) OR EXISTS (
        SELECT FROM embedline.provider_batch AS b JOIN served AS p ON p.pipeline_id = b.pipeline_id
        WHERE b.state IN ('collecting', 'sending') AND b.last_error IS NULL
    ) OR (
        SELECT bool_or(s.pending > s.in_batches OR s.backfill_done < s.backfill_total) FROM embedline.status AS s
        WHERE s.pipeline IN (SELECT name FROM served) AND s.pipeline <> ALL ($2)
    )
"""


def is_anything_waiting(
    session: Session, pipeline_name: str | None, without_pipelines: Sequence[str], without_versions: Sequence[int]
) -> bool:
    """Return True if something waits in the pipeline named, or any.

    Some pipelines and versions do not count.
    """
    try:
        return bool(
            session.scalar(
                _IS_WAITING,
                ["text", "text[]", "bigint[]"],
                pipeline_name,
                list(without_pipelines),
                list(without_versions),
            )
        )
    except Exception as error:
        # An application has locked a table of it, which may leave rows behind.
        if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
            raise
        return True
