"""Write a pipeline, its chunk sets and its versions into Embedline's own tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from embedline.catalog.rights import caller
from embedline.catalog.source import Source
from embedline.catalog.values import Model
from embedline.chunking import ChunkingSpec
from embedline.core.fingerprint import recipe_fingerprint, recipe_stamp
from embedline.core.recipe import PipelineSpec, VersionSpec
from embedline.pipelines.ddl.plan import CODE_VERSION, CapturePlan
from embedline.pipelines.ddl.tables import version_statements
from embedline.pipelines.inputs import store_inputs
from embedline.postgres.readable import grant_select
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session


def create_version_table(
    session: Session, plan: CapturePlan, number: int, chunk_set: int, column_type: str, dimensions: int | None
) -> None:
    """Create the table of a version's vectors."""
    vector_type = f"{vector_schema(session)}.{column_type}({dimensions})"
    for statement in version_statements(plan, number, vector_type, chunk_set):
        session.execute(statement)


def register(
    session: Session, spec: PipelineSpec, plan: CapturePlan, source: Source, model: Model, chunking: ChunkingSpec
) -> int:
    """Register a pipeline with its first chunk set and version; return its id."""
    pipeline_id = session.scalar(
        """
        INSERT INTO embedline.pipeline (name, source, content_expression, filter_expression, expression_search_path,
            key_attributes, input_attributes, key_columns, key_types, view_columns, capture, created_by,
            document_prefix_expression, tenant_expression, weight, code_version, source_name, source_columns,
            keyword, modality, is_reference)
        SELECT $1, $2::oid::regclass, $3, $4, $5,
            (SELECT array_agg(a.attnum ORDER BY k.position) FROM unnest($6) WITH ORDINALITY AS k (name, position)
                JOIN pg_attribute AS a ON a.attrelid = $2::oid AND a.attname = k.name),
            '{}', $7, $8, '{}', $9, $10, $11, $12, $13, $14, format('%I.%I', $15::text, $16::text),
            (SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_attribute AS a
                WHERE a.attrelid = $2::oid AND a.attnum > 0 AND NOT a.attisdropped), $17, $18, $19
        RETURNING pipeline_id
        """,
        ["text", "bigint", "text", "text", "text", "name[]", "text[]", "text[]", "text", "text", "text", "text",
         "double precision", "integer", "text", "text", "text", "text", "boolean"],
        plan.name, source.oid, spec.expressions.content, spec.expressions.filter, spec.search_path,
        [key.source_name for key in plan.keys], [key.name for key in plan.keys], [key.type for key in plan.keys],
        plan.capture, caller(session),
        spec.expressions.document_prefix, spec.expressions.tenant, spec.weight, CODE_VERSION, source.schema, source.name,
        spec.keyword, spec.modality, spec.is_reference,
    )  # fmt: skip
    store_inputs(session, plan)
    session.query("SELECT embedline._resolve_attributes()")
    insert_chunk_set(session, pipeline_id, 1, chunking, model)
    column_type, distance = spec.version.column_type, spec.version.distance
    fingerprint = version_fingerprint(model, column_type, distance, chunking, spec.expressions.document_prefix)
    version_id = insert_version(session, pipeline_id, NewVersion(1, 1, model, spec.version, fingerprint))
    session.query(
        "UPDATE embedline.pipeline SET serving_version_id = $2, recipe = $3 WHERE pipeline_id = $1",
        ["bigint", "bigint", "integer"], pipeline_id, version_id, recipe_stamp([fingerprint]),
    )  # fmt: skip
    session.query("INSERT INTO embedline.pipeline_health (pipeline_id) VALUES ($1)", ["bigint"], pipeline_id)
    return int(pipeline_id)


def insert_chunk_set(session: Session, pipeline_id: int, number: int, spec: ChunkingSpec, model: Model) -> None:
    """Register a way of chunking, whose tokens are those of `model`."""
    session.query(
        """
        INSERT INTO embedline.chunk_set (pipeline_id, number, chunking, chunk_tokens, chunk_overlap, chunking_options, tokenizer)
        SELECT $1, $2, $3, $4, $5, $6, m.tokenizer FROM embedline.model AS m WHERE m.model_id = $7
        """,
        ["bigint", "integer", "text", "integer", "integer", "jsonb", "bigint"],
        pipeline_id, number, spec.method, spec.tokens, spec.overlap, json.dumps(dict(spec.options)), model.model_id,
    )  # fmt: skip


@dataclass(frozen=True)
class NewVersion:
    """A version that is to be registered; `chunk_set` is the number of its chunk set."""

    number: int
    chunk_set: int
    model: Model
    spec: VersionSpec
    fingerprint: str


def insert_version(session: Session, pipeline_id: int, version: NewVersion) -> int:
    """Register a version; return its id."""
    spec = version.spec
    return int(
        session.scalar(
            """
            INSERT INTO embedline.version (pipeline_id, number, chunk_set, model_id, dimensions, column_type, distance,
                index_method, index_options, fingerprint)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) RETURNING version_id
            """,
            ["bigint", "integer", "integer", "bigint", "integer", "text", "text", "text", "jsonb", "text"],
            pipeline_id,
            version.number,
            version.chunk_set,
            version.model.model_id,
            version.model.config.dimensions,
            spec.column_type,
            spec.distance,
            spec.index.method,
            json.dumps(dict(spec.index.options)),
            version.fingerprint,
        )
    )


def version_fingerprint(
    model: Model, column_type: str, distance: str, spec: ChunkingSpec, document_prefix: str | None
) -> str:
    """Return the fingerprint of a version's recipe.

    It covers all that decides chunks and vectors but the content, which has its own hash.
    """
    return recipe_fingerprint({
        "model": model.fingerprint, "document_prefix": model.config.document_prefix,
        "query_prefix": model.config.query_prefix, "dimensions": model.config.dimensions, "column_type": column_type,
        "distance": distance, "normalised": distance != "l2", "chunking": spec.method, "chunk_tokens": spec.tokens,
        "chunk_overlap": spec.overlap, "chunking_options": dict(spec.options), "prefix_expression": document_prefix,
    })  # fmt: skip


def grant_tables(session: Session, plan: CapturePlan, source: Source, suffixes: Sequence[str]) -> None:
    """Let readers and the source's owner read generated tables, through the views.

    The views run with their reader's rights (security_invoker), so the source's own grants and row-level security decide at
    each query, also those given later. Readers have no USAGE on embedline_data: they cannot name the tables directly.
    """
    grant_select(session, [plan.generated(suffix) for suffix in suffixes], source.owner)
