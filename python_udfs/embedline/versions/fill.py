"""Set order and rate of a version's fill; accept chunks it could not embed."""

from __future__ import annotations

from embedline.catalog.load import load_version
from embedline.catalog.rights import require_control
from embedline.core.recipe import BackfillSpec
from embedline.errors import InvalidParameter, NotReady
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.queue import chunk_queue

_BACKFILL_ORDERS = ("oldest_first", "newest_first")
_QUARANTINED = "DELETE FROM embedline.version_dead_letter WHERE version_id = $1 RETURNING chunk_id"


def check_backfill(spec: BackfillSpec) -> None:
    """Raise unless the values can be a backfill's order and rate."""
    if spec.order not in _BACKFILL_ORDERS:
        raise InvalidParameter(
            f'backfill_order "{spec.order}" is not known', hint=f"Use one of {', '.join(_BACKFILL_ORDERS)}."
        )
    if spec.rate is not None and spec.rate < 1:
        raise InvalidParameter(
            f"backfill_rate must be at least 1 chunk a second, not {spec.rate}", hint="NULL sets no limit."
        )


def store_backfill(session: Session, version_id: int, spec: BackfillSpec) -> None:
    """Set the order and the rate of a version's backfill, which count from now on."""
    session.query(
        "UPDATE embedline.version SET backfill_order = $2, backfill_rate = $3, backfill_due_at = clock_timestamp()"
        " WHERE version_id = $1",
        ["bigint", "text", "integer"], version_id, spec.order, spec.rate,
    )  # fmt: skip


@entry_point
def configure_backfill(session: Session, name: str, number: int, order: str | None, rate: int | None) -> None:
    """Set the order and rate of a version's fill, from the next claim on.

    Without an order it stays as it is.
    """
    require_control(session, name)
    version = load_version(session, name, number).version
    wanted = BackfillSpec(order or version.backfill_order, rate)
    check_backfill(wanted)
    store_backfill(session, version.version_id, wanted)


@entry_point
def accept_dead_letters(session: Session, name: str, number: int) -> int:
    """Accept that a version lacks the chunks that it could not embed.

    Returns how many are accepted now.

    Refused where nothing else is embedded: such a version is not one with a few gaps.
    """
    require_control(session, name)
    pipeline = load_version(session, name, number)
    if session.scalar(f"SELECT 1 FROM {pipeline.vectors} LIMIT 1") is None:
        raise NotReady(
            f'version {number} of pipeline "{name}" has no vector at all',
            hint=f"SELECT error_code, message, count(*) FROM embedline.version_dead_letter WHERE version_id ="
            f" {pipeline.version.version_id} GROUP BY 1, 2; shows why.",
        )
    return len(
        session.query(
            "UPDATE embedline.version_dead_letter SET accepted_by = session_user"
            " WHERE version_id = $1 AND accepted_by IS NULL RETURNING 1",
            ["bigint"],
            pipeline.version.version_id,
        )
    )


@entry_point
def requeue_version(session: Session, name: str, number: int) -> int:
    """Queue the chunks that a version could not embed; return how many.

    Their tries are counted from zero.
    """
    require_control(session, name)
    pipeline = load_version(session, name, number)
    rows = session.query(_QUARANTINED, ["bigint"], pipeline.version.version_id)
    chunk_queue.enqueue_lists(session, pipeline, [int(row["chunk_id"]) for row in rows])
    return len(rows)
