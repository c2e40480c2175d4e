"""Regenerate functions, triggers and views after an upgrade of Embedline."""

from __future__ import annotations

from embedline.catalog.derived import Derived, every_derived_of
from embedline.catalog.load import load_pipeline, load_versions
from embedline.catalog.values import Pipeline
from embedline.errors import DependentObjects
from embedline.pipelines.alter import has_readers, plan_in_use, replace_functions, restart_sweep
from embedline.pipelines.ddl import derived as derived_ddl
from embedline.pipelines.ddl.plan import CODE_VERSION
from embedline.pipelines.ddl.search_functions import create_search_functions
from embedline.pipelines.derived import (
    create_readers,
    has_version,
    plan_of,
    readers,
    rewrite_note_functions,
    show_statements,
)
from embedline.pipelines.functions import needs_row_triggers, rewrite_trigger_functions, use_row_triggers
from embedline.pipelines.replaced_views import refresh_views
from embedline.pipelines.views import write_serving_function
from embedline.postgres.entry import entry_point
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session

_OUTDATED = """
    SELECT p.name FROM embedline.pipeline AS p JOIN pg_class AS c ON c.oid = p.source
    WHERE p.code_version <> $1 AND NOT p.is_resting ORDER BY p.pipeline_id
"""
_REST = "UPDATE embedline.pipeline SET is_resting = true WHERE name = $1"

# Made before create_pipeline refused them: their owner decides what our casts of keys do.
_FOREIGN_KEY_TYPES = """
    SELECT p.name, t.oid::regtype::text AS type, r.rolname AS owner
    FROM embedline.pipeline AS p CROSS JOIN unnest(p.key_types) AS k (type) JOIN pg_type AS t ON t.oid = to_regtype(k.type)
    JOIN pg_roles AS r ON r.oid = t.typowner WHERE NOT r.rolsuper ORDER BY p.pipeline_id
"""


@entry_point
def regenerate_pipelines(session: Session) -> None:
    """Regenerate what another version of Embedline generated."""
    for row in session.query(_OUTDATED, ["integer"], CODE_VERSION):
        pipeline = load_pipeline(session, str(row["name"]))
        if not has_readers(session, pipeline):
            # They went with a column of the source; embedline.status says what to run.
            session.query(_REST, ["text"], pipeline.name)
            continue
        _regenerate(session, pipeline)
        for derived in every_derived_of(session, pipeline.name):
            _regenerate_derived(session, derived, pipeline)
    for row in session.query(_FOREIGN_KEY_TYPES):
        session.plpy.warning(
            f'the key of pipeline "{row["name"]}" has type {row["type"]} of role "{row["owner"]}", who is no superuser',
            detail="Keys are cast with Embedline's rights, and the owner of a type decides what its casts do.",
            hint=f"ALTER TYPE {row['type']} OWNER TO a superuser, or drop the pipeline; of a domain, create it again.",
        )


def _regenerate(session: Session, pipeline: Pipeline) -> None:
    plan, source = plan_in_use(session, pipeline)
    replace_functions(session, plan, source, [])
    rewrite_trigger_functions(session, plan)
    if needs_row_triggers(plan, source):
        use_row_triggers(session, plan)
        # What was written through the parent until now: the next sweep finds it.
        restart_sweep(session, pipeline)
    try:
        refresh_views(session, pipeline, plan, source)
    except DependentObjects as error:
        # A view as it was before serves as well; an upgrade must not fail because of what users built on it.
        session.plpy.notice(f'views of pipeline "{pipeline.name}" stay as they are: {error}', detail=error.detail or "")
    write_serving_function(session, plan, pipeline.version.number)
    for version in load_versions(session, pipeline.name):
        create_search_functions(session, version, plan, source)


def _regenerate_derived(session: Session, derived: Derived, pipeline: Pipeline) -> None:
    """Regenerate what belongs to derived vectors.

    Takes SHARE ROW EXCLUSIVE on the events and ACCESS EXCLUSIVE on the view, to the commit.
    """
    if session.scalar("SELECT to_regprocedure($1) IS NULL", ["text"], readers(derived)[0]):
        # They went with a column of the events; embedline.derived_status says so.
        return
    plan, schema = plan_of(session, derived), vector_schema(session)
    create_readers(session, plan)
    rewrite_note_functions(session, derived)
    statements = derived_ddl.trigger_statements(plan)
    for version in load_versions(session, derived.pipeline):
        if has_version(session, derived, version.version.number):
            statements += derived_ddl.item_trigger_statements(derived, version.chunk, version.vectors)
            statements.append(derived_ddl.vector_function_statement(plan, version.version.number, f"{schema}.vector"))
    for statement in (*statements, *show_statements(session, derived, pipeline)):
        session.execute(statement)
