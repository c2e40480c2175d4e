"""Add a version: a model or a recipe beside the one that serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embedline.catalog.load import load_embedding_model, load_version, load_versions
from embedline.catalog.rights import require_control
from embedline.catalog.values import Model, Pipeline
from embedline.chunking import ChunkingSpec
from embedline.core import names
from embedline.core.fingerprint import recipe_stamp
from embedline.core.recipe import METHOD_NAMES, ChunkingChoice, IndexSpec, VersionChoice, VersionSpec
from embedline.core.storage_size import INDEX_DIMENSIONS
from embedline.errors import AlreadyExists
from embedline.gate.training import require_untrained_canaries
from embedline.pipelines.alter import restart_ranges
from embedline.pipelines.ddl.search_functions import create_search_functions
from embedline.pipelines.ddl.tables import chunk_set_statements
from embedline.pipelines.functions import rewrite_trigger_functions
from embedline.pipelines.keyword_index import create_tables
from embedline.pipelines.plan import current_plan
from embedline.pipelines.recipe_check import check_modality, check_version, next_chunking
from embedline.pipelines.register import (
    NewVersion,
    create_version_table,
    grant_tables,
    insert_chunk_set,
    insert_version,
    version_fingerprint,
)
from embedline.pipelines.state import load_alone
from embedline.pipelines.views import create_version_view
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import retry_locked
from embedline.postgres.session import Session
from embedline.queue import chunk_queue
from embedline.versions.fill import check_backfill, store_backfill

# A model with another tokenizer may count more tokens in a chunk than the one it was cut by: so much room must be left.
_TOKENIZER_MARGIN = 2
_SAME_TOKENIZER = """
    SELECT s.tokenizer IS NOT DISTINCT FROM m.tokenizer
    FROM embedline.chunk_set AS s, embedline.model AS m WHERE s.chunk_set_id = $1 AND m.model_id = $2
"""


@entry_point
def add_embedding_version(session: Session, name: str, parameters: dict[str, Any]) -> int:
    """Create a version and queue its work; return its number.

    Every change is written to it from now on. Embeds nothing.
    """
    choice = VersionChoice.from_parameters(parameters)
    require_control(session, name)
    check_backfill(choice.backfill)
    model = load_embedding_model(session, choice.model)
    pipeline = load_alone(session, name)
    require_untrained_canaries(session, pipeline, model)
    spec = _version_spec(session, pipeline, model, choice)
    check_modality(pipeline.modality, model)
    check_version(spec, model)
    chunking, set_number = _chunk_set(session, pipeline, model, choice.chunking)
    fingerprint = version_fingerprint(model, spec.column_type, spec.distance, chunking, pipeline.document_prefix)
    _require_new(pipeline, load_versions(session, name), fingerprint)
    number = max(number for _, number, _ in pipeline.versions) + 1
    plan, source = current_plan(session, pipeline)
    is_new_set = set_number not in plan.chunk_sets
    if is_new_set:
        plan = replace(plan, chunk_sets=(*plan.chunk_sets, set_number))
        for statement in chunk_set_statements(plan, set_number):
            session.execute(statement)
        if pipeline.keyword is not None:
            create_tables(session, plan, source, [set_number])
        insert_chunk_set(session, pipeline.pipeline_id, set_number, chunking, model)
        rewrite_trigger_functions(session, plan)
    retry_locked(
        session,
        lambda: create_version_table(session, plan, number, set_number, spec.column_type, model.config.dimensions),
        "the chunk table",
    )
    new = NewVersion(number, set_number, model, spec, fingerprint)
    store_backfill(session, insert_version(session, pipeline.pipeline_id, new), choice.backfill)
    added = load_version(session, name, number)
    create_version_view(session, added, plan, source)
    grant_tables(session, plan, source, [names.chunk_suffix(set_number), names.version_suffix(number)])
    create_search_functions(session, added, plan, source)
    _begin(session, pipeline, added, is_new_set)
    return number


def _begin(session: Session, pipeline: Pipeline, added: Pipeline, is_new_set: bool) -> None:
    """Queue the version's work.

    It is the stored chunks, or every row again if they are not chunked for it.
    """
    session.query(
        "UPDATE embedline.pipeline SET generation = generation + 1 WHERE pipeline_id = $1",
        ["bigint"], pipeline.pipeline_id,
    )  # fmt: skip
    if not is_new_set:
        chunk_queue.enqueue_range(session, added)
        return
    # With the version's id: what was cut for an earlier version of this recipe is gone, and no document counts as cut.
    stamp = recipe_stamp([pipeline.version.fingerprint, added.version.fingerprint, str(added.version.version_id)])
    session.query(
        "UPDATE embedline.pipeline SET recipe = $2 WHERE pipeline_id = $1",
        ["bigint", "integer"], pipeline.pipeline_id, stamp,
    )  # fmt: skip
    restart_ranges(session, pipeline)


def _version_spec(session: Session, pipeline: Pipeline, model: Model, choice: VersionChoice) -> VersionSpec:
    """Return the version's column and index; the serving version gives the rest."""
    serving = pipeline.version
    index = IndexSpec(serving.index_method, serving.index_options)
    spec = choice.over(VersionSpec(serving.column_type, serving.distance, index))
    dimensions = model.config.dimensions or 0
    if (
        choice.column_type is None
        and spec.index.method != "none"
        and INDEX_DIMENSIONS["vector"] < dimensions <= INDEX_DIMENSIONS["halfvec"]
        and spec.column_type == "vector"
    ):
        spec = replace(spec, column_type="halfvec")
        session.plpy.notice(
            f"column_type is halfvec: the model has {dimensions} dimensions,"
            f" and {METHOD_NAMES[spec.index.method]} indexes vector up to {INDEX_DIMENSIONS['vector']}"
        )
    return spec


def _chunk_set(session: Session, pipeline: Pipeline, model: Model, choice: ChunkingChoice) -> tuple[ChunkingSpec, int]:
    """Return the version's chunking and the number of its chunk set."""
    spec = pipeline.spec
    is_readable = _reads_chunks(session, pipeline, model)
    if not choice.is_given and not is_readable:
        tokens = min(spec.tokens or 1, model.max_tokens or spec.tokens or 1)
        session.plpy.notice(
            f"version is chunked again, in up to {tokens} tokens of the model",
            detail=f'Model "{model.config.name}" reads {model.max_tokens} tokens of its own;'
            f" the chunks that are there have up to {spec.tokens} of another model's.",
        )
        return replace(spec, tokens=tokens, overlap=min(spec.overlap, tokens - 1)), _next_set(pipeline)
    wanted = next_chunking(choice, spec, model, pipeline.modality) if choice.is_given else spec
    if wanted == spec and is_readable:
        return spec, pipeline.chunk_set.number
    return wanted, _next_set(pipeline)


def _next_set(pipeline: Pipeline) -> int:
    return max(number for _, _, number in pipeline.versions) + 1


def _reads_chunks(session: Session, pipeline: Pipeline, model: Model) -> bool:
    """Whether the model reads the chunks of the serving version to their ends."""
    tokens, limit = pipeline.spec.tokens, model.max_tokens
    if tokens is None or limit is None:
        return True
    if session.scalar(_SAME_TOKENIZER, ["bigint", "bigint"], pipeline.chunk_set.chunk_set_id, model.model_id):
        return tokens <= limit
    return tokens * _TOKENIZER_MARGIN <= limit


def _require_new(pipeline: Pipeline, versions: list[Pipeline], fingerprint: str) -> None:
    for other in versions:
        if other.version.fingerprint == fingerprint:
            raise AlreadyExists(
                f'version {other.version.number} of pipeline "{pipeline.name}" has this recipe already',
                hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{pipeline.name}'; shows how far it is.",
            )
