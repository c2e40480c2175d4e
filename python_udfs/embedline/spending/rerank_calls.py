"""Count the calls of rerankers.

Sessions that search may not write the ledger themselves.
"""

from __future__ import annotations

from typing import Any

from embedline.catalog.load import load_reranker
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.spending import ledger

_IS_RERANKING = """
    SELECT EXISTS (SELECT FROM embedline.reservation AS r JOIN embedline.model AS m ON m.model_id = r.model_id
        WHERE r.reservation_id = $1 AND m.task = 'rerank')
"""


@entry_point
def reserve_rerank(session: Session, model_name: str, pipeline_id: int | None, amount: int) -> dict[str, Any]:
    """Reserve one reranking before its call.

    Returns the reservation, None if none is needed. If the model may not be asked now, it returns the reason and the
    seconds to wait.
    """
    model = load_reranker(session, model_name)
    name = session.scalar("SELECT name FROM embedline.pipeline WHERE pipeline_id = $1", ["bigint"], pipeline_id)
    payer = ledger.Payer(model.model_id, model_name)
    if pipeline_id is not None and name is not None:
        payer = ledger.Payer(model.model_id, model_name, pipeline_id, name)
    grant = ledger.reserve_scores(session, payer, max(amount, 1))
    return {
        "reservation_id": grant.reservation_id,
        "wait_seconds": grant.wait_seconds,
        "reason": None if grant.count else grant.reason,
    }


@entry_point
def settle_rerank(session: Session, reservation_id: int, amount: int | None) -> None:
    """Correct a reservation to the provider's count; NULL keeps the estimate.

    Readers may call this, so it leaves the reservations of vectors alone, and takes no negative count.
    """
    if session.scalar(_IS_RERANKING, ["bigint"], reservation_id):
        ledger.settle(session, reservation_id, None if amount is None else max(amount, 0))
