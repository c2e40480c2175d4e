"""Limit the requests and tokens that all workers send to a model per minute.

The ledger's rows of the last 60 s are the state, so there is no row that all workers write. Two rules decide when a
request may start. Both hold for requests and for tokens.

Window: no stretch of 60 s carries more than the limit. Spread: a bucket drains at limit / 60 a second (a leaky bucket
as a meter, ITU-T I.371) and must have drained to one second's worth. Otherwise a minute's allowance would leave in a
burst with silence after it.

A request that alone is above the limit may start when the last 60 s were empty. Its refusal is left to the provider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedline.catalog.load import load_model
from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

WINDOW_SECONDS = 60.0
# Seconds of the allowance that may leave at once after a pause; also the longest silence at the end of a minute.
BURST_SECONDS = 1.0
# Shortest wait in seconds. At 3,000 requests a minute five requests share one reservation instead of taking five.
MINIMUM_WAIT_SECONDS = 0.1

# newer: each row with all later rows. The largest surplus of any such stretch over the drain is the bucket's level.
_WINDOWS = """
    SELECT r.requests_per_minute, r.tokens_per_minute, w.*
    FROM embedline.rate_limit AS r
    CROSS JOIN LATERAL (
        SELECT coalesce(max(n.newer_requests), 0) AS requests, coalesce(max(n.newer_tokens), 0) AS tokens,
            coalesce(max(n.newer_requests - r.requests_per_minute / 60.0::float8 * n.age), 0) AS request_level,
            coalesce(max(n.newer_tokens - r.tokens_per_minute / 60.0::float8 * n.age), 0) AS token_level,
            60 - max(n.age) AS first_leaves_in
        FROM (
            SELECT a.age, sum(u.requests::float8) OVER newer AS newer_requests, sum(u.tokens::float8) OVER newer AS newer_tokens
            FROM embedline.reservation AS u
            CROSS JOIN LATERAL (SELECT extract(epoch FROM clock_timestamp() - u.reserved_at)::float8 AS age) AS a
            WHERE u.model_id = r.model_id AND u.reserved_at > clock_timestamp() - interval '60 seconds' AND NOT u.is_batch
            WINDOW newer AS (ORDER BY u.reserved_at DESC, u.reservation_id DESC ROWS UNBOUNDED PRECEDING)
        ) AS n
    ) AS w
    WHERE r.model_id = $1
"""


@dataclass(frozen=True)
class Window:
    """One limit, with the use of it in the last 60 s.

    `limit` is per minute; `used` is the sum of the last 60 s. `level` is that of the leaky bucket. The oldest request
    leaves the window in `first_leaves_in` seconds. `unit` names the limit in messages.
    """

    unit: str
    limit: float
    used: float = 0.0
    level: float = 0.0
    first_leaves_in: float = WINDOW_SECONDS

    @property
    def reason(self) -> str:
        """Return the name of the limit for which a request waits."""
        return f"rate limit of {self.limit:.0f} {self.unit} a minute"

    def wait(self, granted: float, amount: float) -> float:
        """Return the seconds until a request of `amount` may start, 0 for now.

        `granted` more of the unit starts now.
        """
        drain = self.limit / WINDOW_SECONDS
        wait = (max(self.level, 0.0) + granted - drain * BURST_SECONDS) / drain
        if self.used + granted > 0 and self.used + granted + amount > self.limit:
            wait = max(wait, self.first_leaves_in)
        return max(wait, MINIMUM_WAIT_SECONDS) if wait > 0 else 0.0


@dataclass(frozen=True)
class RateState:
    """The windows of a model: requests and tokens, each None if not limited."""

    requests: Window | None
    tokens: Window | None

    def admit(self, tokens: Sequence[int]) -> tuple[int, float | None, str | None]:
        """Return how many of the requests may start now, in order.

        The other values are the seconds that the next one has to wait and the reason, None if none waits.
        """
        sent = 0
        for count, amount in enumerate(tokens):
            asked = ((self.requests, count, 1), (self.tokens, sent, amount))
            waits = [(window.wait(granted, wanted), window.reason) for window, granted, wanted in asked if window]
            wait, reason = max(waits, default=(0.0, ""))
            if wait > 0:
                return count, wait, reason
            sent += amount
        return len(tokens), None, None


def load_rate_state(session: Session, model_id: int) -> RateState:
    """Return the model's windows as the ledger shows them now."""
    rows = session.query(_WINDOWS, ["bigint"], model_id)
    if not rows:
        return RateState(None, None)
    row = rows[0]
    leaves = WINDOW_SECONDS if row["first_leaves_in"] is None else float(row["first_leaves_in"])
    requests, tokens = row["requests_per_minute"], row["tokens_per_minute"]
    return RateState(
        None if requests is None else Window("requests", requests, row["requests"], row["request_level"], leaves),
        None if tokens is None else Window("tokens", tokens, row["tokens"], row["token_level"], leaves),
    )


@entry_point
def set_rate_limit(
    session: Session, model_name: str, requests_per_minute: int | None, tokens_per_minute: int | None
) -> None:
    """Limit what all workers together send to a model per minute.

    If both limits are NULL, the model has none.
    """
    model = load_model(session, model_name)
    for name, value in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
        if value is not None and value < 1:
            raise InvalidParameter(
                f"{name} must be at least 1, not {value}",
                hint=f"NULL sets no such limit; SELECT embedline.set_rate_limit('{model_name}') takes both away.",
            )
    if requests_per_minute is None and tokens_per_minute is None:
        session.query("DELETE FROM embedline.rate_limit WHERE model_id = $1", ["bigint"], model.model_id)
        return
    session.query(
        """
        INSERT INTO embedline.rate_limit (model_id, requests_per_minute, tokens_per_minute) VALUES ($1, $2, $3)
        ON CONFLICT (model_id) DO UPDATE SET requests_per_minute = excluded.requests_per_minute,
            tokens_per_minute = excluded.tokens_per_minute
        """,
        ["bigint", "integer", "bigint"],
        model.model_id,
        requests_per_minute,
        tokens_per_minute,
    )
