"""Drop a version that no longer serves."""

from __future__ import annotations

from dataclasses import replace

from embedline.catalog.load import load_version
from embedline.catalog.rights import require_control
from embedline.catalog.settings import load_settings
from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.errors import NotReady
from embedline.indexes.cron_jobs import forget_index_jobs
from embedline.pipelines import derived, published
from embedline.pipelines.ddl.plan import CapturePlan
from embedline.pipelines.ddl.search_functions import drop_search_functions
from embedline.pipelines.functions import rewrite_trigger_functions
from embedline.pipelines.keyword_index import drop_tables
from embedline.pipelines.plan import current_plan
from embedline.pipelines.replaced_views import require_no_dependents
from embedline.pipelines.state import load_alone
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import retry_locked
from embedline.postgres.session import Session
from embedline.queue import coverage

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


@entry_point
def drop_embedding_version(session: Session, name: str, number: int, window: str | None) -> None:
    """Drop a version with its table, view, queue and evaluations.

    Its chunks and its model go too if nothing uses them.
    """
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
    published.write_routing(session, pipeline)
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
    derived.remove_version(session, doomed)
    drop_search_functions(session, doomed)
    session.execute(f"DROP TABLE IF EXISTS {doomed.vectors}")
    if is_last:
        session.execute(f"DROP TABLE IF EXISTS {doomed.chunk}")
        drop_tables(session, doomed, [doomed.chunk_set.number])
