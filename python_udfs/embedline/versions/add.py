"""Add a version: a model or a recipe beside the one that serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embedline.catalog.load import load_model, load_version, load_versions
from embedline.catalog.rights import require_control
from embedline.catalog.values import Model, Pipeline, chunk_table_suffix
from embedline.chunking import ChunkingSpec
from embedline.errors import AlreadyExists
from embedline.pipelines.alter import restart_ranges
from embedline.pipelines.ddl.search_functions import create_search_functions
from embedline.pipelines.ddl.tables import chunk_set_statements
from embedline.pipelines.functions import rewrite_trigger_functions
from embedline.pipelines.plan import current_plan
from embedline.pipelines.recipe_check import INDEX_DIMENSIONS, check_recipe, spec_for
from embedline.pipelines.register import (
    create_version_table,
    grant_tables,
    insert_chunk_set,
    insert_version,
    recipe_stamp,
    version_fingerprint,
)
from embedline.pipelines.state import load_alone
from embedline.pipelines.views import create_version_view
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import retry_locked
from embedline.postgres.session import Session, as_mapping
from embedline.queue import chunk_queue
from embedline.versions.fill import check_backfill, store_backfill

# A model with another tokenizer may count more tokens in a chunk than the one it was cut by: so much room must be left.
_TOKENIZER_MARGIN = 2
_RECIPE = ("column_type", "distance", "index_method", "index_options")
_CHUNKING = ("chunking", "chunk_tokens", "chunk_overlap", "chunking_options")
_SAME_TOKENIZER = """
    SELECT s.tokenizer IS NOT DISTINCT FROM m.tokenizer
    FROM embedline.chunk_set AS s, embedline.model AS m WHERE s.chunk_set_id = $1 AND m.model_id = $2
"""


@entry_point
def add_embedding_version(session: Session, name: str, given: dict[str, Any]) -> int:
    """Create a version, begin to write it with every change, queue what is there; return its number. Embeds nothing."""
    require_control(session, name)
    check_backfill(given["backfill_order"], given["backfill_rate"])
    model = load_model(session, given.pop("model"))
    pipeline = load_alone(session, name)
    recipe = _recipe(session, pipeline, model, given)
    check_recipe({**recipe, "capture": "auto", "weight": 1.0}, model)
    spec, set_number = _chunk_set(session, pipeline, model, given)
    fingerprint = version_fingerprint(model, recipe["column_type"], recipe["distance"], spec, pipeline.document_prefix)
    _require_new(pipeline, load_versions(session, name), fingerprint)
    number = max(number for _, number, _ in pipeline.versions) + 1
    plan, source = current_plan(session, pipeline)
    is_new_set = set_number not in plan.chunk_sets
    if is_new_set:
        plan = replace(plan, chunk_sets=(*plan.chunk_sets, set_number))
        for statement in chunk_set_statements(plan, set_number):
            session.execute(statement)
        insert_chunk_set(session, pipeline.pipeline_id, set_number, spec, model)
        rewrite_trigger_functions(session, plan)
    retry_locked(
        session,
        lambda: create_version_table(session, plan, number, set_number, recipe["column_type"], model.config.dimensions),
        "the chunk table",
    )
    version_id = insert_version(session, pipeline.pipeline_id, number, set_number, model, recipe, fingerprint)
    store_backfill(session, version_id, given["backfill_order"], given["backfill_rate"])
    added = load_version(session, name, number)
    create_version_view(session, added, plan, source)
    grant_tables(session, plan, source, [chunk_table_suffix(set_number), f"v{number}"])
    create_search_functions(session, added, plan, source)
    _begin(session, pipeline, added, is_new_set)
    return number


def _begin(session: Session, pipeline: Pipeline, added: Pipeline, is_new_set: bool) -> None:
    """Queue what the version has to embed: chunks that are there, or through another look at every row where they are not."""
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


def _recipe(session: Session, pipeline: Pipeline, model: Model, given: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of the version's column and index: those given, else as the serving version has them."""
    serving = pipeline.version
    current: dict[str, Any] = {
        "column_type": serving.column_type, "distance": serving.distance,
        "index_method": serving.index_method, "index_options": dict(serving.index_options),
    }  # fmt: skip
    recipe = {name: current[name] if given[name] is None else given[name] for name in _RECIPE}
    recipe["index_options"] = dict(as_mapping(recipe["index_options"]))
    dimensions = model.config.dimensions or 0
    if (
        given["column_type"] is None
        and recipe["index_method"] == "hnsw"
        and INDEX_DIMENSIONS["vector"] < dimensions <= INDEX_DIMENSIONS["halfvec"]
        and recipe["column_type"] == "vector"
    ):
        recipe["column_type"] = "halfvec"
        session.plpy.notice(
            f"column_type is halfvec: the model has {dimensions} dimensions,"
            f" and HNSW indexes vector up to {INDEX_DIMENSIONS['vector']}"
        )
    return recipe


def _chunk_set(session: Session, pipeline: Pipeline, model: Model, given: dict[str, Any]) -> tuple[ChunkingSpec, int]:
    """Return how the version's contents are chunked, and the number of the chunk set: one that is there, or the next."""
    spec = pipeline.spec
    if all(given[name] is None for name in _CHUNKING):
        if not _reads_chunks(session, pipeline, model):
            tokens = min(spec.tokens or 1, model.max_tokens or spec.tokens or 1)
            spec = replace(spec, tokens=tokens, overlap=min(spec.overlap, tokens - 1))
            session.plpy.notice(
                f"version is chunked anew, in up to {tokens} tokens of the model",
                detail=f'Model "{model.config.name}" reads {model.max_tokens} tokens of its own;'
                f" the chunks that are there have up to {pipeline.spec.tokens} of another model's.",
            )
            return spec, _next_set(pipeline)
        return spec, pipeline.chunk_set.number
    method = given["chunking"] or spec.method
    options = given["chunking_options"]
    if options is None:
        options = dict(spec.options) if method == spec.method else {}
    wanted = spec_for(
        method,
        spec.tokens if given["chunk_tokens"] is None else given["chunk_tokens"],
        spec.overlap if given["chunk_overlap"] is None else given["chunk_overlap"],
        as_mapping(options),
        model,
    )
    if wanted == spec and _reads_chunks(session, pipeline, model):
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
