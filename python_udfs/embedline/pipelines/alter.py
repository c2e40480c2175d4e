"""Alter the recipe of a pipeline in use."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from typing import Any

from embedline.catalog.rights import require_control
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.chunking import ChunkingSpec
from embedline.core import names
from embedline.core.fingerprint import recipe_stamp
from embedline.core.recipe import Expressions, PipelineChanges
from embedline.errors import EmbedlineError, InvalidParameter
from embedline.pipelines.ddl.plan import CODE_VERSION, FUNCTIONS, CapturePlan
from embedline.pipelines.ddl.tables import tenant_index, tenant_index_statements
from embedline.pipelines.ddl.triggers import update_trigger_statements
from embedline.pipelines.expressions import deparsed
from embedline.pipelines.functions import (
    create_functions,
    generated_functions,
    rewrite_trigger_functions,
)
from embedline.pipelines.inputs import PARAMETERS, expressions_in_use, store_inputs
from embedline.pipelines.keyword_index import known_config, set_keyword
from embedline.pipelines.plan import content_kind, current_plan
from embedline.pipelines.recipe_check import check_weight, content_or_address, next_chunking, prefix_or_caption
from embedline.pipelines.register import version_fingerprint
from embedline.pipelines.state import load_alone
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait
from embedline.postgres.relations import data_name
from embedline.postgres.session import Session
from embedline.queue.backfill import delete_ranges, insert_ranges

# Parts that alter_pipeline may drop: expressions and the keyword index.
_OPTIONAL = ("filter", "document_prefix", "tenant", "keyword")
# Suffix of the generated function of each expression.
_FUNCTIONS = {parameter: suffix for suffix, parameter in PARAMETERS.items()}
_STORED = """
    SELECT content_expression AS content, filter_expression AS filter, document_prefix_expression AS document_prefix,
        tenant_expression AS tenant
    FROM embedline.pipeline WHERE name = $1 FOR NO KEY UPDATE
"""
_STORE = """
    UPDATE embedline.pipeline SET content_expression = $2, filter_expression = $3, document_prefix_expression = $4,
        tenant_expression = $5, expression_search_path = coalesce($6, expression_search_path), weight = $7,
        generation = generation + 1
    WHERE name = $1
"""
_STORE_CHUNKING = """
    UPDATE embedline.chunk_set SET chunking = $2, chunk_tokens = $3, chunk_overlap = $4, chunking_options = $5
    WHERE chunk_set_id = $1
"""
_STORE_CODE_VERSION = "UPDATE embedline.pipeline SET code_version = $2 WHERE name = $1"
_TRIGGER = "SELECT tgenabled::text, tgattr::text AS columns FROM pg_trigger WHERE tgrelid = $1::oid AND tgname = $2"


@dataclass(frozen=True)
class _Wanted:
    """The expressions, chunking and weight that a pipeline is to have.

    Expressions are as the user wrote them.
    """

    expressions: Expressions
    spec: ChunkingSpec
    weight: float
    keyword: str | None


@entry_point
def alter_pipeline(session: Session, name: str, parameters: dict[str, Any]) -> None:
    """Change the given parts of a pipeline's recipe.

    Rows that this concerns are embedded again one by one.

    Search goes on meanwhile with what is stored. Chunks that come out as before keep their vectors and cost nothing.
    """
    require_control(session, name)
    bound_lock_wait(session)
    pipeline = load_alone(session, name)
    changes = PipelineChanges.from_parameters(_for_modality(pipeline, parameters))
    # Alterations of one pipeline follow each other. NO KEY: a worker that writes a dead letter does not wait.
    stored = Expressions(**session.query(_STORED, ["text"], name)[0])
    current = _Wanted(stored, pipeline.spec, pipeline.weight, pipeline.keyword)
    keyword = known_config(session, changes.keyword, changes.search_path)
    wanted = _wanted(pipeline, current, changes, keyword)
    if wanted == current:
        session.plpy.notice(f'pipeline "{name}" is like that already: nothing has changed')
        return
    changed = wanted.expressions.differing(stored)
    if len(pipeline.versions) > 1 and (wanted.spec != current.spec or "document_prefix" in changed):
        raise InvalidParameter(
            f'the chunking of pipeline "{name}" cannot change while it has {len(pipeline.versions)} versions',
            hint=f"SELECT embedline.drop_embedding_version('{name}', number) first, or give the next version another chunking.",
        )
    if changed:
        _replace_expressions(session, pipeline, changed, changes)
    if wanted.keyword != current.keyword:
        set_keyword(session, pipeline, *plan_in_use(session, pipeline), wanted.keyword)
    _store(session, pipeline, wanted, changes.search_path if changed else None)
    if wanted.spec != current.spec or set(changed) - {"tenant"}:
        _begin_backfill(session, pipeline, wanted)


def _for_modality(pipeline: Pipeline, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with a caption as what it is stored as."""
    given = {
        **parameters,
        "document_prefix": prefix_or_caption(parameters, pipeline.modality),
        "content": content_or_address(parameters, is_reference=pipeline.is_reference),
    }
    if pipeline.modality != "text" and parameters["drop"]:
        given["drop"] = ["document_prefix" if part == "caption" else part for part in parameters["drop"]]
    return given


def _wanted(pipeline: Pipeline, current: _Wanted, changes: PipelineChanges, keyword: str | None) -> _Wanted:
    if unknown := changes.dropped - set(_OPTIONAL):
        raise InvalidParameter(
            f'"{sorted(unknown)[0]}" cannot be dropped from a pipeline', hint=f"Use one of {', '.join(_OPTIONAL)}."
        )
    given = changes.expressions.texts()
    for parameter in (*given, *(["keyword"] if keyword else [])):
        if parameter in changes.dropped:
            raise InvalidParameter(
                f"{parameter} is given and dropped at the same time", hint="Leave it out of drop, or of the call."
            )
    kept = {name: text for name, text in current.expressions.texts().items() if name not in changes.dropped}
    weight = check_weight(current.weight if changes.weight is None else changes.weight)
    spec = next_chunking(changes.chunking, pipeline.spec, pipeline.version.model, pipeline.modality)
    kept_keyword = None if "keyword" in changes.dropped else current.keyword
    return _Wanted(Expressions(**{**kept, **given}), spec, weight, keyword or kept_keyword)


def _replace_expressions(session: Session, pipeline: Pipeline, changed: list[str], changes: PipelineChanges) -> None:
    """Rewrite the functions of changed expressions and all that depends on them.

    These are the functions that read through them, and the trigger that names their columns.
    """
    plan, source = plan_in_use(session, pipeline)
    # What CREATE TRIGGER needs below. Taken first: so no write and no other alteration comes between the two.
    session.execute(f"LOCK TABLE {source.qualified} IN SHARE ROW EXCLUSIVE MODE")
    plan, source = plan_in_use(session, pipeline)
    expressions = changes.expressions.only(changed)
    found = deparsed(session, source, expressions, changes.search_path, content_kind(pipeline))
    plan = replace(
        plan,
        content=found.get("content", plan.content),
        filter=found.get("filter") if "filter" in changed else plan.filter,
        prefix=found.get("document_prefix") if "document_prefix" in changed else plan.prefix,
        tenant=found.get("tenant") if "tenant" in changed else plan.tenant,
    )
    replace_functions(session, plan, source, [_FUNCTIONS[parameter] for parameter in changed])
    rewrite_trigger_functions(session, plan)
    for statement in update_trigger_statements(plan):
        session.execute(statement)
    if "tenant" in changed:
        index = data_name(tenant_index(plan))
        for statement in tenant_index_statements(plan) or [f"DROP INDEX IF EXISTS {index}"]:
            session.execute(statement)


def replace_functions(session: Session, plan: CapturePlan, source: Source, changed: list[str]) -> None:
    """Drop and create the generated functions.

    Those of expressions that have not changed stay as they are.
    """
    kept = {suffix for suffix in _FUNCTIONS.values() if suffix not in changed}
    doomed = tuple(suffix for suffix in FUNCTIONS if suffix not in kept)
    for row in generated_functions(session, plan.name, doomed):
        session.execute(f"DROP FUNCTION {row['signature']}")
    create_functions(session, plan, source)
    store_inputs(session, plan)
    session.query(_STORE_CODE_VERSION, ["text", "integer"], plan.name, CODE_VERSION)


def plan_in_use(session: Session, pipeline: Pipeline) -> tuple[CapturePlan, Source]:
    """Return the current plan of a pipeline, and its source.

    Expressions are without text, with the columns' current names.
    """
    plan, source = current_plan(session, pipeline)
    expressions = expressions_in_use(session, pipeline)
    content = expressions.get("content")
    if content is None or not has_readers(session, pipeline):
        raise EmbedlineError(
            f'the functions of pipeline "{pipeline.name}" are not as Embedline wrote them',
            hint=f"SELECT embedline.refresh_pipeline('{pipeline.name}');",
        )
    trigger = session.query(
        _TRIGGER, ["bigint", "name"], source.oid, names.trigger(pipeline.name, "update")
    )  # fmt: skip
    return replace(
        plan,
        content=content,
        filter=expressions.get("filter"),
        prefix=expressions.get("prefix"),
        tenant=expressions.get("tenant_value"),
        always=bool(trigger) and trigger[0]["tgenabled"] == "A",
        watch_all=bool(trigger) and not trigger[0]["columns"],
    ), source


def has_readers(session: Session, pipeline: Pipeline) -> bool:
    """Return True if the functions that read the source exist.

    They go if a column of the source is dropped with CASCADE.
    """
    return bool(generated_functions(session, pipeline.name, ("read",)))


def _store(session: Session, pipeline: Pipeline, wanted: _Wanted, search_path: str | None) -> None:
    session.query(
        _STORE,
        ["text", "text", "text", "text", "text", "text", "double precision"],
        pipeline.name, *astuple(wanted.expressions), search_path, wanted.weight,
    )  # fmt: skip
    session.query(
        _STORE_CHUNKING, ["bigint", "text", "integer", "integer", "jsonb"],
        pipeline.chunk_set.chunk_set_id, wanted.spec.method, wanted.spec.tokens, wanted.spec.overlap,
        json.dumps(dict(wanted.spec.options)),
    )  # fmt: skip


def _begin_backfill(session: Session, pipeline: Pipeline, wanted: _Wanted) -> None:
    """Have every row read again.

    Rows whose content, recipe and filter still agree cost one comparison.
    """
    version = pipeline.version
    fingerprint = version_fingerprint(
        version.model, version.column_type, version.distance, wanted.spec, wanted.expressions.document_prefix
    )
    # Not now(): workers may have written since this transaction began, before it had the versions to itself.
    session.query(
        "UPDATE embedline.pipeline SET altered_at = clock_timestamp() WHERE pipeline_id = $1",
        ["bigint"], pipeline.pipeline_id,
    )  # fmt: skip
    decisive = (wanted.spec, wanted.expressions.document_prefix) != (pipeline.spec, pipeline.document_prefix)
    if decisive:
        session.query(
            "UPDATE embedline.version SET fingerprint = $2 WHERE version_id = $1",
            ["bigint", "text"], version.version_id, fingerprint,
        )  # fmt: skip
        session.query(
            "UPDATE embedline.pipeline SET recipe = $2 WHERE pipeline_id = $1",
            ["bigint", "integer"], pipeline.pipeline_id, recipe_stamp([fingerprint]),
        )  # fmt: skip
    restart_ranges(session, pipeline)


def restart_sweep(session: Session, pipeline: Pipeline) -> None:
    """Have the closing sweep of the backfill search again for missing documents."""
    session.query(
        "UPDATE embedline.version SET state = 'backfilling', completed_at = NULL WHERE version_id = $1",
        ["bigint"], pipeline.version.version_id,
    )  # fmt: skip


def restart_ranges(session: Session, pipeline: Pipeline) -> None:
    """Have the serving version's backfill read every row of the source again."""
    restart_sweep(session, pipeline)
    delete_ranges(session, pipeline.pipeline_id)
    insert_ranges(session, pipeline.pipeline_id, pipeline.source_oid)
