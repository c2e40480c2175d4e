"""Read the catalogue: models, pipelines and versions as values."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from embedline.catalog.source import HIDDEN
from embedline.catalog.values import ChunkSet, Model, Pipeline, Reach, Version
from embedline.chunking import ChunkingSpec
from embedline.core.embedding import ModelConfig
from embedline.core.json_values import as_list, as_mapping
from embedline.core.media import Modality
from embedline.errors import InvalidParameter, NotFound
from embedline.postgres.session import Session

# Read with each model, so that an address that is taken off the list is asked no more.
_ALLOWED = """
    ARRAY(SELECT e.scheme || '://' || e.host || ':' || CASE e.port WHEN 0 THEN '*' ELSE e.port::text END
          FROM embedline.allowed_endpoint AS e ORDER BY e.scheme, e.host, e.port)
"""
_MODEL_COLUMNS = f"""
    m.model_id, m.name AS model_name, m.provider, m.model, m.revision, m.dimensions AS model_dimensions, m.max_tokens,
    m.base_url, m.api_key_env, m.document_prefix, m.query_prefix, m.max_batch_items,
    m.max_batch_tokens, m.concurrency, m.timeout_seconds, m.options, m.learned, m.fingerprint AS model_fingerprint,
    m.probed_fingerprint, m.task, m.batch_items, m.batch_items_refused, m.text_size_refused, m.modalities,
    {_ALLOWED} AS allowed_endpoints
"""
_CHUNK_SET_COLUMNS = """
    s.number AS chunk_set, s.chunk_set_id, s.chunking, s.chunk_tokens, s.chunk_overlap, s.chunking_options
"""
# One row for each version of each pipeline; `others` are the versions beside it, `sets` the other ways of chunking.
_VERSION_COLUMNS = f"""
    p.pipeline_id, p.name, p.source::oid::bigint AS source_oid, p.key_columns, p.key_types, p.view_columns,
           p.routing_view::oid::bigint AS view_oid, p.state, p.generation, p.recipe, p.altered_at::text AS altered_at,
           {_CHUNK_SET_COLUMNS},
           p.document_prefix_expression, p.tenant_expression, p.weight, p.query_sample_share, p.keyword,
           p.modality, p.is_reference,
           v.fingerprint AS version_fingerprint,
           v.vectors_valid_from::text AS vectors_valid_from, v.version_id = p.serving_version_id AS is_serving,
           v.view::oid::bigint AS version_view_oid, v.search_precision, v.backfill_order, v.backfill_rate,
           v.version_id, v.number, v.search_mode, v.dimensions, v.column_type, v.distance, v.index_method, v.index_options,
           v.state AS version_state, {_MODEL_COLUMNS},
           -- An aggregate, because an EXISTS may be planned as a hash of all indexes, whose states would all be asked for.
           (SELECT coalesce(bool_or(embedline._index_state(x.relname) = 'valid'), false)
            FROM pg_class AS t JOIN pg_index AS i ON i.indrelid = t.oid JOIN pg_class AS x ON x.oid = i.indexrelid
            WHERE t.relname = p.name || '_v' || v.number AND t.relnamespace = 'embedline_data'::regnamespace
                AND NOT i.indisprimary) AS has_index,
           r.version_id IS NOT NULL AS is_checked, r.checked_to, r.far_distance, r.index_node::bigint AS index_node,
           CASE v.index_method WHEN 'ivfflat' THEN r.probes ELSE r.ef_search END AS effort,
           CASE v.index_method WHEN 'ivfflat' THEN r.wide_probes ELSE r.wide_ef_search END AS wide_effort,
           (SELECT jsonb_agg(jsonb_build_array(o.version_id, o.number, o.chunk_set) ORDER BY o.number)
            FROM embedline.version AS o WHERE o.pipeline_id = p.pipeline_id) AS versions,
           (SELECT jsonb_agg(to_jsonb(t) - 'tokenizer' ORDER BY t.number) FROM embedline.chunk_set AS t
            WHERE t.pipeline_id = p.pipeline_id AND t.number <> v.chunk_set) AS other_sets
"""
_VERSION_TABLES = """
    FROM embedline.pipeline AS p
    JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id
    JOIN embedline.chunk_set AS s ON s.pipeline_id = p.pipeline_id AND s.number = v.chunk_set
    JOIN embedline.model AS m ON m.model_id = v.model_id
    LEFT JOIN embedline.index_reach AS r ON r.version_id = v.version_id
"""
_VERSION_SQL = f"SELECT {_VERSION_COLUMNS} {_VERSION_TABLES}"
_PIPELINE_SQL = f"{_VERSION_SQL} WHERE v.version_id = p.serving_version_id"
PIPELINE_BY_NAME = f"{_PIPELINE_SQL} AND p.name = $1"
_VERSIONS_BY_NAME = f"{_VERSION_SQL} WHERE p.name = $1 ORDER BY v.number"
# Only workers ask whether requests are counted, because readers, who search, may not read budgets.
_METERED = f"""
    (m.provider <> 'sentence-transformers' OR m.price_per_million_tokens IS NOT NULL
        OR EXISTS (SELECT FROM embedline.spending_cap AS s WHERE s.pipeline_id = p.pipeline_id OR s.model_id = m.model_id)
        OR EXISTS (SELECT FROM embedline.rate_limit AS l WHERE l.model_id = m.model_id)) AS metered,
    v.last_error AS version_error,
    (SELECT h.last_error FROM embedline.pipeline_health AS h WHERE h.pipeline_id = p.pipeline_id) AS last_error,
    EXISTS (SELECT FROM pg_class AS c WHERE c.oid = p.source AND {HIDDEN}) AS is_hidden,
    EXISTS (SELECT FROM embedline.remote_grant AS g WHERE g.pipeline_id = p.pipeline_id AND g.is_exclusive) AS is_remote,
    EXISTS (SELECT FROM embedline.bulk_rule AS r WHERE r.pipeline_id = p.pipeline_id) AS has_bulk_rule
"""
# Versions as workers see them. A source that was dropped takes its functions along; its pipeline must not stop the others.
_WORK_SQL = f"""
    SELECT {_METERED}, {_VERSION_COLUMNS} {_VERSION_TABLES}
    WHERE p.state = 'active' AND NOT p.is_resting AND ($1 IS NULL OR p.name = $1)
        AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = p.source)
"""
_ACTIVE_SQL = f"{_WORK_SQL} AND v.version_id = p.serving_version_id"
ACTIVE_PIPELINES = f"{_ACTIVE_SQL} ORDER BY p.pipeline_id"
_PIPELINES_BY_ID = f"{_ACTIVE_SQL} AND p.pipeline_id = ANY ($2) ORDER BY p.pipeline_id"
# Versions that are filled from the chunks: all but the serving one, and that one while it still lags after its cutover.
_FILLING_SQL = f"""
    {_WORK_SQL} AND (v.version_id <> p.serving_version_id
        OR EXISTS (SELECT FROM embedline.version_queue AS q WHERE q.version_id = v.version_id))
"""
_FILLS = f"{_FILLING_SQL} ORDER BY v.version_id"
_FILLS_BY_ID = f"{_FILLING_SQL} AND v.version_id = ANY ($2) ORDER BY v.version_id"


def load_pipeline(session: Session, name: str) -> Pipeline:
    """Return the pipeline of that name or raise NotFound."""
    rows = session.query(PIPELINE_BY_NAME, ["text"], name)
    if not rows:
        raise NotFound(
            f'there is no pipeline "{name}"',
            hint="SELECT pipeline FROM embedline.status lists the pipelines.",
        )
    return pipeline_from_row(rows[0])


def load_active_pipelines(session: Session, name: str | None) -> list[Pipeline]:
    """Return the pipelines that workers serve now, or the one named."""
    if name is not None:
        load_pipeline(session, name)
    return [pipeline_from_row(row) for row in session.query(ACTIVE_PIPELINES, ["text"], name)]


def load_pipelines_by_id(session: Session, ids: Collection[int]) -> list[Pipeline]:
    """Return the pipelines with these ids that workers serve now."""
    rows = session.query(_PIPELINES_BY_ID, ["text", "bigint[]"], None, list(ids)) if ids else []
    return [pipeline_from_row(row) for row in rows]


def load_fills(session: Session, name: str | None) -> list[Pipeline]:
    """Return a pipeline for each version that is filled from the chunks.

    `name` limits them to one pipeline.
    """
    return [_fill_from_row(row) for row in session.query(_FILLS, ["text"], name)]


def load_fills_by_id(session: Session, version_ids: Collection[int]) -> list[Pipeline]:
    """Return the pipelines of those of these versions that are being filled."""
    rows = session.query(_FILLS_BY_ID, ["text", "bigint[]"], None, list(version_ids)) if version_ids else []
    return [_fill_from_row(row) for row in rows]


def _fill_from_row(row: dict[str, object]) -> Pipeline:
    return pipeline_from_row({**row, "last_error": row["version_error"]})


def load_versions(session: Session, name: str) -> list[Pipeline]:
    """Return the pipeline of that name once for each of its versions, by number.

    Raises NotFound if there is no such pipeline.
    """
    found = [pipeline_from_row(row) for row in session.query(_VERSIONS_BY_NAME, ["text"], name)]
    return found or [load_pipeline(session, name)]


def load_version(session: Session, name: str, number: int) -> Pipeline:
    """Return the pipeline of that name with one of its versions, or raise NotFound."""
    found = {pipeline.version.number: pipeline for pipeline in load_versions(session, name)}
    if number not in found:
        raise NotFound(
            f'pipeline "{name}" has no version {number}',
            detail=f"Versions: {', '.join(map(str, found))}.",
            hint=f"SELECT * FROM embedline.versions WHERE pipeline = '{name}'; lists them.",
        )
    return found[number]


def load_all_pipelines(session: Session) -> list[Pipeline]:
    """Return all pipelines, in any state."""
    return [pipeline_from_row(row) for row in session.query(_PIPELINE_SQL)]


def load_models(session: Session) -> list[Model]:
    """Return all models."""
    return [_model_from_row(row) for row in session.query(f"SELECT {_MODEL_COLUMNS} FROM embedline.model AS m")]


def load_model(session: Session, name: str) -> Model:
    """Return the model of that name or raise NotFound."""
    rows = session.query(f"SELECT {_MODEL_COLUMNS} FROM embedline.model AS m WHERE m.name = $1", ["text"], name)
    if not rows:
        raise NotFound(
            f'there is no model "{name}"',
            hint="SELECT name FROM embedline.model lists the models; embedline.create_model adds one.",
        )
    return _model_from_row(rows[0])


def load_allowed_endpoints(session: Session) -> tuple[str, ...]:
    """Return the addresses at which models may be asked, as scheme://host:port."""
    return _texts(session.scalar(f"SELECT {_ALLOWED}"))


def load_embedding_model(session: Session, name: str) -> Model:
    """Return the model of that name, which makes vectors.

    Raises NotFound, or InvalidParameter for a reranker.
    """
    model = load_model(session, name)
    if model.config.task != "embed":
        raise InvalidParameter(
            f'model "{name}" is a reranker and makes no vectors',
            hint="SELECT name FROM embedline.model WHERE task = 'embed'; lists the models of pipelines.",
        )
    return model


def load_reranker(session: Session, name: str) -> Model:
    """Return the reranker of that name.

    Raises NotFound, or InvalidParameter for a model that makes vectors.
    """
    model = load_model(session, name)
    if model.config.task != "rerank":
        raise InvalidParameter(
            f'model "{name}" makes vectors and is no reranker',
            hint="SELECT name FROM embedline.model WHERE task = 'rerank'; lists the rerankers;"
            " embedline.create_model(…, task => 'rerank') adds one.",
        )
    return model


def pipeline_from_row(row: dict[str, object]) -> Pipeline:
    """Return the pipeline of a row of the catalogue query."""
    values = dict(row)
    version = Version(
        version_id=int(str(values["version_id"])),
        number=int(str(values["number"])),
        dimensions=int(str(values["dimensions"])),
        column_type=str(values["column_type"]),
        distance=str(values["distance"]),
        index_method=str(values["index_method"]),
        state=str(values["version_state"]),
        model=_model_from_row(values),
        fingerprint=str(values["version_fingerprint"]),
        vectors_valid_from=_optional(values["vectors_valid_from"]),
        index_options=dict(as_mapping(values["index_options"])),
        view_oid=_number(values["version_view_oid"]),
        search_precision=_optional(values["search_precision"]),
        backfill_order=str(values["backfill_order"]),
        backfill_rate=_number(values["backfill_rate"]),
        has_index=bool(values["has_index"]),
        reach=_reach_from_row(values),
        search_mode=str(values["search_mode"]),
    )
    return Pipeline(
        pipeline_id=int(str(values["pipeline_id"])),
        name=str(values["name"]),
        source_oid=int(str(values["source_oid"])),
        view_oid=_number(values["view_oid"]),
        key_columns=_texts(values["key_columns"]),
        key_types=_texts(values["key_types"]),
        view_columns={str(k): str(v) for k, v in as_mapping(values["view_columns"]).items()},
        chunk_set=_chunk_set_from_row({**values, "number": values["chunk_set"]}),
        other_sets=tuple(map(_chunk_set_from_row, as_list(values["other_sets"]))),
        document_prefix=_optional(values["document_prefix_expression"]),
        tenant=_optional(values["tenant_expression"]),
        weight=float(str(values["weight"])),
        query_sample_share=float(str(values["query_sample_share"])),
        keyword=_optional(values["keyword"]),
        modality=cast("Modality", values["modality"]),
        is_reference=bool(values["is_reference"]),
        metered=bool(values.get("metered")),
        state=str(values["state"]),
        generation=int(str(values["generation"])),
        recipe=int(str(values["recipe"])),
        altered_at=_optional(values["altered_at"]),
        version=version,
        versions=tuple((int(i), int(n), int(s)) for i, n, s in as_list(values["versions"])),
        is_serving=bool(values["is_serving"]),
        last_error=_optional(values.get("last_error")),
        is_hidden=bool(values.get("is_hidden")),
        is_remote=bool(values.get("is_remote")),
        has_bulk_rule=bool(values.get("has_bulk_rule")),
    )


def _reach_from_row(row: dict[str, object]) -> Reach | None:
    if not row["is_checked"]:
        return None
    far = row["far_distance"]
    return Reach(
        checked_to=int(str(row["checked_to"])),
        effort=_number(row["effort"]),
        wide_effort=_number(row["wide_effort"]),
        far_distance=None if far is None else float(str(far)),
        index_node=_number(row["index_node"]),
    )


def _chunk_set_from_row(row: dict[str, object]) -> ChunkSet:
    options = as_mapping(row["chunking_options"])
    spec = ChunkingSpec(
        method=str(row["chunking"]),
        tokens=_number(row["chunk_tokens"]),
        overlap=int(str(row["chunk_overlap"])),
        options=tuple(sorted((name, float(value)) for name, value in options.items())),
    )
    return ChunkSet(int(str(row["chunk_set_id"])), int(str(row["number"])), spec)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def _number(value: object) -> int | None:
    return None if value is None else int(str(value))


def _optional(value: object) -> str | None:
    return None if value is None else str(value)


def _model_from_row(row: dict[str, object]) -> Model:
    config = ModelConfig(
        name=str(row["model_name"]),
        provider=str(row["provider"]),
        model=str(row["model"]),
        dimensions=_number(row["model_dimensions"]),
        revision=_optional(row["revision"]),
        base_url=_optional(row["base_url"]),
        api_key_env=_optional(row["api_key_env"]),
        document_prefix=str(row["document_prefix"]),
        query_prefix=str(row["query_prefix"]),
        max_batch_items=int(str(row["max_batch_items"])),
        max_batch_tokens=int(str(row["max_batch_tokens"])),
        concurrency=int(str(row["concurrency"])),
        timeout_seconds=float(str(row["timeout_seconds"])),
        options=as_mapping(row["options"]),
        learned=as_mapping(row["learned"]),
        task="rerank" if row["task"] == "rerank" else "embed",
        allowed_endpoints=_texts(row["allowed_endpoints"]),
    )
    max_tokens = row["max_tokens"]
    return Model(
        model_id=int(str(row["model_id"])),
        config=config,
        max_tokens=None if max_tokens is None else int(str(max_tokens)),
        fingerprint=str(row["model_fingerprint"]),
        probed_fingerprint=_optional(row["probed_fingerprint"]),
        batch_items=_number(row["batch_items"]),
        batch_items_refused=_number(row["batch_items_refused"]),
        text_size_refused=_number(row["text_size_refused"]),
        modalities=_texts(row["modalities"]),
    )
