"""Check the prices of tokens, which are for a million of them."""

from __future__ import annotations

from decimal import Decimal

from embedline.errors import InvalidParameter

TOKENS_PER_PRICE = 1_000_000
# Share of the ordinary price that a batch endpoint takes: half of it, at OpenAI and at those that follow its form.
BATCH_PRICE_SHARE = Decimal("0.5")


def check_price(price: Decimal | None) -> Decimal | None:
    """Return the price of a million tokens, None if it is not known.

    Raises InvalidParameter if it is negative or not a finite number.
    """
    if price is not None and not (price.is_finite() and price >= 0):
        raise InvalidParameter(
            f"price_per_million_tokens must be at least 0, not {price}",
            hint="Pass the provider's price of 1,000,000 tokens, for example 0.02, or NULL if it is not known.",
        )
    return price
