"""Compute the monthly cost of a service, of own machines, and of both.

Arithmetic alone: no price and no speed is known here. A month has 730.5 hours, a twelfth of 365.25 days.

A hosted service takes its price for each token, so its cost is linear. Texts that come in bulk may wait for a batch
interface, which takes the share `batch_discount` less.

A machine costs by the hour, whether it works or not. If texts or queries may come at any moment, it runs all the time.
Then whole machines are paid for whole months. If everything comes in bulk, a machine runs only while it works.
Machines are counted by the mean load, and a peak waits. The utilisation law says that busy machines are arrivals times
the time of each. See Denning and Buzen, "The Operational Analysis of Queueing Network Models", ACM Computing Surveys
10(3), 1978.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from embedline.core.prices import TOKENS_PER_PRICE

DAYS_A_MONTH = 365.25 / 12
HOURS_A_MONTH = DAYS_A_MONTH * 24
SECONDS_A_MONTH = HOURS_A_MONTH * 3600


@dataclass(frozen=True)
class Load:
    """Tokens a month: of documents, a share of them in bulk, and of queries."""

    documents: float
    queries: float
    bulk_share: float

    @property
    def bulk(self) -> float:
        """Return the tokens that may wait."""
        return self.documents * self.bulk_share

    @property
    def total(self) -> float:
        """Return all tokens of a month."""
        return self.documents + self.queries

    @property
    def is_bulk_alone(self) -> bool:
        """Return True if everything may wait, so that a machine may stop."""
        return self.queries == 0 and (self.bulk_share == 1 or self.documents == 0)


@dataclass(frozen=True)
class Hosted:
    """A service: its price of 1,000,000 tokens, and the discount of batches."""

    price: float
    batch_discount: float

    def generation(self, tokens: float) -> float:
        """Return the cost of embedding tokens that may all wait."""
        return tokens * self.price / TOKENS_PER_PRICE * (1 - self.batch_discount)

    def streamed(self, tokens: float) -> float:
        """Return the cost of embedding tokens at once."""
        return tokens * self.price / TOKENS_PER_PRICE

    def month(self, load: Load) -> float:
        """Return the cost of a month."""
        return self.generation(load.bulk) + self.streamed(load.total - load.bulk)


@dataclass(frozen=True)
class Own:
    """A machine: its price of an hour, and the tokens that it embeds in a second."""

    price_an_hour: float
    tokens_per_second: float

    @property
    def month_capacity(self) -> float:
        """Return the tokens that one machine embeds in a month without a pause."""
        return self.tokens_per_second * SECONDS_A_MONTH

    def generation(self, tokens: float) -> float:
        """Return the cost of the hours that embedding takes."""
        return tokens / self.tokens_per_second / 3600 * self.price_an_hour

    def machines(self, load: Load) -> int:
        """Return the machines that have to run all the time, 0 if none has to."""
        return 0 if load.is_bulk_alone else max(1, math.ceil(load.total / self.month_capacity))

    def month(self, load: Load) -> float:
        """Return the cost of a month."""
        if load.is_bulk_alone:
            return self.generation(load.bulk)
        return self.machines(load) * HOURS_A_MONTH * self.price_an_hour


def hybrid_month(load: Load, hosted: Hosted, own: Own) -> float:
    """Return the cost of a month with bulk on a machine, all else hosted.

    The machine runs only while it works.
    """
    return own.generation(load.bulk) + hosted.streamed(load.total - load.bulk)


def crossover(load: Load, hosted: Hosted, own: Own) -> float | None:
    """Return the tokens a month from which own machines cost no more than the service.

    Queries and the share of bulk stay as they are; documents grow. None if the service is cheaper at any load.

    Q are the queries. p and q are the hosted prices of a query's and of a document's token; a discount lowers q.
    n machines cost n M and carry n C tokens a month. Both ways cost the same at D = (n M - Q p) / q.
    Either the n machines that the queries need carry that D, or no number does. Each further machine costs M and
    carries C tokens, which are worth q C. If q C is at least M, n machines were enough; else it only loses.
    """
    price = hosted.price / TOKENS_PER_PRICE
    of_documents = price * (1 - load.bulk_share * hosted.batch_discount)
    machine, capacity = HOURS_A_MONTH * own.price_an_hour, own.month_capacity
    if load.queries == 0 and load.bulk_share == 1:
        return 0.0 if own.price_an_hour / own.tokens_per_second / 3600 <= of_documents else None
    count = max(1, math.ceil(load.queries / capacity))
    missing = count * machine - load.queries * price
    if missing <= 0:
        return load.queries
    if of_documents * (count * capacity - load.queries) < missing:
        return None
    return load.queries + missing / of_documents
