"""Read models and pipelines from a client, through any driver that Alembic has."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from embedline.core.file_addresses import content_parts

_MODELS = "SELECT jsonb_object_agg(m.name, to_jsonb(m))::text FROM embedline.model AS m"
_PIPELINES = """
    SELECT jsonb_agg(jsonb_build_object('name', p.name, 'source', p.source::oid::regclass::text,
        'source_oid', p.source::oid::bigint, 'content', p.content_expression, 'filter', p.filter_expression,
        'document_prefix', CASE p.modality WHEN 'text' THEN p.document_prefix_expression END,
        'modality', p.modality, 'is_reference', p.is_reference,
        'caption', CASE WHEN p.modality <> 'text' THEN p.document_prefix_expression END,
        'tenant', p.tenant_expression, 'weight', p.weight,
        'capture', p.capture, 'keyword', p.keyword::regconfig::text, 'keyword_names', jsonb_build_array(
            p.keyword, p.keyword::regconfig::text), 'versions', (
            SELECT jsonb_agg(jsonb_build_object('number', v.number, 'serving', v.version_id = p.serving_version_id,
                'model', m.name, 'column_type', v.column_type, 'distance', v.distance, 'index_method', v.index_method,
                'index_options', v.index_options, 'chunking', s.chunking, 'chunk_tokens', s.chunk_tokens,
                'chunk_overlap', s.chunk_overlap, 'chunking_options', s.chunking_options) ORDER BY v.number)
            FROM embedline.version AS v JOIN embedline.model AS m USING (model_id)
            JOIN embedline.chunk_set AS s ON s.pipeline_id = v.pipeline_id AND s.number = v.chunk_set
            WHERE v.pipeline_id = p.pipeline_id)))::text
    FROM embedline.pipeline AS p
"""
# An address and what changes with its file, which the database stores as one expression.
ADDRESS = ("content", "changed_by")


@dataclass(frozen=True)
class StoredPipeline:
    """A pipeline of the database with its versions, by number."""

    name: str
    values: Mapping[str, Any]
    versions: tuple[Mapping[str, Any], ...]

    @property
    def serving(self) -> Mapping[str, Any]:
        """Return the version that serves."""
        return next(version for version in self.versions if version["serving"])

    @property
    def next_number(self) -> int:
        """Return the number that embedline.add_embedding_version gives next."""
        return 1 + max(int(version["number"]) for version in self.versions)


def is_configuration(named: str, names: Collection[str | None]) -> bool:
    """Return True if a text names a text search configuration that has these names.

    The database has the qualified name and the one along the search_path. A text is folded as an identifier is.
    """
    return (named if '"' in named else named.lower()) in names


@dataclass(frozen=True)
class Catalogue:
    """Models and pipelines of a database, by name."""

    models: Mapping[str, Mapping[str, Any]]
    pipelines: Mapping[str, StoredPipeline]


def is_installed(connection: Connection) -> bool:
    """Return True if the database has an Embedline whose pipelines have versions."""
    # Not to_regclass, which fails for a role without USAGE on the schema.
    query = (
        "SELECT count(*) FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'embedline' AND c.relname = 'versions'"
    )
    return bool(connection.exec_driver_sql(query).scalar())


def read_catalogue(connection: Connection) -> Catalogue:
    """Read models and pipelines."""
    models = json.loads(connection.exec_driver_sql(_MODELS).scalar() or "{}")
    rows = json.loads(connection.exec_driver_sql(_PIPELINES).scalar() or "[]")
    pipelines = {row["name"]: StoredPipeline(row["name"], with_address(row), tuple(row["versions"])) for row in rows}
    return Catalogue(models, pipelines)


def with_address(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pipeline's values with address and `changed_by` apart."""
    parts = content_parts(values["content"]) if values["is_reference"] else (values["content"], None)
    return {**values, **dict(zip(ADDRESS, parts, strict=True))}
