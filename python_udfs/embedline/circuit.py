"""One circuit breaker a model, shared by all workers: a provider that is down is not asked again and again."""

from __future__ import annotations

from embedline.database import Session
from embedline.retry import circuit_seconds


def is_open(session: Session, model_id: int) -> bool:
    """Whether the model is left alone for now."""
    return bool(
        session.scalar(
            "SELECT open_until > clock_timestamp() FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id
        )
    )


def open_circuit(session: Session, model_id: int, message: str, retry_after: float | None) -> float:
    """Note a failure of the provider as a whole; return the seconds for which the model is left alone.

    The provider's own wish decides; without one, each failure in a row doubles the pause. Failures of requests that were
    on their way when the circuit opened count once.
    """
    found = session.query(
        "SELECT failure_count, open_until > clock_timestamp() AS open FROM embedline.circuit WHERE model_id = $1",
        ["bigint"],
        model_id,
    )
    failures = int(found[0]["failure_count"]) if found else 0
    pause = circuit_seconds(failures - 1 if found and found[0]["open"] else failures, retry_after)
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
    """Forget earlier failures after a success; not while the circuit is open, for the success was asked for earlier."""
    if session.scalar("SELECT 1 FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id):
        session.query(
            "DELETE FROM embedline.circuit WHERE model_id = $1 AND open_until <= clock_timestamp()",
            ["bigint"],
            model_id,
        )
