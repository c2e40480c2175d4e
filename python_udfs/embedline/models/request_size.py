"""Learn how many texts a provider takes in one request.

A request that is refused is split by halves. If all of its texts pass in smaller requests, their number was the reason
for the refusal. The largest size that passed is kept in embedline.model, for all workers. From time to time one larger
request is tried, by bisection between the passed and the refused size, because a limit may have been lifted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from embedline.catalog.values import Model
from embedline.postgres.session import Session

# Seconds between two larger requests: while the limit is not known exactly, and once it is.
_TRIAL_SECONDS, _KNOWN_LIMIT_SECONDS = 60.0, 3600.0

# SKIP LOCKED throughout: a worker does not wait for another, and a lost fact will be learned again.
_OURS = "model_id IN (SELECT model_id FROM embedline.model WHERE model_id = $1 FOR NO KEY UPDATE SKIP LOCKED)"
_REMEMBER = f"""
    UPDATE embedline.model SET batch_items = CASE WHEN batch_items < $3 THEN greatest(batch_items, $2) ELSE $2 END,
        batch_items_refused = CASE WHEN batch_items_refused > greatest(batch_items, $2)
            THEN least(batch_items_refused, $3) ELSE $3 END,
        batch_items_at = clock_timestamp()
    WHERE {_OURS}
"""
_GROW = f"""
    UPDATE embedline.model SET batch_items = CASE WHEN $2 < max_batch_items THEN $2 END,
        batch_items_refused = CASE WHEN batch_items_refused > $2 THEN batch_items_refused END
    WHERE batch_items < $2 AND {_OURS}
"""
_TOO_LONG = f"""
    UPDATE embedline.model SET text_size_refused = $2 WHERE coalesce(text_size_refused > $2, true) AND {_OURS}
"""
_TRY = f"""
    UPDATE embedline.model SET batch_items_at = clock_timestamp()
    WHERE batch_items_at < clock_timestamp() - make_interval(secs => $2) AND {_OURS}
    RETURNING 1
"""


@dataclass(eq=False)
class Split:
    """The sizes, in texts, of the requests that a refused request became.

    `is_spoilt` if one failed for another reason.
    """

    refused: set[int] = field(default_factory=set)
    passed: set[int] = field(default_factory=set)
    is_spoilt: bool = False

    @property
    def limit(self) -> tuple[int, int] | None:
        """Return the largest size that passed and the smallest that was refused.

        None if size does not explain the refusals.
        """
        if self.is_spoilt or not self.passed or not self.refused:
            return None
        passed, refused = max(self.passed), min(self.refused)
        return (passed, refused) if passed < refused else None


def remember(session: Session, model: Model, splits: Iterable[Split]) -> None:
    """Store the limit of a model that finished splits show."""
    limits = [split.limit for split in splits]
    for limit in limits:
        if limit is not None:
            session.query(_REMEMBER, ["bigint", "integer", "integer"], model.model_id, *limit)


def note_passed(session: Session, model: Model, size: int) -> None:
    """Store that a request passed with more texts than the model was known to take."""
    if model.batch_items is not None and size > model.batch_items:
        session.query(_GROW, ["bigint", "integer"], model.model_id, size)


def note_too_long(session: Session, model: Model, sizes: Iterable[int]) -> None:
    """Store the size of the shortest text that was refused as too long.

    Each of `sizes` is of a text that passed in halves.
    """
    size = min(sizes, default=None)
    if size is not None and (model.text_size_refused is None or size < model.text_size_refused):
        session.query(_TOO_LONG, ["bigint", "integer"], model.model_id, size)


def size_to_try(session: Session, model: Model, texts: int) -> int | None:
    """Return the size of a larger request to try now, None in most cases."""
    passed, refused, most = model.batch_items, model.batch_items_refused, model.config.max_batch_items
    if passed is None or passed >= min(texts, most):
        return None
    is_known = refused is not None and refused - passed <= 1
    seconds = _KNOWN_LIMIT_SECONDS if is_known else _TRIAL_SECONDS
    if not session.query(_TRY, ["bigint", "double precision"], model.model_id, seconds):
        return None
    if refused is None:
        return min(2 * passed, most)
    return min(refused if is_known else (passed + refused) // 2, most)
