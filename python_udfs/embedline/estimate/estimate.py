"""Estimate rows, tokens, money, bytes and hours before anything is paid for.

Runs with the caller's rights: the sample reads the table, and
evaluates the content, as the caller. A superuser does it as the source's owner, because the expressions of a pipeline
are that role's code.

No provider is asked except a model on this machine. Its speed is measured with one small batch if the ledger does not
know it.
"""

from __future__ import annotations

from typing import Any

from embedline.core.prices import BATCH_PRICE_SHARE, TOKENS_PER_PRICE
from embedline.core.processes import prepare_environment
from embedline.core.sql_text import quote_literal
from embedline.estimate.estimators import Amount
from embedline.estimate.figures import Figure, sizes
from embedline.estimate.keyword_size import keyword_figures
from embedline.estimate.measure import (
    COMPARED_TEXTS,
    Measured,
    Speed,
    check_sample_rows,
    count_tokens,
    measure,
    speeds,
    with_speed,
)
from embedline.estimate.plan import Plan, find_plan
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session

_CHARACTERS_PER_TOKEN = 4


@entry_point
def estimate(
    session: Session, subject: str, model_name: str | None, content: str | None, sample_rows: int, search_path: str
) -> list[dict[str, Any]]:
    """Return the figures of a pipeline, or of a table that has none yet."""
    require_given(sample_rows=sample_rows)
    check_sample_rows(sample_rows)
    prepare_environment()
    plan, model = find_plan(session, subject, model_name, content, search_path)
    measured = measure(session, plan, model, sample_rows)
    known = speeds(session)
    own = with_speed(session, known[model.config.name], model, measured)
    figures = [*_amounts(plan, own, measured), *sizes(plan, model, measured, session.server_version)]
    figures += keyword_figures(session, plan, measured)
    tokens = measured.sample.total(measured.tokens)
    figures += _cost(own, tokens, "")
    if plan.pipeline is not None and model_name is None:
        figures += _remaining(session, plan, own, measured)
    figures += [figure for name in sorted(known) if name != own.name for figure in _compared(known[name], measured)]
    return [figure.row() for figure in figures]


def _amounts(plan: Plan, own: Speed, measured: Measured) -> list[Figure]:
    sample = measured.sample
    how = (
        f"counted by the model's tokenizer in {len(measured.tokens)} rows"
        if own.tokenizer
        else f"characters / {_CHARACTERS_PER_TOKEN} of {len(measured.tokens)} rows: the model's tokenizer is not known"
    )
    if plan.spec.method == "semantic":
        how += "; each sentence is embedded once more, to find the cuts"
    chunked = plan.spec.method if plan.spec.tokens is None else f"{plan.spec.method}, up to {plan.spec.tokens} tokens"
    table = f"of {sample.population.value:.0f} in the table, {measured.how}"
    return [
        Figure("rows", sample.total(measured.embedded), "rows", table),
        Figure("chunks", sample.total(measured.chunks), "chunks", chunked),
        Figure("tokens", sample.total(measured.tokens), "tokens", how),
    ]


def _cost(speed: Speed, tokens: Amount, suffix: str) -> list[Figure]:
    """Return money and hours of a number of tokens."""
    money = None if speed.price is None else tokens.times(float(speed.price) / TOKENS_PER_PRICE)
    price = (
        f"{speed.price.normalize():f} for 1,000,000 tokens"
        if speed.price is not None
        else f"no price: SELECT embedline.set_price({quote_literal(speed.name).strip()}, …)"
    )
    rate = speed.tokens_per_second
    hours = None if not rate else tokens.times(1 / rate / 3600)
    origins = {
        "ledger": "tokens a second, as the ledger measured it",
        "measured": "tokens a second, measured on this machine; embedding alone",
    }
    unknown = (
        f"not measured yet: SELECT * FROM embedline.estimate(…, model => {quote_literal(speed.name).strip()}) does it"
        if speed.local
        else "not known before its first use: no paid request is made for it"
    )
    note = f"{rate:,.0f} {origins[speed.origin]}" if rate else unknown
    figures = [
        Figure(f"money{suffix}", money, "money", price, 4),
        Figure(f"hours{suffix}", hours, "hours", note, 3),
    ]
    if speed.has_batches and money is not None:
        batched = f"{BATCH_PRICE_SHARE:f} of that: what a backfill takes through the batch endpoint, within a day"
        figures.insert(
            1, Figure(f"money{suffix} in batches", money.times(float(BATCH_PRICE_SHARE)), "money", batched, 4)
        )
    return figures


def _remaining(session: Session, plan: Plan, own: Speed, measured: Measured) -> list[Figure]:
    """Return the work that is left: rows without a document, waiting changes."""
    row = session.query("SELECT * FROM embedline._work_done($1)", ["text"], plan.pipeline)[0]
    accepted = measured.sample.total(measured.accepted)
    missing = Amount(max(accepted.value - row["documents"], 0.0), accepted.margin)
    rows = Amount(missing.value + row["pending"], missing.margin)
    share = 1 / accepted.value if accepted.value else 0.0
    tokens = measured.sample.total(measured.tokens)
    note = f"{row['documents']} are done, {row['pending']} changes wait"
    left = Amount(
        tokens.value * min(rows.value * share, 1.0),
        tokens.margin * rows.value * share + tokens.value * rows.margin * share,
    )
    return [
        Figure("remaining rows", rows, "rows", note),
        Figure("remaining tokens", left, "tokens", "as many a row as in the sample"),
        *_cost(own, left, " remaining"),
    ]


def _compared(other: Speed, measured: Measured) -> list[Figure]:
    """Return money and hours of the same chunks with another registered model."""
    texts = measured.texts[:COMPARED_TEXTS]
    share = count_tokens(other.tokenizer, texts) / max(sum(map(len, texts)), 1)
    tokens = measured.sample.total(measured.characters).times(share)
    # A remote model without price and speed has nothing to compare.
    return [f for f in _cost(other, tokens, f" with {other.name}") if f.amount or (other.local and f.unit == "hours")]
