"""Following a source: the names and types of its columns, its owner and its parent may change under a pipeline.

The event trigger embedline_follow_source calls this where what is stored of a source is no longer what is;
refresh_pipeline does it by hand, and brings the views up to date.
"""

from __future__ import annotations

import re

from embedline import capture, routing
from embedline.alteration import plan_in_use, replace_functions, restart_sweep
from embedline.capture import CapturePlan
from embedline.catalog import Pipeline, chunk_table_suffix, load_versions
from embedline.database import Session, entry_point, quote_ident
from embedline.pipelines import (
    BEFORE_UPDATE,
    bound_lock_wait,
    chunk_set_numbers,
    current_plan,
    grant_tables,
    load_alone,
    needs_row_triggers,
    require_control,
    rewrite_trigger_functions,
    use_row_triggers,
)
from embedline.search_functions import create_search_functions, revoke_search_functions
from embedline.source import Source

# Who owns the functions; where REASSIGN OWNED gave them to the source's owner, this lacks the rights that they need.
_OWNER = """
    SELECT pg_get_userbyid(f.proowner) AS name, has_table_privilege(
        f.proowner, (SELECT oid FROM pg_class WHERE relnamespace = f.pronamespace AND relname = $1 || '_document'), 'SELECT'
    ) AS reads
    FROM pg_proc AS f WHERE f.pronamespace = 'embedline_data'::regnamespace AND f.proname = $1 || '_read'
"""
_OWNED_VIEWS = """
    SELECT c.oid::regclass::text AS name FROM pg_class AS c
    WHERE c.relowner = $2::regrole AND c.oid IN (
        SELECT routing_view FROM embedline.pipeline WHERE pipeline_id = $1
        UNION ALL SELECT view FROM embedline.version WHERE pipeline_id = $1)
"""


@entry_point
def refresh_pipeline(session: Session, name: str) -> None:
    """Add new source columns to the routing view, and watch every update where a BEFORE trigger now exists."""
    require_control(session, name)
    bound_lock_wait(session)
    pipeline = load_alone(session, name)
    plan, source = _follow(session, pipeline)
    routing.refresh_views(session, pipeline, plan, source)
    routing.write_serving_function(session, plan, pipeline.version.number)
    _write_search_functions(session, pipeline, plan, source)
    _refresh_update_trigger(session, plan, source)
    # Rows that an attached partition brought along, or that triggers could not see: the next sweep finds them.
    restart_sweep(session, pipeline)


@entry_point
def follow_source(session: Session, name: str) -> None:
    """Follow a change of the source; called by the event trigger."""
    _follow(session, load_alone(session, name))


def _follow(session: Session, pipeline: Pipeline) -> tuple[CapturePlan, Source]:
    plan, source = current_plan(session, pipeline)
    rewrite_trigger_functions(session, plan)
    for before in session.query(_OWNER, ["text"], pipeline.name):
        if before["name"] != source.owner or not before["reads"]:
            _give_to_owner(session, pipeline, str(before["name"]))
    if needs_row_triggers(plan, source):
        use_row_triggers(session, plan_in_use(session, pipeline)[0])
    return plan, source


def _give_to_owner(session: Session, pipeline: Pipeline, before: str) -> None:
    """Give the source's owner of now what the one before had: the functions that read it, the views, and what these read."""
    plan, source = plan_in_use(session, pipeline)
    replace_functions(session, plan, source, [])
    suffixes = ["hidden", *(chunk_table_suffix(number) for number in chunk_set_numbers(pipeline))]
    suffixes += [f"v{number}" for _, number, _ in pipeline.versions]
    grant_tables(session, plan, source, suffixes)
    _write_search_functions(session, pipeline, plan, source)
    if before == source.owner:
        return
    tables = ", ".join(plan.generated(suffix) for suffix in dict.fromkeys([*suffixes, *capture.TABLES]))
    session.execute(f"REVOKE ALL ON {tables} FROM {quote_ident(before)}")
    for version in load_versions(session, pipeline.name):
        revoke_search_functions(session, version, before)
    for view in session.query(_OWNED_VIEWS, ["bigint", "text"], pipeline.pipeline_id, quote_ident(before)):
        session.execute(f"ALTER VIEW {view['name']} OWNER TO {quote_ident(source.owner)}")


def _write_search_functions(session: Session, pipeline: Pipeline, plan: CapturePlan, source: Source) -> None:
    for version in load_versions(session, pipeline.name):
        create_search_functions(session, version, plan, source)


def _refresh_update_trigger(session: Session, plan: CapturePlan, source: Source) -> None:
    if not session.scalar(BEFORE_UPDATE, ["bigint"], source.oid):
        return
    name = capture.trigger_name(plan.name, "update")
    rows = session.query(
        "SELECT pg_get_triggerdef(oid) AS definition, tgenabled = 'A' AS always FROM pg_trigger"
        " WHERE tgrelid = $1::oid AND tgname = $2 AND tgattr <> ''",
        ["bigint", "name"], source.oid, name,
    )  # fmt: skip
    if not rows:
        return
    session.execute(f"DROP TRIGGER {quote_ident(name)} ON {source.qualified}")
    session.execute(re.sub(r"AFTER UPDATE OF .*? ON ", "AFTER UPDATE ON ", str(rows[0]["definition"]), count=1))
    if rows[0]["always"]:
        session.execute(f"ALTER TABLE {source.qualified} ENABLE ALWAYS TRIGGER {quote_ident(name)}")
