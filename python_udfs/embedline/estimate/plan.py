"""Find the table, the recipe and the model of an estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embedline.catalog.load import load_embedding_model, load_pipeline
from embedline.catalog.modality import require_text
from embedline.catalog.values import Model, Pipeline, Version
from embedline.chunking import ChunkingSpec
from embedline.core import names
from embedline.core.expression import require_single_expression
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import InvalidParameter, NotFound
from embedline.estimate.table_sample import Subject
from embedline.pipelines.alter import plan_in_use
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

_DEFAULT_CHUNK_TOKENS = 256
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


@dataclass(frozen=True)
class Plan:
    """The table and the recipe; `pipeline` is None if there is none yet."""

    subject: Subject
    spec: ChunkingSpec
    column_type: str
    m: int
    # "hnsw", "ivfflat" or "none", and the lists asked for.
    method: str
    pipeline: str | None
    lists: int | None = None


def find_plan(
    session: Session, subject: str, model_name: str | None, content: str | None, search_path: str
) -> tuple[Plan, Model]:
    """Return the plan of a pipeline, or of a table without one, and its model.

    Raises NotFound, or InvalidParameter if a table comes without model or content.
    """
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
    model = load_embedding_model(session, model_name)
    require_single_expression(content, "content")
    tokens = min(_DEFAULT_CHUNK_TOKENS, model.max_tokens or _DEFAULT_CHUNK_TOKENS)
    table = Subject(found[0]["source"], int(found[0]["source_oid"]), content, search_path=search_path)
    return Plan(table, ChunkingSpec("recursive", tokens), "vector", 16, "hnsw", None), model


def _table(session: Session, subject: str) -> list[dict[str, Any]]:
    try:
        return session.query(_TABLE, ["text"], subject)
    except Exception as error:
        if sqlstate_of(error) != _INVALID_NAME:
            raise
        return []


def _pipeline_plan(session: Session, name: str, row: dict[str, Any], model_name: str | None) -> tuple[Plan, Model]:
    pipeline = load_pipeline(session, name)
    require_text(pipeline, "an estimate")
    version = pipeline.version
    model = version.model if model_name is None else load_embedding_model(session, model_name)
    expressions = _expressions(session, pipeline)
    return Plan(
        subject=Subject(
            row["source"], pipeline.source_oid, expressions["content"], expressions.get("filter"), expressions.get("prefix"),
            run_as=row["owner"] if row["superuser"] else None,
        ),
        spec=pipeline.spec, column_type=version.column_type, m=int(str(version.index_options.get("m", 16))),
        method=version.index_method, pipeline=name, lists=_lists(version),
    ), model  # fmt: skip


def _lists(version: Version) -> int | None:
    given = version.index_options.get("lists")
    return None if given is None else int(str(given))


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
