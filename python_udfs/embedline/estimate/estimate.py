"""Estimate rows, tokens, money, bytes and hours before anything is paid for.

Runs with the caller's rights: the sample reads the table, and
evaluates the content, as the caller. A superuser does it as the source's owner, because the expressions of a pipeline
are that role's code.

No provider is asked except a model on this machine. Its speed is measured with one small batch if the ledger does not
know it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from embedline.catalog.load import load_model, load_pipeline
from embedline.catalog.values import Model, Pipeline
from embedline.chunking import Chunk, ChunkingSpec
from embedline.chunking.factory import make_chunker
from embedline.core import names, storage_size
from embedline.core.expression import require_single_expression
from embedline.core.prices import TOKENS_PER_PRICE
from embedline.core.processes import prepare_environment
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.core.text import repair_text
from embedline.core.tokens import average_tokens
from embedline.errors import InvalidParameter, NotFound, UnusableText
from embedline.estimate.estimators import Amount, Sample
from embedline.estimate.table_sample import Subject, draw
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.pipelines.alter import plan_in_use
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

_SAMPLE_ROWS = (100, 100_000)
_DEFAULT_CHUNK_TOKENS = 256
_CHARACTERS_PER_TOKEN = 4
# Texts of the batch that times a local model, and of those by which other models' tokens are compared.
_TIMED_TEXTS = 64
_COMPARED_TEXTS = 256
_MEGABYTE = 1024 * 1024
# SQLSTATE of a text that cannot be a name.
_INVALID_NAME = "42602"

_PIPELINE = """
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS source, pg_get_userbyid(c.relowner) AS owner,
        (SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = current_user) AS superuser
    FROM embedline.pipeline AS p JOIN pg_class AS c ON c.oid = p.source JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE p.name = $1
"""
# The text between BEGIN ATOMIC and END: a SELECT over the parameters, with every name qualified.
_FUNCTIONS = """
    SELECT p.proname AS name, p.proargnames AS parameters,
        regexp_replace(pg_get_function_sqlbody(p.oid), '^BEGIN ATOMIC|;\\s*END$', '', 'g') AS query
    FROM pg_proc AS p WHERE p.pronamespace = 'embedline_expression'::regnamespace AND p.proname = ANY ($1)
"""
_TABLE = """
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS source, c.oid::bigint AS source_oid
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = to_regclass($1) AND c.relkind IN ('r', 'p', 'm')
"""
_MODELS = """
    SELECT m.name, m.provider, m.tokenizer, m.price_per_million_tokens AS price,
        r.tokens_per_second, r.origin
    FROM embedline.model AS m LEFT JOIN embedline._measured_rates() AS r ON r.model_id = m.model_id
    ORDER BY m.name
"""


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
class _Plan:
    """The table and the recipe; `pipeline` is None if there is none yet."""

    subject: Subject
    spec: ChunkingSpec
    column_type: str
    m: int
    has_index: bool
    pipeline: str | None


@dataclass(frozen=True)
class _Speed:
    """A model's price of a million tokens, its speed, and their origin."""

    name: str
    local: bool
    tokenizer: str | None
    price: Decimal | None
    tokens_per_second: float | None
    origin: str


@dataclass(frozen=True)
class _Measured:
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


@entry_point
def estimate(
    session: Session, subject: str, model_name: str | None, content: str | None, sample_rows: int, search_path: str
) -> list[dict[str, Any]]:
    """Return the figures of a pipeline, or of a table that has none yet."""
    require_given(sample_rows=sample_rows)
    low, high = _SAMPLE_ROWS
    if not low <= sample_rows <= high:
        raise InvalidParameter(
            f"sample_rows must be between {low} and {high}, not {sample_rows}", hint="1000 gives about 5 % of error."
        )
    prepare_environment()
    plan, model = _plan(session, subject, model_name, content, search_path)
    measured = _measure(session, plan, model, sample_rows)
    speeds = _speeds(session)
    own = _with_speed(session, speeds[model.config.name], model, measured)
    figures = [*_amounts(plan, own, measured), *_sizes(plan, model, measured, session.server_version)]
    tokens = measured.sample.total(measured.tokens)
    figures += _cost(own, tokens, "")
    if plan.pipeline is not None and model_name is None:
        figures += _remaining(session, plan, own, measured)
    figures += [figure for name in sorted(speeds) if name != own.name for figure in _compared(speeds[name], measured)]
    return [figure.row() for figure in figures]


def _plan(
    session: Session, subject: str, model_name: str | None, content: str | None, search_path: str
) -> tuple[_Plan, Model]:
    rows = session.query(_PIPELINE, ["text"], subject)
    if rows and content is None:
        return _pipeline_plan(session, subject, rows[0], model_name)
    session.query("SELECT set_config('search_path', $1, true)", ["text"], search_path)
    found = _table(session, subject)
    session.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    if rows and (not found or model_name is None):
        raise InvalidParameter(
            f'"{subject}" is a pipeline, with a content of its own',
            hint="Leave content out; or give a table and a model with another content.",
        )
    if not found:
        raise NotFound(
            f'there is no pipeline and no table "{subject}"',
            hint="Give the name of a pipeline, or a table with content => and model =>.",
        )
    if model_name is None or content is None:
        raise InvalidParameter(
            f'"{subject}" is a table without a pipeline: its content and its model must be named',
            hint=f"SELECT * FROM embedline.estimate({quote_literal(subject).strip()}, 'small', $$title || body$$);",
        )
    model = load_model(session, model_name)
    require_single_expression(content, "content")
    tokens = min(_DEFAULT_CHUNK_TOKENS, model.max_tokens or _DEFAULT_CHUNK_TOKENS)
    table = Subject(found[0]["source"], int(found[0]["source_oid"]), content, search_path=search_path)
    return _Plan(table, ChunkingSpec("recursive", tokens), "vector", 16, True, None), model


def _table(session: Session, subject: str) -> list[dict[str, Any]]:
    try:
        return session.query(_TABLE, ["text"], subject)
    except Exception as error:
        if sqlstate_of(error) != _INVALID_NAME:
            raise
        return []


def _pipeline_plan(session: Session, name: str, row: dict[str, Any], model_name: str | None) -> tuple[_Plan, Model]:
    pipeline = load_pipeline(session, name)
    version = pipeline.version
    model = version.model if model_name is None else load_model(session, model_name)
    expressions = _expressions(session, pipeline)
    return _Plan(
        subject=Subject(
            row["source"], pipeline.source_oid, expressions["content"], expressions.get("filter"), expressions.get("prefix"),
            run_as=row["owner"] if row["superuser"] else None,
        ),
        spec=pipeline.spec, column_type=version.column_type, m=int(str(version.index_options.get("m", 16))),
        has_index=version.index_method == "hnsw", pipeline=name,
    ), model  # fmt: skip


def _expressions(session: Session, pipeline: Pipeline) -> dict[str, str]:
    """Return the pipeline's expressions over a row t of its source.

    They have the columns' current names.
    """
    plan, _ = plan_in_use(session, pipeline)
    suffixes = {names.generated(pipeline.name, suffix): suffix for suffix in plan.watched}
    found = {}
    for row in session.query(_FUNCTIONS, ["text[]"], list(suffixes)):
        suffix = suffixes[str(row["name"])]
        inputs = ", ".join(
            f"t.{quote_ident(column)} AS {quote_ident(parameter)}"
            for parameter, (column, _) in zip(row["parameters"] or (), plan.watched[suffix].columns, strict=True)
        )
        found[suffix] = f"({row['query']} FROM (SELECT {inputs}) AS embedline_input)"
    return found


def _measure(session: Session, plan: _Plan, model: Model, sample_rows: int) -> _Measured:
    sample, rows, how = draw(session, plan.subject, sample_rows)
    tokenizer = session.scalar("SELECT tokenizer FROM embedline.model WHERE model_id = $1", ["bigint"], model.model_id)
    # Semantic chunking would have to embed. It makes about as many chunks as whole sentences do.
    method = "sentences" if plan.spec.method == "semantic" else plan.spec.method
    chunker = make_chunker(replace(plan.spec, method=method, options=()), tokenizer, None)
    breathe = let_cancel_through(session)
    measured = _Measured(sample, [], [], [], [], [], [], how)
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
        counted = _count_tokens(tokenizer, texts) * (characters / max(sum(map(len, texts)), 1))
        measured.accepted.append(float(row.accepted))
        measured.embedded.append(float(bool(chunks)))
        measured.chunks.append(len(chunks) * scale)
        measured.tokens.append(counted * scale)
        measured.characters.append(characters * scale)
        measured.texts.extend(texts if len(measured.texts) < _COMPARED_TEXTS else [])
    return measured


@functools.lru_cache(maxsize=4)
def _tokenizer(definition: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(definition)


def _count_tokens(tokenizer: str | None, texts: Sequence[str]) -> float:
    if not texts:
        return 0.0
    if tokenizer is None:
        return sum(map(average_tokens, texts))
    encoded = _tokenizer(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return float(sum(len(encoding) for encoding in encoded))


def _speeds(session: Session) -> dict[str, _Speed]:
    return {
        row["name"]: _Speed(
            row["name"], row["provider"] == "sentence-transformers", row["tokenizer"], row["price"],
            row["tokens_per_second"], row["origin"] or "",
        )
        for row in session.query(_MODELS)
    }  # fmt: skip


def _with_speed(session: Session, speed: _Speed, model: Model, measured: _Measured) -> _Speed:
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
    rate = _count_tokens(speed.tokenizer, texts) / max(seconds, 1e-6)
    session.query("SELECT embedline._note_rate($1, $2)", ["text", "double precision"], speed.name, rate)
    return replace(speed, tokens_per_second=rate, origin="measured")


def _amounts(plan: _Plan, own: _Speed, measured: _Measured) -> list[Figure]:
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


def _sizes(plan: _Plan, model: Model, measured: _Measured, server_version: int) -> list[Figure]:
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


def _cost(speed: _Speed, tokens: Amount, suffix: str) -> list[Figure]:
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


def _remaining(session: Session, plan: _Plan, own: _Speed, measured: _Measured) -> list[Figure]:
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


def _compared(other: _Speed, measured: _Measured) -> list[Figure]:
    """Return money and hours of the same chunks with another registered model."""
    texts = measured.texts[:_COMPARED_TEXTS]
    share = _count_tokens(other.tokenizer, texts) / max(sum(map(len, texts)), 1)
    tokens = measured.sample.total(measured.characters).times(share)
    # A remote model without price and speed has nothing to compare.
    return [f for f in _cost(other, tokens, f" with {other.name}") if f.amount or (other.local and f.unit == "hours")]
