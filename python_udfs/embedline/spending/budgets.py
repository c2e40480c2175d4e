"""Limit the spending of a pipeline or a model per day or month.

A budget is in tokens or in money; money needs the price of a million tokens. Days and months are those of UTC. All
prices and budgets of a database have the same currency, whichever it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from embedline.catalog.load import load_model, load_pipeline
from embedline.catalog.rights import caller
from embedline.core.prices import TOKENS_PER_PRICE, check_price
from embedline.core.sql_text import quote_literal
from embedline.errors import InvalidParameter, NotFound
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session

PERIODS = ("day", "month")
_CAPS = """
    SELECT b.scope, b.name, b.period, b.unit, b.amount, b.remaining, b.resets_at::text AS resets_at,
        extract(epoch FROM b.resets_at - clock_timestamp())::double precision AS seconds,
        (SELECT s.tokens FROM embedline.budget_stop AS s
         WHERE s.pipeline_id = $1 AND s.stopped_at >= b.starts_at) AS stopped_at_tokens
    FROM embedline.budget AS b
    WHERE (b.scope = 'pipeline' AND b.name = $2) OR (b.scope = 'model' AND b.name = $3)
"""
# Replaces the whole budget of its scope and period, so a unit that is not named is no longer limited.
_SET_CAPS = """
    WITH wanted AS (
        SELECT * FROM jsonb_to_recordset($4::jsonb) AS w (unit text, amount numeric) WHERE w.amount IS NOT NULL
    ), gone AS (
        DELETE FROM embedline.spending_cap AS c
        WHERE c.pipeline_id IS NOT DISTINCT FROM $1 AND c.model_id IS NOT DISTINCT FROM $2 AND c.period = $3
            AND c.unit NOT IN (SELECT unit FROM wanted)
    )
    INSERT INTO embedline.spending_cap (pipeline_id, model_id, period, unit, amount, set_by)
    SELECT $1, $2, $3, w.unit, w.amount, $5 FROM wanted AS w
    ON CONFLICT ON CONSTRAINT spending_cap_scope_period_unit_key
        DO UPDATE SET amount = excluded.amount, set_by = excluded.set_by, set_at = now()
"""
_MONEY_USERS = """
    SELECT coalesce(p.name, m.name) AS name, CASE WHEN p.name IS NULL THEN 'model' ELSE 'pipeline' END AS scope, c.period
    FROM embedline.spending_cap AS c
    LEFT JOIN embedline.pipeline AS p ON p.pipeline_id = c.pipeline_id
    LEFT JOIN embedline.model AS m ON m.model_id = c.model_id
    WHERE c.unit = 'money' AND (c.model_id = $1 OR c.pipeline_id IN (
        SELECT v.pipeline_id FROM embedline.version AS v WHERE v.model_id = $1))
    LIMIT 1
"""


@dataclass(frozen=True)
class Cap:
    """One budget in one unit, with its remainder and its next start.

    `stopped_at_tokens` is the size of the last request that did not fit, None if none was refused in this period.
    """

    scope: str
    name: str
    period: str
    unit: Literal["tokens", "money"]
    amount: Decimal
    remaining: Decimal
    resets_at: str
    seconds: float
    stopped_at_tokens: int | None

    def tokens_left(self, price: Decimal | None) -> float:
        """Return the tokens that may still be sent, at `price` for a million.

        It is infinite if they cost nothing.
        """
        if self.unit == "tokens":
            return float(self.remaining)
        if price is None:
            # Without a price the spending would go on uncounted.
            return 0.0
        return float(self.remaining / price * TOKENS_PER_PRICE) if price else float("inf")

    def is_exhausted(self, price: Decimal | None) -> bool:
        """Return True if nothing is left, or too little for the request refused last."""
        left = self.tokens_left(price)
        return left <= 0 or (self.stopped_at_tokens is not None and left < self.stopped_at_tokens)

    def reason(self, price: Decimal | None, granted: int, wanted: int) -> str:
        """Return which budget stops a request of `wanted` tokens, and until when.

        `granted` are the tokens of other requests before it.
        """
        of_what = f'budget of {self.scope} "{self.name}"'
        if self.unit == "money" and price is None:
            return f"{of_what} is in money, but its model has no price: SELECT embedline.set_price(model, price)"
        left = max(int(self.tokens_left(price)) - granted, 0)
        return (
            f"{of_what} of {self.amount.normalize():f} {self.unit} a {self.period} leaves {left} tokens until"
            f" {self.resets_at}, and the next request needs {wanted}"
        )


def admit(caps: Sequence[Cap], price: Decimal | None, tokens: Sequence[int]) -> tuple[int, Cap | None]:
    """Return how many of the requests fit into all budgets, in order.

    The second value is the budget that stops the next one.
    """
    sent = 0
    left = [(cap, cap.tokens_left(price)) for cap in caps]
    for count, amount in enumerate(tokens):
        tight = [cap for cap, tokens_left in left if tokens_left <= 0 or sent + amount > tokens_left]
        if tight:
            return count, max(tight, key=lambda cap: cap.seconds)
        sent += amount
    return len(tokens), None


def load_caps(session: Session, pipeline_id: int, pipeline_name: str, model_name: str) -> list[Cap]:
    """Return the budgets that a request of this pipeline counts towards."""
    rows = session.query(_CAPS, ["bigint", "text", "text"], pipeline_id, pipeline_name, model_name)
    return [
        Cap(
            scope=row["scope"], name=row["name"], period=row["period"], unit=row["unit"], amount=row["amount"],
            remaining=row["remaining"], resets_at=row["resets_at"], seconds=max(float(row["seconds"]), 0.0),
            stopped_at_tokens=row["stopped_at_tokens"],
        )
        for row in rows
    ]  # fmt: skip


def note_stop(session: Session, pipeline_id: int, tokens: int) -> None:
    """Record the size of a request that did not fit.

    Claims are useless until that many tokens are left again.
    """
    session.query(
        """
        INSERT INTO embedline.budget_stop (pipeline_id, tokens) VALUES ($1, $2)
        ON CONFLICT (pipeline_id) DO UPDATE SET tokens = excluded.tokens, stopped_at = excluded.stopped_at
        """,
        ["bigint", "bigint"],
        pipeline_id,
        tokens,
    )


@entry_point
def set_budget(
    session: Session,
    period: str,
    pipeline_name: str | None,
    model_name: str | None,
    tokens: int | None,
    money: Decimal | None,
) -> None:
    """Limit the spending of a pipeline or a model per day or month.

    Replaces the earlier budget of that period.
    """
    if tokens is None and money is None:
        raise InvalidParameter(
            "a budget needs tokens or money", hint="SELECT embedline.drop_budget(...) takes a budget away."
        )
    if money is not None and not money.is_finite():
        raise InvalidParameter("money must be a number", hint="Leave money out for a budget without it.")
    for name, value in (("tokens", tokens), ("money", money)):
        if value is not None and value < 0:
            raise InvalidParameter(f"{name} must be at least 0, not {value}", hint="0 stops all spending.")
    _check_period(period)
    pipeline_id, model_id = _scope(session, pipeline_name, model_name)
    if money is not None:
        _require_price(session, pipeline_name, model_name)
    amounts = [{"unit": "tokens", "amount": tokens}, {"unit": "money", "amount": None if money is None else str(money)}]
    session.query(
        _SET_CAPS,
        ["bigint", "bigint", "text", "jsonb", "text"],
        pipeline_id,
        model_id,
        period,
        json.dumps(amounts),
        caller(session),
    )


@entry_point
def drop_budget(session: Session, pipeline_name: str | None, model_name: str | None, period: str | None) -> None:
    """Remove the budgets of a pipeline or a model, of one period or all."""
    if period is not None:
        _check_period(period)
    pipeline_id, model_id = _scope(session, pipeline_name, model_name)
    gone = session.query(
        """
        DELETE FROM embedline.spending_cap AS c
        WHERE c.pipeline_id IS NOT DISTINCT FROM $1 AND c.model_id IS NOT DISTINCT FROM $2 AND ($3 IS NULL OR c.period = $3)
        RETURNING c.spending_cap_id
        """,
        ["bigint", "bigint", "text"],
        pipeline_id,
        model_id,
        period,
    )
    if not gone:
        scope = f'model "{model_name}"' if pipeline_name is None else f'pipeline "{pipeline_name}"'
        raise NotFound(f"{scope} has no such budget", hint="SELECT * FROM embedline.budget lists the budgets.")


@entry_point
def set_price(session: Session, model_name: str, price: Decimal | None) -> None:
    """Store the provider's price of a million tokens, for requests from now on."""
    model = load_model(session, model_name)
    check_price(price)
    if price is None and (users := session.query(_MONEY_USERS, ["bigint"], model.model_id)):
        user = users[0]
        name = quote_literal(user["name"]).strip()
        raise InvalidParameter(
            f'a budget in money of {user["scope"]} "{user["name"]}" needs the price of model "{model_name}"',
            hint=f"SELECT embedline.drop_budget({user['scope']} => {name}, period => '{user['period']}') first.",
        )
    session.query(
        "UPDATE embedline.model SET price_per_million_tokens = $2 WHERE model_id = $1",
        ["bigint", "numeric"],
        model.model_id,
        price,
    )


def _check_period(period: str) -> None:
    if period not in PERIODS:
        raise InvalidParameter(f'period "{period}" is not known', hint="Use period => 'day' or period => 'month'.")


def _scope(session: Session, pipeline_name: str | None, model_name: str | None) -> tuple[int | None, int | None]:
    if (pipeline_name is None) == (model_name is None):
        raise InvalidParameter(
            "name either a pipeline or a model", hint="For example pipeline => 'docs', or model => 'small'."
        )
    if pipeline_name is not None:
        return load_pipeline(session, pipeline_name).pipeline_id, None
    return None, load_model(session, str(model_name)).model_id


def _require_price(session: Session, pipeline_name: str | None, model_name: str | None) -> None:
    if pipeline_name is not None:
        model_name = load_pipeline(session, pipeline_name).version.model.config.name
    price = session.scalar("SELECT price_per_million_tokens FROM embedline.model WHERE name = $1", ["text"], model_name)
    if price is None:
        raise InvalidParameter(
            f'model "{model_name}" has no price, so nothing can be counted in money',
            hint=f"SELECT embedline.set_price({quote_literal(str(model_name)).strip()}, 0.02); the price of a million tokens.",
        )
