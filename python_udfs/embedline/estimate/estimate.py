"""Estimate rows, tokens, money, bytes and hours before anything is paid for.

Runs with the caller's rights: the sample reads the table, and evaluates the content, as the caller. A superuser does it
as the source's owner, because the expressions of a pipeline are that role's code.

No provider is asked except a model on this machine. Its speed is measured with one small batch if the ledger does not
know it.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

from embedline.catalog.load import load_model, load_pipeline
from embedline.catalog.values import Model, Pipeline
from embedline.chunking import Chunk, ChunkingSpec
from embedline.chunking.factory import make_chunker
from embedline.core import names
from embedline.core.expression import require_single_expression
from embedline.core.processes import prepare_environment
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.core.text import repair_text
from embedline.errors import InvalidParameter, NotFound, UnusableText
from embedline.estimate.figures import (
    COMPARED_TEXTS,
    Measured,
    Plan,
    Speed,
    amounts,
    compared,
    cost,
    count_tokens,
    remaining,
    sizes,
)
from embedline.estimate.table_sample import Subject, draw
from embedline.models.pool import embedder_for, let_cancel_through, wait_result
from embedline.pipelines.alter import plan_in_use
from embedline.postgres.entry import entry_point, require_given
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

_SAMPLE_ROWS = (100, 100_000)
_DEFAULT_CHUNK_TOKENS = 256
# Texts of the batch that times a local model.
_TIMED_TEXTS = 64
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
    figures = [*amounts(plan, own, measured), *sizes(plan, model, measured, session.server_version)]
    tokens = measured.sample.total(measured.tokens)
    figures += cost(own, tokens, "")
    if plan.pipeline is not None and model_name is None:
        figures += remaining(session, plan, own, measured)
    figures += [figure for name in sorted(speeds) if name != own.name for figure in compared(speeds[name], measured)]
    return [figure.row() for figure in figures]


def _plan(
    session: Session, subject: str, model_name: str | None, content: str | None, search_path: str
) -> tuple[Plan, Model]:
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
    return Plan(table, ChunkingSpec("recursive", tokens), "vector", 16, True, None), model


def _table(session: Session, subject: str) -> list[dict[str, Any]]:
    try:
        return session.query(_TABLE, ["text"], subject)
    except Exception as error:
        if sqlstate_of(error) != _INVALID_NAME:
            raise
        return []


def _pipeline_plan(session: Session, name: str, row: dict[str, Any], model_name: str | None) -> tuple[Plan, Model]:
    pipeline = load_pipeline(session, name)
    version = pipeline.version
    model = version.model if model_name is None else load_model(session, model_name)
    expressions = _expressions(session, pipeline)
    return Plan(
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


def _measure(session: Session, plan: Plan, model: Model, sample_rows: int) -> Measured:
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


def _speeds(session: Session) -> dict[str, Speed]:
    return {
        row["name"]: Speed(
            row["name"], row["provider"] == "sentence-transformers", row["tokenizer"], row["price"],
            row["tokens_per_second"], row["origin"] or "",
        )
        for row in session.query(_MODELS)
    }  # fmt: skip


def _with_speed(session: Session, speed: Speed, model: Model, measured: Measured) -> Speed:
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
