"""The ledger: requests are reserved before the call and corrected after.

One row for each batch, appended by its worker and changed only by it, so that no row is hot. A reservation whose worker
died stays counted at its estimate: the provider may have done the work. Rows of before the last minutes are rolled up into
one a day, so that the sum over a month stays cheap.

Where a budget or a rate limit applies, reservations follow each other under one advisory lock of the database: each sees
all earlier ones, whichever pipeline or model they were for. A worker holds it until the transaction that reserves ends, a
few milliseconds. embed_pending lives in one long transaction, so it gives the lock back at once. Until it commits, others do
not see its reservations: beside n calls of embed_pending a cap may be passed by their requests in flight. If its
transaction is rolled back, its reservations are too, though the provider was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from embedline.catalog.values import Pipeline
from embedline.postgres.claims import Claims
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import LEDGER_LOCK_CLASS, live_workers
from embedline.postgres.session import Session
from embedline.spending import rate_limits
from embedline.spending.budgets import Cap, admit, load_caps, note_stop
from embedline.spending.rate_limits import RateState

# Second keys of the ledger's lock: for reserving, and for rolling up.
_RESERVE_LOCK, _ROLL_UP_LOCK = 0, 1
# Reservations between two roll-ups by workers. The ledger holds about two minutes and this many rows.
_ROLL_UP_EVERY = 500
_UNMETERED = "embedline.unmetered_pipelines"

_METER = """
    SELECT m.price_per_million_tokens AS price, c.capped, r.rated,
        m.provider <> 'sentence-transformers' OR m.price_per_million_tokens IS NOT NULL OR c.capped OR r.rated AS metered
    FROM embedline.model AS m
    CROSS JOIN LATERAL (SELECT EXISTS (
        SELECT FROM embedline.spending_cap AS s WHERE s.pipeline_id = $1 OR s.model_id = $2) AS capped) AS c
    CROSS JOIN LATERAL (SELECT EXISTS (
        SELECT FROM embedline.rate_limit AS l WHERE l.model_id = $2) AS rated) AS r
    WHERE m.model_id = $2
"""
_RESERVE = """
    INSERT INTO embedline.reservation (model_id, pipeline_id, worker_id, requests, tokens, price)
    VALUES ($1, $2, $3, $4, $5, $6) RETURNING reservation_id
"""
# Fenced by settled_at: a second settlement changes nothing. A row that was rolled up meanwhile stays at its estimate.
_SETTLE = """
    UPDATE embedline.reservation SET tokens = coalesce($2, tokens), settled_at = clock_timestamp()
    WHERE reservation_id = $1 AND settled_at IS NULL
"""
# A rate limit looks back 60 s. An open reservation without a living worker is never settled: it is closed as estimated.
_ROLL_UP = """
    WITH old AS (
        DELETE FROM embedline.reservation AS r
        WHERE r.reserved_at < clock_timestamp() - interval '2 minutes'
            AND (r.settled_at IS NOT NULL OR r.worker_id IS NULL OR NOT r.worker_id = ANY ($1))
        RETURNING r.*
    ), summed AS (
        SELECT (o.reserved_at AT TIME ZONE 'UTC')::date AS day, o.model_id, o.pipeline_id, sum(o.requests) AS requests,
            sum(o.tokens) AS tokens, coalesce(sum(o.tokens * o.price), 0) / 1000000 AS money, count(*) AS row_count,
            range_agg(tstzrange(o.reserved_at, greatest(o.settled_at, o.reserved_at), '[]')) AS busy
        FROM old AS o GROUP BY 1, 2, 3
    ), added AS (
        INSERT INTO embedline.usage_day AS d (day, model_id, pipeline_id, requests, tokens, money, busy_seconds)
        SELECT s.day, s.model_id, s.pipeline_id, s.requests, s.tokens, s.money, (
            SELECT sum(extract(epoch FROM upper(b.span) - lower(b.span))) FROM unnest(s.busy) AS b (span))
        FROM summed AS s
        ON CONFLICT (day, model_id, pipeline_id) DO UPDATE SET requests = d.requests + excluded.requests,
            tokens = d.tokens + excluded.tokens, money = d.money + excluded.money,
            busy_seconds = d.busy_seconds + excluded.busy_seconds
    )
    SELECT coalesce(sum(row_count), 0)::bigint AS row_count FROM summed
"""


@dataclass(frozen=True)
class Grant:
    """The answer to a reservation.

    The first `count` requests may be sent, under `reservation_id`. Where requests are left over, `wait_seconds` says how
    long they have to wait and `reason` for what. `reservation_id` is None where nothing was granted, or where the model has
    no ledger.
    """

    count: int
    reservation_id: int | None
    wait_seconds: float | None
    reason: str | None


@dataclass(frozen=True)
class _Meter:
    price: Decimal | None
    capped: bool
    rated: bool

    @property
    def limited(self) -> bool:
        return self.capped or self.rated


def reserve(session: Session, pipeline: Pipeline, tokens: Sequence[int], claims: Claims) -> Grant:
    """Reserve the requests that are ready, in order.

    `tokens` holds the estimate of each. A request is granted whole or not at all, and none after one that is not. The
    resident worker commits after it and only then sends, so that a crash never sends what is not in the ledger.
    """
    meter = _load_meter(session, pipeline) if tokens and not _known_unmetered(session, pipeline) else None
    if meter is None:
        return Grant(len(tokens), None, None, None)
    if not meter.limited:
        return Grant(len(tokens), _append(session, pipeline, meter, tokens, claims), None, None)
    with claims.serialised(session, LEDGER_LOCK_CLASS, _RESERVE_LOCK):
        grant, stopped = _decide(session, pipeline, meter, tokens)
        if stopped and claims.is_resident:
            # embed_pending reports and ends; only a worker would claim the same rows again and again.
            note_stop(session, pipeline.pipeline_id, tokens[grant.count])
        if not grant.count:
            return grant
        reservation_id = _append(session, pipeline, meter, tokens[: grant.count], claims)
        return Grant(grant.count, reservation_id, grant.wait_seconds, grant.reason)


def settle(session: Session, reservation_id: int, tokens_used: int | None) -> None:
    """Correct a reservation to what the provider counted.

    None means: it did not say, the estimate stays.
    """
    session.query(_SETTLE, ["bigint", "bigint"], reservation_id, tokens_used)


def blocked_until(session: Session, pipeline: Pipeline) -> float | None:
    """Return the seconds for which a claim of this pipeline makes no sense.

    None means: go on.
    """
    meter = _load_meter(session, pipeline)
    if meter is None or not meter.limited:
        return None
    waits = [cap.seconds for cap in _load_caps(session, pipeline, meter) if cap.is_exhausted(meter.price)]
    # The smallest request there is: a larger one may still have to wait, but something can go.
    _, wait, _ = _load_rates(session, pipeline, meter).admit([1])
    if wait is not None:
        waits.append(wait)
    return max(waits, default=None)


def tokens_left(session: Session, pipeline: Pipeline) -> int | None:
    """Return the tokens that a request may have to fit every budget and limit.

    None means no limit. What is packed larger than this can never be granted by the budget that it finds.
    """
    meter = None if _known_unmetered(session, pipeline) else _load_meter(session, pipeline)
    if meter is None or not meter.limited:
        return None
    left = [cap.tokens_left(meter.price) for cap in _load_caps(session, pipeline, meter)]
    window = _load_rates(session, pipeline, meter).tokens
    if window is not None:
        left.append(window.limit)
    tightest = min(left, default=float("inf"))
    return None if tightest == float("inf") else max(int(tightest), 0)


@entry_point
def roll_up_usage(session: Session) -> int:
    """Sum up what is older than two minutes by day, model and pipeline.

    Return the number of reservations that it took in.
    """
    return roll_up(session)


def roll_up(session: Session) -> int:
    """Roll the ledger up, unless another session is at it.

    Return the number of reservations taken in.
    """
    alone = session.scalar(
        "SELECT pg_try_advisory_xact_lock($1, $2)", ["integer"] * 2, LEDGER_LOCK_CLASS, _ROLL_UP_LOCK
    )
    return int(session.scalar(_ROLL_UP, ["integer[]"], live_workers(session))) if alone else 0


def _load_meter(session: Session, pipeline: Pipeline) -> _Meter | None:
    """Return what applies to the pipeline.

    None where it needs no ledger, which holds until the pipeline's next claim.
    """
    model_id = pipeline.version.model.model_id
    row = session.query(_METER, ["bigint", "bigint"], pipeline.pipeline_id, model_id)[0]
    unmetered: set[tuple[int, int]] = session.cache.setdefault(_UNMETERED, set())
    if not row["metered"]:
        unmetered.add((pipeline.pipeline_id, model_id))
        return None
    unmetered.discard((pipeline.pipeline_id, model_id))
    return _Meter(row["price"], row["capped"], row["rated"])


def _known_unmetered(session: Session, pipeline: Pipeline) -> bool:
    # Versions of one pipeline have models of their own: one may cost nothing, the next is paid for.
    unmetered: set[tuple[int, int]] = session.cache.get(_UNMETERED, set())
    return (pipeline.pipeline_id, pipeline.version.model.model_id) in unmetered


def _load_caps(session: Session, pipeline: Pipeline, meter: _Meter) -> list[Cap]:
    if not meter.capped:
        return []
    return load_caps(session, pipeline.pipeline_id, pipeline.name, pipeline.version.model.config.name)


def _load_rates(session: Session, pipeline: Pipeline, meter: _Meter) -> RateState:
    return (
        rate_limits.load_rate_state(session, pipeline.version.model.model_id) if meter.rated else RateState(None, None)
    )


def _decide(session: Session, pipeline: Pipeline, meter: _Meter, tokens: Sequence[int]) -> tuple[Grant, bool]:
    """Return what budgets and rate limits allow, and True if a budget stops the rest."""
    affordable, cap = admit(_load_caps(session, pipeline, meter), meter.price, tokens)
    count, wait, reason = _load_rates(session, pipeline, meter).admit(tokens[:affordable])
    if count < affordable or cap is None:
        return Grant(count, None, wait, reason), False
    return Grant(count, None, cap.seconds, cap.reason(meter.price, sum(tokens[:count]), tokens[count])), True


def _append(session: Session, pipeline: Pipeline, meter: _Meter, tokens: Sequence[int], claims: Claims) -> int:
    reservation_id = int(
        session.scalar(
            _RESERVE,
            ["bigint", "bigint", "integer", "integer", "bigint", "numeric"],
            pipeline.version.model.model_id,
            pipeline.pipeline_id,
            claims.worker_id,
            len(tokens),
            sum(tokens),
            meter.price,
        )
    )
    if claims.is_resident and reservation_id % _ROLL_UP_EVERY == 0:
        roll_up(session)
    return reservation_id
