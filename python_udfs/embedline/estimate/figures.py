"""Compute the figures of an estimate from a sample and the speed of a model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from embedline.catalog.values import Model
from embedline.chunking import ChunkingSpec
from embedline.core import storage_size
from embedline.core.prices import TOKENS_PER_PRICE
from embedline.core.sql_text import quote_literal
from embedline.core.tokens import average_tokens
from embedline.estimate.estimators import Amount, Sample
from embedline.estimate.table_sample import Subject
from embedline.postgres.session import Session

_CHARACTERS_PER_TOKEN = 4
# Texts by which other models' tokens are compared.
COMPARED_TEXTS = 256
_MEGABYTE = 1024 * 1024


@dataclass(frozen=True)
class Figure:
    """One line of the answer; `amount` is None if it is not known."""

    name: str
    amount: Amount | None
    unit: str
    note: str
    decimals: int = 0

    def row(self) -> dict[str, Any]:
        """Return the line as embedline.estimate's columns."""
        values: dict[str, Any] = {"figure": self.name, "value": None, "low": None, "high": None}
        if self.amount is not None:
            for column, number in (("value", self.amount.value), ("low", self.amount.low), ("high", self.amount.high)):
                values[column] = str(round(Decimal(str(number)), self.decimals)) if number != float("inf") else None
        return {**values, "unit": self.unit, "note": self.note}


@dataclass(frozen=True)
class Plan:
    """The table and the recipe; `pipeline` is None if there is none yet."""

    subject: Subject
    spec: ChunkingSpec
    column_type: str
    m: int
    has_index: bool
    pipeline: str | None


@dataclass(frozen=True)
class Speed:
    """A model's price of a million tokens, its speed, and their origin."""

    name: str
    local: bool
    tokenizer: str | None
    price: Decimal | None
    tokens_per_second: float | None
    origin: str


@dataclass(frozen=True)
class Measured:
    """The sample, chunked and counted.

    It has values of each sampled row, and the texts of some chunks.
    """

    sample: Sample
    accepted: list[float]
    embedded: list[float]
    chunks: list[float]
    tokens: list[float]
    characters: list[float]
    texts: list[str]
    how: str


@functools.lru_cache(maxsize=4)
def _tokenizer(definition: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(definition)


def count_tokens(tokenizer: str | None, texts: Sequence[str]) -> float:
    if not texts:
        return 0.0
    if tokenizer is None:
        return sum(map(average_tokens, texts))
    encoded = _tokenizer(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return float(sum(len(encoding) for encoding in encoded))


def amounts(plan: Plan, own: Speed, measured: Measured) -> list[Figure]:
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


def sizes(plan: Plan, model: Model, measured: Measured, server_version: int) -> list[Figure]:
    chunks = measured.sample.total(measured.chunks)
    dimensions = model.config.dimensions or 0
    kind = f"{plan.column_type}({dimensions})"

    def size(bytes_of: Any, *more: int) -> Amount:
        low, value, high = (
            bytes_of(count, dimensions, plan.column_type, *more) / _MEGABYTE
            for count in (chunks.low, chunks.value, min(chunks.high, 1e15))
        )
        return Amount(value, max(high - value, value - low) if chunks.margin else 0.0)

    figures = [Figure("vectors", size(storage_size.table_bytes), "MB", f"{kind} with the primary key", 1)]
    if plan.has_index and storage_size.has_hnsw(dimensions, plan.column_type):
        index = f"HNSW, m = {plan.m}"
        memory = "while it is built; set maintenance_work_mem to at least that"
        figures.append(Figure("index", size(storage_size.hnsw_bytes, plan.m), "MB", index, 1))
        figures.append(
            Figure("index memory", size(storage_size.hnsw_build_memory, plan.m, server_version), "MB", memory, 1)
        )
    else:
        note = f"none; HNSW indexes vector up to 2000 dimensions, halfvec up to 4000, this is {kind}"
        figures.append(Figure("index", None, "MB", note))
    return figures


def cost(speed: Speed, tokens: Amount, suffix: str) -> list[Figure]:
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
    return [
        Figure(f"money{suffix}", money, "money", price, 4),
        Figure(f"hours{suffix}", hours, "hours", note, 3),
    ]


def remaining(session: Session, plan: Plan, own: Speed, measured: Measured) -> list[Figure]:
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
        *cost(own, left, " remaining"),
    ]


def compared(other: Speed, measured: Measured) -> list[Figure]:
    """Return money and hours of the same chunks with another registered model."""
    texts = measured.texts[:COMPARED_TEXTS]
    share = count_tokens(other.tokenizer, texts) / max(sum(map(len, texts)), 1)
    tokens = measured.sample.total(measured.characters).times(share)
    # A remote model without price and speed has nothing to compare.
    return [f for f in cost(other, tokens, f" with {other.name}") if f.amount or (other.local and f.unit == "hours")]
