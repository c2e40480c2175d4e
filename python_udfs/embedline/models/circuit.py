"""Keep one circuit breaker for each model, shared by all workers.

A provider that is down is not asked again and again.
"""

from __future__ import annotations

from embedline.catalog.load import load_all_pipelines, load_model
from embedline.catalog.settings import load_settings
from embedline.core.retry import circuit_seconds
from embedline.models.pool import renew_embedders
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session


def is_open(session: Session, model_id: int) -> bool:
    """Return True if the model must not be asked now."""
    return bool(
        session.scalar(
            "SELECT open_until > clock_timestamp() FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id
        )
    )


def open_circuit(session: Session, model_id: int, message: str, retry_after: float | None) -> float:
    """Record a failure of the whole provider; return how long the circuit stays open.

    The result is in seconds. The wait that the provider asks for decides, up to the setting max_provider_wait_seconds.
    Without one, each failure in a row doubles the pause. All failures of requests that were in flight when the circuit
    opened count once.
    """
    found = session.query(
        "SELECT failure_count, open_until > clock_timestamp() AS open FROM embedline.circuit WHERE model_id = $1",
        ["bigint"],
        model_id,
    )
    failures = int(found[0]["failure_count"]) if found else 0
    pause = circuit_seconds(failures - 1 if found and found[0]["open"] else failures, retry_after)
    pause = min(pause, load_settings(session).max_provider_wait_seconds)
    session.query(
        """
        INSERT INTO embedline.circuit (model_id, failure_count, open_until, last_error)
        VALUES ($1, 1, clock_timestamp() + make_interval(secs => $2), $3)
        ON CONFLICT (model_id) DO UPDATE SET last_error = excluded.last_error,
            failure_count = embedline.circuit.failure_count + (embedline.circuit.open_until <= clock_timestamp())::integer,
            open_until = greatest(embedline.circuit.open_until, excluded.open_until)
        """,
        ["bigint", "double precision", "text"],
        model_id,
        pause,
        message,
    )
    return pause


def close_circuit(session: Session, model_id: int) -> None:
    """Forget earlier failures after a success.

    Nothing changes while the circuit is open, because the successful request was sent before it opened.
    """
    if session.scalar("SELECT 1 FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id):
        session.query(
            "DELETE FROM embedline.circuit WHERE model_id = $1 AND open_until <= clock_timestamp()",
            ["bigint"],
            model_id,
        )


@entry_point
def resume_model(session: Session, name: str) -> int:
    """Close a model's circuit and make its waiting rows due.

    Returns the number of rows and chunks that waited for their retry and are due now.
    """
    model_id = load_model(session, name).model_id
    session.query("DELETE FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id)
    # Other sessions wait a second at most.
    renew_embedders(session, model_id)
    freed = 0
    for pipeline in load_all_pipelines(session):
        if pipeline.version.model.model_id == model_id:
            freed += len(
                session.query(
                    f"""
                    UPDATE {pipeline.outbox} SET not_before = now() WHERE outbox_id IN (
                        SELECT outbox_id FROM {pipeline.outbox} WHERE claimed_by IS NULL AND not_before > now()
                        FOR NO KEY UPDATE SKIP LOCKED)
                    RETURNING 1
                    """
                )
            )
    freed += int(
        session.scalar(
            """
            WITH freed AS (
                UPDATE embedline.version_queue SET not_before = now() WHERE queue_id IN (
                    SELECT q.queue_id FROM embedline.version_queue AS q JOIN embedline.version AS v USING (version_id)
                    WHERE v.model_id = $1 AND q.claimed_by IS NULL AND q.not_before > now()
                    FOR NO KEY UPDATE OF q SKIP LOCKED)
                RETURNING cardinality(chunk_ids) AS count
            )
            SELECT coalesce(sum(count), 0) FROM freed
            """,
            ["bigint"],
            model_id,
        )
    )
    return freed
