"""Compare the cost of a hosted service, of own machines, and of both.

Runs with the caller's rights, as `estimate` does, and makes no request to a remote provider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from embedline.catalog.values import Model
from embedline.core.processes import prepare_environment
from embedline.core.sql_text import quote_literal
from embedline.errors import InvalidParameter
from embedline.estimate.costs import DAYS_A_MONTH, SECONDS_A_MONTH, Hosted, Load, Own, crossover, hybrid_month
from embedline.estimate.estimators import Amount
from embedline.estimate.figures import Figure, sizes
from embedline.estimate.measure import Measured, Speed, check_sample_rows, measure, speeds, with_speed
from embedline.estimate.plan import Plan, find_plan
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session

_GIGABYTE_IN_MEGABYTES = 1024
# Numbers beyond are mistakes, and their products overflow.
_LARGEST, _SMALLEST = 10**12, Decimal("0.001")
# Parameters that must not be NULL, and those that are a share.
_GIVEN = ("documents_per_day", "bulk_share", "batch_discount", "queries_per_second", "tokens_per_query", "sample_rows")
_SHARES = ("bulk_share", "batch_discount")
_POSITIVE = ("own_tokens_per_second", "tokens_per_query")
_NUMBERS = (
    "machine_price_per_hour", "documents_per_day", "queries_per_second", "search_milliseconds",
    "storage_price_per_gigabyte", "price_per_million_tokens",
)  # fmt: skip
_LIMITS = """
    SELECT r.requests_per_minute, r.tokens_per_minute FROM embedline.rate_limit AS r
    JOIN embedline.model AS m ON m.model_id = r.model_id WHERE m.name = $1
"""
Money = Callable[[Load], float]


@dataclass(frozen=True)
class _Way:
    """A model with its plan and its sample, as one of the ways uses it."""

    plan: Plan
    model: Model
    measured: Measured
    speed: Speed

    @property
    def tokens(self) -> Amount:
        """Return the tokens of all documents."""
        return self.measured.sample.total(self.measured.tokens)

    @property
    def rows(self) -> float:
        """Return the documents that have a text."""
        return self.measured.sample.total(self.measured.embedded).value


@dataclass(frozen=True)
class _Question:
    """The parameters of embedline.compare_costs as numbers, None if not given."""

    machine_price_per_hour: float | None
    documents_per_day: float
    bulk_share: float
    batch_discount: float
    queries_per_second: float
    tokens_per_query: float
    search_milliseconds: float | None
    storage_price_per_gigabyte: float | None
    price_per_million_tokens: float | None
    own_tokens_per_second: float | None

    def loads(self, way: _Way) -> tuple[Load, Load, Load]:
        """Return the load of a month: low, as estimated, high."""
        documents = self.documents_per_day * DAYS_A_MONTH / way.rows if way.rows else 0.0
        queries = self.queries_per_second * SECONDS_A_MONTH * self.tokens_per_query
        low, value, high = (
            Load(tokens * documents, queries, self.bulk_share)
            for tokens in (way.tokens.low, way.tokens.value, way.tokens.high)
        )
        return low, value, high

    def month(self, way: _Way, money: Money) -> Amount:
        """Return a cost of a month with its interval."""
        low, value, high = self.loads(way)
        if math.isinf(way.tokens.margin):
            return Amount(money(value), math.inf)
        return Amount(money(value), max(money(high) - money(value), money(value) - money(low)))


@entry_point
def compare_costs(session: Session, subject: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of each way, and the load at which two of them cost the same."""
    _check(parameters)
    prepare_environment()
    given: dict[str, Any] = {name: parameters[name] for name in _Question.__dataclass_fields__}
    numbers: dict[str, Any] = {name: None if value is None else float(value) for name, value in given.items()}
    question = _Question(**numbers)
    hosted_way, own_way = _ways(session, subject, parameters)
    hosted, hosted_price = _hosted(hosted_way, question)
    own, own_price = _own(own_way, question)
    rows = [("hosted", figure) for figure in _hosted_figures(session, hosted_way, hosted, hosted_price, question)]
    rows += [("own", figure) for figure in _own_figures(session, own_way, own, own_price, question)]
    rows += [("hybrid", _hybrid(own_way, hosted_way, hosted, own, question))]
    rows += [("hosted and own", _crossover(own_way, hosted, own, question))]
    rows += [("search", _processors(question))]
    return [{"way": way, **figure.row()} for way, figure in rows]


def _check(parameters: Mapping[str, Any]) -> None:
    require_given(**{name: parameters[name] for name in _GIVEN})
    check_sample_rows(parameters["sample_rows"])
    for name in (*_SHARES, *_POSITIVE, *_NUMBERS):
        number: Decimal | None = parameters[name]
        if number is None:
            continue
        is_share = name in _SHARES
        least, most = _SMALLEST if name in _POSITIVE else 0, 1 if is_share else _LARGEST
        if not number.is_finite() or not least <= number <= most:
            limits = f"between {least} and {most}"
            example = "0.9 for 90 %" if is_share else "10"
            raise InvalidParameter(f"{name} must be {limits}, not {number}", hint=f"For example {name} => {example}.")


def _ways(session: Session, subject: str, parameters: Mapping[str, Any]) -> tuple[_Way, _Way]:
    """Measure the hosted and the own model.

    Without one of them the other stands for both.
    """
    named = parameters["hosted_model"], parameters["own_model"]
    found: dict[str | None, _Way] = {}
    for name in dict.fromkeys((named[0] or named[1], named[1] or named[0])):
        plan, model = find_plan(session, subject, name, parameters["content"], parameters["expression_search_path"])
        measured = measure(session, plan, model, parameters["sample_rows"])
        found[name] = _Way(plan, model, measured, speeds(session)[model.config.name])
    hosted, own = found[named[0] or named[1]], found[named[1] or named[0]]
    if parameters["own_tokens_per_second"] is None:
        own = _Way(own.plan, own.model, own.measured, with_speed(session, own.speed, own.model, own.measured))
    return hosted, own


def _hosted(way: _Way, question: _Question) -> tuple[Hosted | None, str]:
    price = question.price_per_million_tokens
    if price is None and way.speed.price is not None:
        price = float(way.speed.price)
    if price is None:
        name = quote_literal(way.speed.name).strip()
        return None, f"no price: SELECT embedline.set_price({name}, …), or price_per_million_tokens => …"
    return Hosted(price, question.batch_discount), f"{price:g} for 1,000,000 tokens of {way.speed.name}"


def _own(way: _Way, question: _Question) -> tuple[Own | None, str]:
    rate = question.own_tokens_per_second or way.speed.tokens_per_second
    if question.machine_price_per_hour is None:
        return None, "no price of a machine: machine_price_per_hour => …"
    if not rate:
        return None, f"the speed of {way.speed.name} is not measured yet: own_tokens_per_second => …"
    origin = "as given" if question.own_tokens_per_second else f"{way.speed.name}, {way.speed.origin}"
    note = f"{question.machine_price_per_hour:g} an hour, {rate:,.0f} tokens a second ({origin})"
    return Own(question.machine_price_per_hour, rate), note


def _hosted_figures(
    session: Session, way: _Way, hosted: Hosted | None, price: str, question: _Question
) -> list[Figure]:
    discount = f", in batches at {1 - question.batch_discount:g} of it" if question.batch_discount else ""
    generation = None if hosted is None else way.tokens.times(hosted.generation(1))
    hours, limit = _hosted_hours(session, way)
    figures = [
        *_volume(way, question),
        Figure("generation", generation, "money", f"{price}{discount}", 4),
        Figure("generation hours", hours, "hours", limit, 3),
    ]
    if hosted is None:
        return [*figures, Figure("month", None, "money", price), *_storage(session, way, question)]
    shares = f"{question.bulk_share * 100:g} % in bulk{discount}"
    streamed = Hosted(hosted.price, 0)
    figures += [
        Figure("month", question.month(way, hosted.month), "money", f"documents, {shares}; and queries", 4),
        Figure("month streamed", question.month(way, streamed.month), "money", "the same without batches", 4),
        Figure(
            "month of queries",
            question.month(way, lambda load: hosted.streamed(load.queries)), "money", _queries(question), 4,
        ),
    ]  # fmt: skip
    return figures + _storage(session, way, question)


def _hosted_hours(session: Session, way: _Way) -> tuple[Amount | None, str]:
    """Return the hours that embedding all documents takes.

    The rate limit sets them, or else the measured speed.
    """
    limits = session.query(_LIMITS, ["text"], way.speed.name)
    chunks = way.measured.sample.total(way.measured.chunks).value
    if limits and chunks and way.tokens.value:
        a_chunk = way.tokens.value / chunks
        config = way.model.config
        a_request = min(way.model.request_items, max(config.max_batch_tokens / a_chunk, 1.0)) * a_chunk
        tokens, requests = limits[0]["tokens_per_minute"], limits[0]["requests_per_minute"]
        a_minute = min(tokens or float("inf"), (requests or float("inf")) * a_request)
        return way.tokens.times(1 / a_minute / 60), f"rate limit: {a_minute:,.0f} tokens a minute"
    if way.speed.origin == "ledger" and way.speed.tokens_per_second:
        rate = way.speed.tokens_per_second
        return way.tokens.times(1 / rate / 3600), f"{rate:,.0f} tokens a second, as the ledger measured it"
    return None, "neither a rate limit nor a measured speed: SELECT embedline.set_rate_limit(…)"


def _own_figures(session: Session, way: _Way, own: Own | None, price: str, question: _Question) -> list[Figure]:
    rate = question.own_tokens_per_second or way.speed.tokens_per_second
    figures = [
        *_volume(way, question),
        Figure("generation", None if own is None else way.tokens.times(own.generation(1)), "money", price, 4),
        Figure("generation hours", way.tokens.times(1 / rate / 3600) if rate else None, "hours", "of one machine", 3),
    ]
    if own is None:
        return [*figures, Figure("month", None, "money", price), *_storage(session, way, question)]
    value = question.loads(way)[1]
    machines = question.month(way, lambda load: float(own.machines(load)))
    runs = "only while they embed" if value.is_bulk_alone else "all the time, because a change or a query may come"
    figures += [
        Figure("month", question.month(way, own.month), "money", f"machines that run {runs}", 4),
        Figure("machines", machines, "machines", "that run all the time; by the mean load, a peak waits"),
        Figure(
            "machine load",
            question.month(way, lambda load: 100 * load.total / own.month_capacity), "%", "of one machine", 2,
        ),
        Figure(
            "query load",
            question.month(way, lambda load: 100 * load.queries / own.month_capacity), "%",
            f"of one machine; {_queries(question)}, at the speed of batches", 2,
        ),
    ]  # fmt: skip
    return figures + _storage(session, way, question)


def _volume(way: _Way, question: _Question) -> list[Figure]:
    count = len(way.measured.tokens)
    note = f"{question.documents_per_day:g} documents a day and queries"
    return [
        Figure("tokens", way.tokens, "tokens", f"of all documents, from {count} rows"),
        Figure("tokens a month", question.month(way, lambda load: load.total), "tokens", note),
    ]


def _queries(question: _Question) -> str:
    return f"{question.queries_per_second:g} queries a second of {question.tokens_per_query:g} tokens"


def _storage(session: Session, way: _Way, question: _Question) -> list[Figure]:
    found = [
        replace(figure, note=f"{figure.note}; searches want it in memory")
        if figure.name == "index" and figure.amount
        else figure
        for figure in sizes(way.plan, way.model, way.measured, session.server_version)
    ]
    price = question.storage_price_per_gigabyte
    stored = [figure.amount for figure in found if figure.name in ("vectors", "index") and figure.amount is not None]
    if price is None:
        return found
    money = Amount(sum(a.value for a in stored), sum(a.margin for a in stored)).times(price / _GIGABYTE_IN_MEGABYTES)
    return [*found, Figure("storage a month", money, "money", f"{price:g} for 1 GB of vectors and index", 4)]


def _hybrid(own_way: _Way, hosted_way: _Way, hosted: Hosted | None, own: Own | None, question: _Question) -> Figure:
    dimensions = hosted_way.model.config.dimensions, own_way.model.config.dimensions
    if dimensions[0] != dimensions[1]:
        note = f"not possible: {dimensions[0]} and {dimensions[1]} dimensions are two models, a version has one"
        return Figure("month", None, "money", note)
    if hosted is None or own is None:
        return Figure("month", None, "money", "needs a price of each")
    note = "bulk on a machine that then stops, the rest hosted; only if both give the same vectors"
    return Figure("month", question.month(own_way, lambda load: hybrid_month(load, hosted, own)), "money", note, 4)


def _crossover(way: _Way, hosted: Hosted | None, own: Own | None, question: _Question) -> Figure:
    if hosted is None or own is None:
        return Figure("crossover", None, "tokens a month", "needs a price of each")
    found = crossover(question.loads(way)[1], hosted, own)
    carries = f"one machine carries {own.month_capacity:,.0f}"
    if found is None:
        return Figure("crossover", None, "tokens a month", f"none: hosted is cheaper at any load; {carries}")
    return Figure("crossover", Amount(found), "tokens a month", f"from here own costs no more; {carries}")


def _processors(question: _Question) -> Figure:
    """Return the processors that searches keep busy.

    It is the number of arrivals times the time of each: Little, "A Proof for the Queuing Formula L = λW", Operations
    Research 9(3), 1961.
    """
    if question.search_milliseconds is None:
        note = "search_milliseconds => … of one embedline.search, as EXPLAIN (ANALYZE) shows it"
        return Figure("processors", None, "processors", note)
    busy = question.queries_per_second * question.search_milliseconds / 1000
    note = f"busy on average: {question.queries_per_second:g} a second × {question.search_milliseconds:g} ms"
    return Figure("processors", Amount(busy), "processors", note, 2)
