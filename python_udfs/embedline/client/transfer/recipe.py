"""Read the recipe of a version, as its caller may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg.rows import dict_row

from embedline.client.connection import Connection
from embedline.errors import NotFound

# The last part orders the serving version first, if none is named.
_VERSION = """
    SELECT p.name AS pipeline, v.number AS version, v.version_id, v.version_id = p.serving_version_id AS is_serving,
        v.fingerprint, v.dimensions, v.column_type, v.distance, v.view::oid::bigint AS view_oid,
        v.view::text AS view, p.source::text AS source, p.state, p.view_columns, p.key_columns, p.document_prefix_expression,
        m.name AS model_name, m.fingerprint AS model_fingerprint,
        jsonb_build_object('model', m.model, 'provider', m.provider, 'revision', m.revision,
            'model fingerprint', m.fingerprint, 'dimensions', v.dimensions, 'column type', v.column_type,
            'distance', v.distance, 'document prefix of the model', m.document_prefix,
            'query prefix of the model', m.query_prefix, 'chunking', s.chunking, 'chunk tokens', s.chunk_tokens,
            'chunk overlap', s.chunk_overlap, 'chunking options', s.chunking_options,
            'document prefix', p.document_prefix_expression) AS recipe,
        p.content_expression, p.filter_expression
    FROM embedline.pipeline AS p
    JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
    JOIN embedline.model AS m ON m.model_id = v.model_id
    JOIN embedline.chunk_set AS s ON s.pipeline_id = p.pipeline_id AND s.number = v.chunk_set
    WHERE p.name = %s AND CASE WHEN %s::integer IS NULL THEN v.version_id = p.serving_version_id ELSE v.number = %s END
"""
_EXISTS = "SELECT EXISTS (SELECT FROM embedline.pipeline WHERE name = %s)"


@dataclass(frozen=True)
class VersionRecipe:
    """A version: where it is, and all that decides its chunks and vectors."""

    pipeline: str
    version: int
    version_id: int
    is_serving: bool
    fingerprint: str
    dimensions: int
    column_type: str
    distance: str
    view_oid: int | None
    view: str | None
    source: str
    state: str
    view_columns: dict[str, str]
    key_columns: list[str]
    document_prefix_expression: str | None
    model_name: str
    model_fingerprint: str
    recipe: dict[str, Any]
    content_expression: str
    filter_expression: str | None

    @property
    def key_names(self) -> list[str]:
        """Return the names that the views give the key's columns."""
        return [self.view_columns[column] for column in self.key_columns]

    def metadata(self) -> dict[str, Any]:
        """Return what a file says of its vectors."""
        return {
            "pipeline": self.pipeline,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "recipe": {"model name": self.model_name, **self.recipe},
            "content": self.content_expression,
            "filter": self.filter_expression,
            "key_columns": self.key_names,
        }


def read_recipe(connection: Connection, pipeline: str, version: int | None) -> VersionRecipe:
    """Return a version, the serving one if none is named; raise NotFound."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(_VERSION, (pipeline, version, version)).fetchone()
    if row is None and version is not None and exists(connection, pipeline):
        raise NotFound(
            f'pipeline "{pipeline}" has no version {version}',
            hint="SELECT pipeline, version FROM embedline.versions lists them.",
        )
    if row is None:
        raise NotFound(f'there is no pipeline "{pipeline}"', hint="embedline status lists the pipelines.")
    return VersionRecipe(**row)


def exists(connection: Connection, pipeline: str) -> bool:
    """Return True if there is a pipeline of that name."""
    found = connection.execute(_EXISTS, (pipeline,)).fetchone()
    return bool(found and found[0])


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return in words where two recipes differ."""
    names = [name for name in {**theirs, **ours} if name != "model name" and theirs.get(name) != ours.get(name)]
    return [f"{name}: {theirs.get(name)!r} in the file, {ours.get(name)!r} here" for name in names]
