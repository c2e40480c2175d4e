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


def open_circuit(session: Session, model_id: int, message: str, retry_after: float | None) -> None:
    """Note a failure of the provider as a whole; each in a row doubles the pause."""
    failures = session.scalar("SELECT failure_count FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id)
    session.query(
        """
        INSERT INTO embedline.circuit (model_id, failure_count, open_until, last_error)
        VALUES ($1, 1, clock_timestamp() + make_interval(secs => $2), $3)
        ON CONFLICT (model_id) DO UPDATE SET failure_count = embedline.circuit.failure_count + 1,
            open_until = excluded.open_until, last_error = excluded.last_error
        """,
        ["bigint", "double precision", "text"],
        model_id,
        circuit_seconds(int(failures or 0), retry_after),
        message,
    )


def close_circuit(session: Session, model_id: int) -> None:
    """Forget earlier failures after a success."""
    if session.scalar("SELECT 1 FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id):
        session.query("DELETE FROM embedline.circuit WHERE model_id = $1", ["bigint"], model_id)
