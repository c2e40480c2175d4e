"""Chunk a sample of rows, count its tokens, and find the speed of models."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from embedline.catalog.values import Model
from embedline.chunking import Chunk
from embedline.chunking.factory import make_chunker
from embedline.core.text import repair_text
from embedline.core.tokens import average_tokens
from embedline.errors import InvalidParameter, UnusableText
from embedline.estimate.estimators import Sample
from embedline.estimate.plan import Plan
from embedline.estimate.table_sample import draw
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.postgres.session import Session

_SAMPLE_ROWS = (100, 100_000)
# Texts of the batch that times a local model, and of those by which other models' tokens are compared.
_TIMED_TEXTS = 64
COMPARED_TEXTS = 256

_MODELS = """
    SELECT m.name, m.provider, m.tokenizer, m.price_per_million_tokens AS price,
        r.tokens_per_second, r.origin, m.options @> '{"batch_api": true}' AS has_batches
    FROM embedline.model AS m LEFT JOIN embedline._measured_rates() AS r ON r.model_id = m.model_id
    WHERE m.task = 'embed' ORDER BY m.name
"""


@dataclass(frozen=True)
class Speed:
    """A model's price of a million tokens, its speed, and their origin."""

    name: str
    local: bool
    tokenizer: str | None
    price: Decimal | None
    tokens_per_second: float | None
    origin: str
    has_batches: bool = False


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


def check_sample_rows(sample_rows: int) -> None:
    """Raise InvalidParameter if the sample would be too small or too large."""
    low, high = _SAMPLE_ROWS
    if not low <= sample_rows <= high:
        raise InvalidParameter(
            f"sample_rows must be between {low} and {high}, not {sample_rows}", hint="1000 gives about 5 % of error."
        )


def measure(session: Session, plan: Plan, model: Model, sample_rows: int) -> Measured:
    """Draw rows, chunk them as workers would, and count their tokens."""
    sample, rows, how = draw(session, plan.subject, sample_rows)
    tokenizer = session.scalar("SELECT tokenizer FROM embedline.model WHERE model_id = $1", ["bigint"], model.model_id)
    # Semantic chunking would have to embed. It makes about as many chunks as whole sentences do.
    method = "sentences" if plan.spec.method == "semantic" else plan.spec.method
    chunker = make_chunker(replace(plan.spec, method=method, options=()), tokenizer, None)
    breathe = let_cancel_through(session)
    measured = Measured(sample, [], [], [], [], [], [], how)
    for row in rows:
        chunks: list[Chunk] = []
        if row.content is not None:
            # A row without a text to embed becomes a dead letter and costs nothing.
            with contextlib.suppress(UnusableText):
                chunks = chunker(repair_text(row.content), breathe, repair_text(row.prefix) if row.prefix else "")
            breathe()
        scale = row.characters / len(row.content) if row.content else 1.0
        texts = [model.config.document_prefix + chunk.embedded_text for chunk in chunks]
        characters = sum(map(len, texts))
        if plan.spec.method == "semantic":
            characters += len(row.content or "")
        counted = count_tokens(tokenizer, texts) * (characters / max(sum(map(len, texts)), 1))
        measured.accepted.append(float(row.accepted))
        measured.embedded.append(float(bool(chunks)))
        measured.chunks.append(len(chunks) * scale)
        measured.tokens.append(counted * scale)
        measured.characters.append(characters * scale)
        measured.texts.extend(texts if len(measured.texts) < COMPARED_TEXTS else [])
    return measured


@functools.lru_cache(maxsize=4)
def _tokenizer(definition: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def count_tokens(tokenizer: str | None, texts: Sequence[str]) -> float:
    """Return the tokens of texts.

    If the tokenizer is not known, they are about a quarter of the characters.
    """
    if not texts:
        return 0.0
    if tokenizer is None:
        return sum(map(average_tokens, texts))
    encoded = _tokenizer(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return float(sum(len(encoding) for encoding in encoded))


def speeds(session: Session) -> dict[str, Speed]:
    """Return price and speed of each registered model by its name."""
    return {
        row["name"]: Speed(
            row["name"], row["provider"] == "sentence-transformers", row["tokenizer"], row["price"],
            row["tokens_per_second"], row["origin"] or "", row["has_batches"],
        )
        for row in session.query(_MODELS)
    }  # fmt: skip


def with_speed(session: Session, speed: Speed, model: Model, measured: Measured) -> Speed:
    """Time a local model that the ledger does not know; a remote one is never asked."""
    if speed.origin == "ledger" or not speed.local or not measured.texts:
        return speed
    texts = measured.texts[:_TIMED_TEXTS]
    embedder, breathe = embedder_for(session, model), let_cancel_through(session)
    # The first batch may have to wait for the model to load.
    wait_result(embedder.submit(texts[:1], "document"), breathe)
    began = time.perf_counter()
    wait_result(embedder.submit(texts, "document"), breathe)
    seconds = time.perf_counter() - began
    rate = count_tokens(speed.tokenizer, texts) / max(seconds, 1e-6)
    session.query("SELECT embedline._note_rate($1, $2)", ["text", "double precision"], speed.name, rate)
    return replace(speed, tokens_per_second=rate, origin="measured")
