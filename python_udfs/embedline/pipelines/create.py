"""Create a pipeline."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from embedline.catalog.load import load_embedding_model, load_pipeline
from embedline.catalog.rights import caller
from embedline.core import names
from embedline.core.media import require_modality
from embedline.core.recipe import PipelineSpec
from embedline.errors import AlreadyExists, InvalidParameter
from embedline.pipelines.ddl.search_functions import create_search_functions
from embedline.pipelines.ddl.tables import storage_statements
from embedline.pipelines.ddl.triggers import trigger_function_statements, trigger_statements
from embedline.pipelines.functions import create_functions
from embedline.pipelines.keyword_index import create_tables, known_config
from embedline.pipelines.plan import load_source, make_plan, source_oid
from embedline.pipelines.recipe_check import (
    check_choices,
    check_modality,
    check_version,
    check_weight,
    content_or_address,
    first_chunking,
    prefix_or_caption,
)
from embedline.pipelines.register import create_version_table, grant_tables, register
from embedline.pipelines.views import create_routing_view, create_version_view, shown_version, write_serving_function
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait
from embedline.postgres.session import Session
from embedline.queue.backfill import insert_ranges

# 46 + the longest generated suffix ("_chunk_content_hash_idx" and the like) stays within 63 bytes.
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,39}\Z")


@entry_point
def create_pipeline(session: Session, parameters: dict[str, Any]) -> str:
    """Create a pipeline; return its routing view.

    Takes O(blocks) of the source and embeds nothing.
    """
    is_reference = parameters["changed_by"] is not None
    given = {
        "document_prefix": prefix_or_caption(parameters),
        "content": content_or_address(parameters, is_reference=is_reference),
    }
    spec = PipelineSpec.from_parameters({**parameters, **given})
    name = _validated_name(session, spec.name)
    role = caller(session)
    source = load_source(session, source_oid(session, spec.source), role)
    model = load_embedding_model(session, spec.model)
    modality = require_modality(spec.modality)
    check_modality(modality, model)
    check_version(spec.version, model)
    check_choices({"capture": spec.capture})
    check_weight(spec.weight)
    bound_lock_wait(session)
    chunking = first_chunking(spec.chunking, model, modality)
    plan = make_plan(session, spec, source)
    for statement in storage_statements(plan):
        session.execute(statement)
    create_functions(session, plan, source)
    keyword = known_config(session, spec.keyword, spec.search_path)
    pipeline_id = register(session, replace(spec, keyword=keyword), plan, source, model, chunking)
    if keyword is not None:
        create_tables(session, plan, source, plan.chunk_sets)
    create_version_table(session, plan, 1, 1, spec.version.column_type, model.config.dimensions)
    for statement in (*trigger_function_statements(plan), *trigger_statements(plan)):
        session.execute(statement)
    # Only now, under the triggers' lock: no row can come between the measured size and the capture.
    insert_ranges(session, pipeline_id, source.oid)
    shown = shown_version(session, load_pipeline(session, name))
    view = create_routing_view(session, pipeline_id, plan, source, shown)
    create_version_view(session, load_pipeline(session, name), plan, source)
    write_serving_function(session, plan, 1)
    grant_tables(session, plan, source, ["hidden", names.chunk_suffix(1), names.version_suffix(1)])
    create_search_functions(session, load_pipeline(session, name), plan, source)
    return view


def _validated_name(session: Session, name: str) -> str:
    if not _NAME.match(name or ""):
        raise InvalidParameter(
            f'"{name}" cannot name a pipeline',
            hint="Use up to 40 lower-case letters, digits and underscores, not beginning with a digit.",
        )
    if session.scalar("SELECT pipeline_id FROM embedline.pipeline WHERE name = $1", ["text"], name) is not None:
        raise AlreadyExists(
            f'there is a pipeline "{name}" already', hint=f"SELECT embedline.drop_pipeline('{name}') removes it."
        )
    return name
