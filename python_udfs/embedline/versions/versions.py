"""Versions of a pipeline: adding one (expand), filling it, taking one away (contract).

From `add_embedding_version` to `drop_embedding_version` a version is written with every change, whether it serves or not:
the transaction that writes a chunk queues it for all versions of its chunk set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embedline.catalog.load import Model, Pipeline, chunk_table_suffix, load_model, load_version, load_versions
from embedline.catalog.rights import require_control
from embedline.catalog.settings import load_settings
from embedline.catalog.source import Source
from embedline.chunking import ChunkingSpec
from embedline.errors import AlreadyExists, InvalidParameter, NotReady
from embedline.indexes.cron_jobs import forget_index_jobs
from embedline.pipelines.alter import restart_ranges
from embedline.pipelines.ddl import capture
from embedline.pipelines.ddl.capture import CapturePlan
from embedline.pipelines.ddl.search_functions import create_search_functions, drop_search_functions
from embedline.pipelines.pipelines import (
    INDEX_DIMENSIONS,
    check_recipe,
    create_version_table,
    current_plan,
    grant_tables,
    insert_chunk_set,
    insert_version,
    load_alone,
    recipe_stamp,
    rewrite_trigger_functions,
    spec_for,
    version_fingerprint,
)
from embedline.pipelines.views import create_version_view, require_no_dependents
from embedline.postgres.session import Session, as_mapping, entry_point, retry_locked
from embedline.queue import chunk_queue, coverage

# A model with another tokenizer may count more tokens in a chunk than the one it was cut by: so much room must be left.
_TOKENIZER_MARGIN = 2
_BACKFILL_ORDERS = ("oldest_first", "newest_first")
_RECIPE = ("column_type", "distance", "index_method", "index_options")
_CHUNKING = ("chunking", "chunk_tokens", "chunk_overlap", "chunking_options")

_SAME_TOKENIZER = """
    SELECT s.tokenizer IS NOT DISTINCT FROM m.tokenizer
    FROM embedline.chunk_set AS s, embedline.model AS m WHERE s.chunk_set_id = $1 AND m.model_id = $2
"""
# When the version that serves took over from that one by a cutover, if it did: that is what a rollback goes back to.
_TOOK_OVER = """
    SELECT c.performed_at + w.length AS kept_until, c.performed_at + w.length > now() AS is_kept
    FROM embedline.cutover AS c
    CROSS JOIN (SELECT coalesce($3::interval, make_interval(secs => $4 * 3600)) AS length) AS w
    WHERE c.to_version_id = $1 AND c.from_version_id = $2 AND c.kind = 'cutover' ORDER BY c.cutover_id DESC LIMIT 1
"""
# A model that gave way by a cutover; one that was tried, or cut over to and rolled back from, stays for the next try.
_FORGET_MODEL = """
    DELETE FROM embedline.model AS m
    WHERE m.model_id = $1 AND NOT EXISTS (SELECT FROM embedline.version AS v WHERE v.model_id = m.model_id)
        AND (SELECT c.kind FROM embedline.cutover AS c WHERE $2 IN (c.from_version_id, c.to_version_id)
            ORDER BY c.cutover_id DESC LIMIT 1) = 'cutover'
    RETURNING m.name
"""
_QUARANTINED = "DELETE FROM embedline.version_dead_letter WHERE version_id = $1 RETURNING chunk_id"


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
        for statement in capture.chunk_set_statements(plan, set_number):
            session.execute(statement)
        insert_chunk_set(session, pipeline.pipeline_id, set_number, spec, model)
        rewrite_trigger_functions(session, plan)
    retry_locked(
        session,
        lambda: create_version_table(session, plan, number, set_number, recipe["column_type"], model.config.dimensions),
        "the chunk table",
    )
    version_id = insert_version(session, pipeline.pipeline_id, number, set_number, model, recipe, fingerprint)
    _store_backfill(session, version_id, given["backfill_order"], given["backfill_rate"])
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


def check_backfill(order: str | None, rate: int | None) -> None:
    """Raise unless the values can be a backfill's order and rate."""
    if order not in _BACKFILL_ORDERS:
        raise InvalidParameter(
            f'backfill_order "{order}" is not known', hint=f"Use one of {', '.join(_BACKFILL_ORDERS)}."
        )
    if rate is not None and rate < 1:
        raise InvalidParameter(
            f"backfill_rate must be at least 1 chunk a second, not {rate}", hint="NULL sets no limit."
        )


def _store_backfill(session: Session, version_id: int, order: str, rate: int | None) -> None:
    session.query(
        "UPDATE embedline.version SET backfill_order = $2, backfill_rate = $3, backfill_due_at = clock_timestamp()"
        " WHERE version_id = $1",
        ["bigint", "text", "integer"], version_id, order, rate,
    )  # fmt: skip


@entry_point
def configure_backfill(session: Session, name: str, number: int, order: str | None, rate: int | None) -> None:
    """Set in which order and how fast a version is filled, from the next claim on; without an order it stays."""
    require_control(session, name)
    version = load_version(session, name, number).version
    wanted = order or version.backfill_order
    check_backfill(wanted, rate)
    _store_backfill(session, version.version_id, wanted, rate)


@entry_point
def accept_dead_letters(session: Session, name: str, number: int) -> int:
    """Let a version go without the chunks that it could not embed; return how many are accepted now.

    Refused where nothing else is embedded: such a version is not one with a few gaps.
    """
    require_control(session, name)
    pipeline = load_version(session, name, number)
    if session.scalar(f"SELECT 1 FROM {pipeline.vectors} LIMIT 1") is None:
        raise NotReady(
            f'version {number} of pipeline "{name}" has no vector at all',
            hint=f"SELECT error_code, message, count(*) FROM embedline.version_dead_letter WHERE version_id ="
            f" {pipeline.version.version_id} GROUP BY 1, 2; shows why.",
        )
    return len(
        session.query(
            "UPDATE embedline.version_dead_letter SET accepted_by = session_user"
            " WHERE version_id = $1 AND accepted_by IS NULL RETURNING 1",
            ["bigint"],
            pipeline.version.version_id,
        )
    )


@entry_point
def requeue_version(session: Session, name: str, number: int) -> int:
    """Queue the chunks that a version could not embed, with their tries counted anew; return how many."""
    require_control(session, name)
    pipeline = load_version(session, name, number)
    rows = session.query(_QUARANTINED, ["bigint"], pipeline.version.version_id)
    chunk_queue.enqueue_lists(session, pipeline, [int(row["chunk_id"]) for row in rows])
    return len(rows)


@entry_point
def drop_embedding_version(session: Session, name: str, number: int, window: str | None) -> None:
    """Take a version away with its table, view, queue and evaluations, and its chunks and model where nothing uses them."""
    require_control(session, name)
    pipeline = load_alone(session, name)
    doomed = load_version(session, name, number)
    _require_disposable(session, pipeline, doomed, window)
    require_no_dependents(session, doomed.version.view_oid)
    plan, source = current_plan(session, pipeline)
    chunk_set = doomed.chunk_set.number
    is_last = not doomed.other_versions(chunk_set)
    retry_locked(
        session, lambda: _drop_tables(session, doomed, plan, source, is_last), "a table or view of the version"
    )
    forget_index_jobs(session, name, number)
    session.query("DELETE FROM embedline.version WHERE version_id = $1", ["bigint"], doomed.version.version_id)
    if is_last:
        session.query(
            "DELETE FROM embedline.chunk_set WHERE chunk_set_id = $1", ["bigint"], doomed.chunk_set.chunk_set_id
        )
    session.query(
        "UPDATE embedline.pipeline SET generation = generation + 1 WHERE pipeline_id = $1",
        ["bigint"], pipeline.pipeline_id,
    )  # fmt: skip
    forgotten = session.scalar(
        _FORGET_MODEL,
        ["bigint", "bigint"], doomed.version.model.model_id, doomed.version.version_id,
    )  # fmt: skip
    if forgotten is not None:
        session.plpy.notice(f'model "{forgotten}" is forgotten: no pipeline uses it')


def _require_disposable(session: Session, pipeline: Pipeline, doomed: Pipeline, window: str | None) -> None:
    name, number = pipeline.name, doomed.version.number
    if number == pipeline.version.number:
        raise NotReady(
            f'version {number} of pipeline "{name}" serves',
            hint="Cut over to another version first; SELECT version, gate FROM embedline.versions"
            f" WHERE pipeline = '{name}'; lists them.",
        )
    rows = session.query(
        _TOOK_OVER,
        ["bigint", "bigint", "text", "double precision"],
        pipeline.version.version_id, doomed.version.version_id, window, load_settings(session).rollback_window_hours,
    )  # fmt: skip
    if rows and rows[0]["is_kept"] and not coverage.is_empty(session, pipeline):
        raise NotReady(
            f'version {number} of pipeline "{name}" is what a rollback goes back to until {rows[0]["kept_until"]}',
            hint=f"SELECT embedline.drop_embedding_version('{name}', {number}, rollback_window => '0') gives that up.",
        )


def _drop_tables(session: Session, doomed: Pipeline, plan: CapturePlan, source: Source, is_last: bool) -> None:
    view = session.scalar(
        "SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], doomed.version.view_oid
    )
    if is_last:
        # No write of an application may be under way in a trigger function that still names the chunks.
        session.execute(f"LOCK TABLE {source.qualified} IN SHARE ROW EXCLUSIVE MODE")
    if view is not None:
        session.execute(f"DROP VIEW {view}")
    if is_last:
        kept = tuple(number for number in plan.chunk_sets if number != doomed.chunk_set.number)
        rewrite_trigger_functions(session, replace(plan, chunk_sets=kept))
    drop_search_functions(session, doomed)
    session.execute(f"DROP TABLE IF EXISTS {doomed.vectors}")
    if is_last:
        session.execute(f"DROP TABLE IF EXISTS {doomed.chunk}")
