"""Make due at once what waits for a time that only a clock set back can explain.

Rows to be tried again, chunks of versions, signals and circuits wait until a time of the server's clock. If the clock is set
back by a day, they would wait for a day longer.
"""

from __future__ import annotations

from embedline.catalog.load import load_pipelines_by_id
from embedline.catalog.settings import load_settings
from embedline.postgres.session import Session
from embedline.queue.provider_batches import HOLD_SECONDS

# Seconds that no retry exceeds; a model may rest for longer, by a setting.
_LONGEST_RETRY = 300.0
# $1 is the longest wait in seconds. The signal that stands for all others is never due.
_FAR = "> clock_timestamp() + make_interval(secs => $1)"
_PIPELINES = f"""
    SELECT ARRAY(
        SELECT p.pipeline_id FROM embedline.pipeline AS p
        JOIN embedline.signal AS s ON s.pipeline = p.name WHERE s.due_at {_FAR} AND s.due_at < 'infinity'
    )
"""
_SIGNALS = f"""
    UPDATE embedline.signal SET due_at = clock_timestamp() WHERE ctid = ANY (ARRAY(
        SELECT s.ctid FROM embedline.signal AS s WHERE s.due_at {_FAR} AND s.due_at < 'infinity' FOR UPDATE SKIP LOCKED))
"""
# What waits for a provider's batch waits for hours.
_OPEN_BATCH = "EXISTS (SELECT FROM embedline.provider_batch AS b WHERE b.state <> 'done' AND b.version_id = {version})"
_CHUNKS = f"""
    UPDATE embedline.version_queue SET not_before = clock_timestamp() WHERE queue_id IN (
        SELECT q.queue_id FROM embedline.version_queue AS q WHERE q.claimed_by IS NULL AND q.not_before {_FAR}
            AND (NOT {_OPEN_BATCH.format(version="q.version_id")}
                OR q.not_before > clock_timestamp() + make_interval(secs => {2 * HOLD_SECONDS}))
        FOR NO KEY UPDATE SKIP LOCKED)
"""
_CIRCUITS = f"UPDATE embedline.circuit SET open_until = clock_timestamp() WHERE open_until {_FAR}"


def follow_clock(session: Session) -> None:
    """Make due what waits for longer than anything has to.

    Waits for no lock of a claim.
    """
    longest = max(load_settings(session).max_provider_wait_seconds, _LONGEST_RETRY)
    for pipeline in load_pipelines_by_id(session, session.scalar(_PIPELINES, ["double precision"], longest) or ()):
        session.query(
            f"""
            UPDATE {pipeline.outbox} SET not_before = clock_timestamp() WHERE outbox_id IN (
                SELECT o.outbox_id FROM {pipeline.outbox} AS o WHERE o.claimed_by IS NULL AND o.not_before {_FAR}
                    AND (NOT {_OPEN_BATCH.format(version="$2")}
                        OR o.not_before > clock_timestamp() + make_interval(secs => {2 * HOLD_SECONDS}))
                FOR NO KEY UPDATE SKIP LOCKED)
            """,
            ["double precision", "bigint"],
            longest,
            pipeline.version.version_id,
        )
    for statement in (_SIGNALS, _CHUNKS, _CIRCUITS):
        session.query(statement, ["double precision"], longest)
