"""Reserve the tokens of requests before the call, and correct them afterwards.

There is one row for each batch. Only the batch's worker writes it, so that no row is hot. If a worker dies, its
reservation stays counted at its estimate, because the provider may have done the work. Rows older than the last minutes
are rolled up into one per day, so that the sum over a month stays cheap.

If a budget or a rate limit applies, reservations follow each other under one advisory lock of the database. Each sees
all earlier ones, whichever pipeline or model they were for. A worker holds the lock until the transaction that reserves
ends, a few milliseconds.

embed_pending lives in one long transaction, so it releases the lock at once. Until it commits, others do not see its
reservations: beside n calls of embed_pending a cap may be exceeded by their requests in flight. If its transaction is
rolled back, so are its reservations, although the provider was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from embedline.catalog.values import Pipeline
from embedline.core.prices import BATCH_PRICE_SHARE
from embedline.errors import NotReady
from embedline.postgres.claims import CALLERS_TRANSACTION, Claims
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import LEDGER_LOCK_CLASS, live_workers
from embedline.postgres.session import Session
from embedline.spending import rate_limits
from embedline.spending.budgets import Cap, admit, load_caps, note_stop
from embedline.spending.rate_limits import RateState

# Second keys of the ledger's lock: for reserving, and for rolling up.
_RESERVE_LOCK, _ROLL_UP_LOCK = 0, 1
# Reservations after which a worker rolls the ledger up. About two minutes and this many rows remain.
_ROLL_UP_EVERY = 500
# Stands in the ledger for "no pipeline"; the ids of pipelines begin at 1.
NO_PIPELINE = 0
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
    INSERT INTO embedline.reservation (model_id, pipeline_id, worker_id, requests, tokens, price, is_batch)
    VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING reservation_id
"""
# Fenced by settled_at, so that a second settlement changes nothing. A row that was rolled up meanwhile keeps its
# estimate.
_SETTLE = """
    UPDATE embedline.reservation SET tokens = coalesce($2, tokens), settled_at = clock_timestamp()
    WHERE reservation_id = $1 AND settled_at IS NULL
"""
# A rate limit needs the last 60 s. An open reservation without a living worker is closed at its estimate, unless it is that of
# a batch that the provider still has.
_ROLL_UP = """
    WITH old AS (
        DELETE FROM embedline.reservation AS r
        WHERE r.reserved_at < clock_timestamp() - interval '2 minutes'
            AND (r.settled_at IS NOT NULL OR r.worker_id IS NULL OR NOT r.worker_id = ANY ($1))
            AND NOT (r.is_batch AND r.settled_at IS NULL AND EXISTS (
                SELECT FROM embedline.provider_batch AS b
                WHERE b.reservation_id = r.reservation_id AND b.state <> 'done'))
        RETURNING r.*
    ), summed AS (
        SELECT (o.reserved_at AT TIME ZONE 'UTC')::date AS day, o.model_id, o.pipeline_id, sum(o.requests) AS requests,
            sum(o.tokens) AS tokens, coalesce(sum(o.tokens * o.price), 0) / 1000000 AS money, count(*) AS row_count,
            coalesce(sum(o.tokens) FILTER (WHERE o.is_batch), 0) AS batch_tokens,
            range_agg(tstzrange(o.reserved_at, greatest(o.settled_at, o.reserved_at), '[]')) FILTER (WHERE NOT o.is_batch)
                AS busy
        FROM old AS o GROUP BY 1, 2, 3
    ), added AS (
        INSERT INTO embedline.usage_day AS d
            (day, model_id, pipeline_id, requests, tokens, money, batch_tokens, busy_seconds)
        SELECT s.day, s.model_id, s.pipeline_id, s.requests, s.tokens, s.money, s.batch_tokens, coalesce((
            SELECT sum(extract(epoch FROM upper(b.span) - lower(b.span))) FROM unnest(s.busy) AS b (span)), 0)
        FROM summed AS s
        ON CONFLICT (day, model_id, pipeline_id) DO UPDATE SET requests = d.requests + excluded.requests,
            tokens = d.tokens + excluded.tokens, money = d.money + excluded.money,
            batch_tokens = d.batch_tokens + excluded.batch_tokens,
            busy_seconds = d.busy_seconds + excluded.busy_seconds
    )
    SELECT coalesce(sum(row_count), 0)::bigint AS row_count FROM summed
"""


@dataclass(frozen=True)
class Grant:
    """The answer to a reservation: the first `count` requests may be sent.

    They are sent under `reservation_id`, which is None if nothing was granted or the model has no ledger. If requests
    are left over, `wait_seconds` is how long they have to wait and `reason` names the limit.
    """

    count: int
    reservation_id: int | None
    wait_seconds: float | None
    reason: str | None


@dataclass(frozen=True)
class Payer:
    """The model and the pipeline that a request counts towards.

    `pipeline_id` is NO_PIPELINE if the model is asked for no pipeline.
    """

    model_id: int
    model_name: str
    pipeline_id: int = NO_PIPELINE
    pipeline_name: str = ""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Payer:
        """Return the payer of a version's vectors."""
        model = pipeline.version.model
        return cls(model.model_id, model.config.name, pipeline.pipeline_id, pipeline.name)


@dataclass(frozen=True)
class _Meter:
    price: Decimal | None
    capped: bool
    rated: bool
    # Of a batch endpoint: at its price, outside the limits of a minute.
    is_batch: bool = False

    @property
    def limited(self) -> bool:
        return self.capped or self.rated


def reserve(session: Session, pipeline: Pipeline, tokens: Sequence[int], claims: Claims) -> Grant:
    """Reserve the requests that are ready, in order; `tokens` holds their estimates.

    A request is granted whole or not at all, and none after one that is not. The resident worker commits after it and
    only then sends, so that a crash never sends a request that is not in the ledger.
    """
    payer = Payer.of(pipeline)
    meter = _load_meter(session, payer) if tokens and not _known_unmetered(session, payer) else None
    if meter is None:
        return Grant(len(tokens), None, None, None)
    return _reserve(session, payer, meter, tokens, claims)


def reserve_batch(session: Session, pipeline: Pipeline, tokens: Sequence[int], claims: Claims) -> Grant:
    """Reserve the texts of a provider's batch at its price, in order.

    No limit of a minute applies. The reservation stays open for as long as the batch does, whichever worker began it.
    """
    payer = Payer.of(pipeline)
    meter = _load_meter(session, payer)
    if meter is None:
        return Grant(len(tokens), None, None, None)
    price = None if meter.price is None else meter.price * BATCH_PRICE_SHARE
    return _reserve(session, payer, _Meter(price, meter.capped, False, True), tokens, claims)


def reserve_scores(session: Session, payer: Payer, amount: int) -> Grant:
    """Reserve the requests of one reranking, which are granted together or not at all.

    Nothing is written in a read-only transaction. Raises NotReady there if a budget or a rate limit applies, because the
    call could not be counted.
    """
    meter = _load_meter(session, payer)
    if meter is None:
        return Grant(1, None, None, None)
    if session.scalar("SELECT current_setting('transaction_read_only')::boolean"):
        if meter.limited:
            raise NotReady(
                f'model "{payer.model_name}" has a budget or a rate limit, and a read-only transaction cannot count',
                hint="Rerank in a transaction that may write, or without a reranker.",
            )
        return Grant(1, None, None, None)
    return _reserve(session, payer, meter, [amount], CALLERS_TRANSACTION)


def _reserve(session: Session, payer: Payer, meter: _Meter, tokens: Sequence[int], claims: Claims) -> Grant:
    if not meter.limited:
        return Grant(len(tokens), _append(session, payer, meter, tokens, claims), None, None)
    with claims.serialised(session, LEDGER_LOCK_CLASS, _RESERVE_LOCK):
        grant, stopped = _decide(session, payer, meter, tokens)
        if stopped and claims.is_resident:
            # embed_pending reports and ends; only a worker would claim the same rows again and again.
            note_stop(session, payer.pipeline_id, tokens[grant.count])
        if not grant.count:
            return grant
        reservation_id = _append(session, payer, meter, tokens[: grant.count], claims)
        return Grant(grant.count, reservation_id, grant.wait_seconds, grant.reason)


def settle(session: Session, reservation_id: int, tokens_used: int | None) -> None:
    """Correct a reservation to the provider's count.

    With None, the provider gave no count and the estimate stays.
    """
    session.query(_SETTLE, ["bigint", "bigint"], reservation_id, tokens_used)


def blocked_until(session: Session, pipeline: Pipeline) -> float | None:
    """Return the seconds for which claims of this pipeline are useless, None if none."""
    payer = Payer.of(pipeline)
    meter = _load_meter(session, payer)
    if meter is None or not meter.limited:
        return None
    waits = [cap.seconds for cap in _load_caps(session, payer, meter) if cap.is_exhausted(meter.price)]
    # Tried with the smallest possible request. A larger one may have to wait although this one passes.
    _, wait, _ = _load_rates(session, payer, meter).admit([1])
    if wait is not None:
        waits.append(wait)
    return max(waits, default=None)


def tokens_left(session: Session, pipeline: Pipeline) -> int | None:
    """Return the largest size of a request that fits every budget, in tokens.

    A minute's limit counts, too. None if nothing limits it. A larger request could never be granted by its budgets.
    """
    payer = Payer.of(pipeline)
    meter = None if _known_unmetered(session, payer) else _load_meter(session, payer)
    if meter is None or not meter.limited:
        return None
    left = [cap.tokens_left(meter.price) for cap in _load_caps(session, payer, meter)]
    window = _load_rates(session, payer, meter).tokens
    if window is not None:
        left.append(window.limit)
    tightest = min(left, default=float("inf"))
    return None if tightest == float("inf") else max(int(tightest), 0)


@entry_point
def roll_up_usage(session: Session) -> int:
    """Sum up reservations older than two minutes by day, model and pipeline.

    Returns the number of reservations that were rolled up.
    """
    return roll_up(session)


def roll_up(session: Session) -> int:
    """Roll the ledger up, unless another session does so now.

    Returns the number of reservations that were rolled up.
    """
    alone = session.scalar(
        "SELECT pg_try_advisory_xact_lock($1, $2)", ["integer"] * 2, LEDGER_LOCK_CLASS, _ROLL_UP_LOCK
    )
    return int(session.scalar(_ROLL_UP, ["integer[]"], live_workers(session))) if alone else 0


def _load_meter(session: Session, payer: Payer) -> _Meter | None:
    """Return the price and limits of the pipeline, None if it needs no ledger.

    None holds until the pipeline's next claim.
    """
    model_id = payer.model_id
    row = session.query(_METER, ["bigint", "bigint"], payer.pipeline_id, model_id)[0]
    unmetered: set[tuple[int, int]] = session.cache.setdefault(_UNMETERED, set())
    if not row["metered"]:
        unmetered.add((payer.pipeline_id, model_id))
        return None
    unmetered.discard((payer.pipeline_id, model_id))
    return _Meter(row["price"], row["capped"], row["rated"])


def _known_unmetered(session: Session, payer: Payer) -> bool:
    # Keyed by model, too, because the versions of one pipeline may have free and paid models.
    unmetered: set[tuple[int, int]] = session.cache.get(_UNMETERED, set())
    return (payer.pipeline_id, payer.model_id) in unmetered


def _load_caps(session: Session, payer: Payer, meter: _Meter) -> list[Cap]:
    if not meter.capped:
        return []
    return load_caps(session, payer.pipeline_id, payer.pipeline_name, payer.model_name)


def _load_rates(session: Session, payer: Payer, meter: _Meter) -> RateState:
    return rate_limits.load_rate_state(session, payer.model_id) if meter.rated else RateState(None, None)


def _decide(session: Session, payer: Payer, meter: _Meter, tokens: Sequence[int]) -> tuple[Grant, bool]:
    """Return the requests that budgets and rate limits grant.

    The second value is True if a budget stops the rest.
    """
    affordable, cap = admit(_load_caps(session, payer, meter), meter.price, tokens)
    count, wait, reason = _load_rates(session, payer, meter).admit(tokens[:affordable])
    if count < affordable or cap is None:
        return Grant(count, None, wait, reason), False
    return Grant(count, None, cap.seconds, cap.reason(meter.price, sum(tokens[:count]), tokens[count])), True


def _append(session: Session, payer: Payer, meter: _Meter, tokens: Sequence[int], claims: Claims) -> int:
    reservation_id = int(
        session.scalar(
            _RESERVE,
            ["bigint", "bigint", "integer", "integer", "bigint", "numeric", "boolean"],
            payer.model_id,
            payer.pipeline_id,
            claims.worker_id,
            len(tokens),
            sum(tokens),
            meter.price,
            meter.is_batch,
        )
    )
    if claims.is_resident and reservation_id % _ROLL_UP_EVERY == 0:
        roll_up(session)
    return reservation_id
