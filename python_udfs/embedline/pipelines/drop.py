"""Drop a pipeline with everything that was generated for it."""

from __future__ import annotations

from embedline.catalog.load import load_pipeline, load_versions
from embedline.catalog.rights import require_control
from embedline.core import names
from embedline.indexes.cron_jobs import forget_index_jobs
from embedline.pipelines import derived, published
from embedline.pipelines.ddl.plan import FUNCTIONS, TABLES, TRIGGER_FUNCTIONS
from embedline.pipelines.ddl.search_functions import drop_search_functions
from embedline.pipelines.functions import generated_functions
from embedline.pipelines.keyword_index import table_suffixes
from embedline.pipelines.plan import chunk_set_numbers
from embedline.pipelines.replaced_views import require_droppable
from embedline.postgres.entry import entry_point
from embedline.postgres.locks import bound_lock_wait
from embedline.postgres.session import Session


@entry_point
def drop_pipeline(session: Session, name: str) -> None:
    """Remove a pipeline with all that was generated for it.

    The source stays as it is.
    """
    require_control(session, name)
    bound_lock_wait(session)
    forget_index_jobs(session, name)
    derived.remove_all(session, name)
    published.remove(session, name)
    for row in session.query(
        """
        SELECT format('%I', t.tgname) AS trigger, t.tgrelid::regclass::text AS source FROM pg_trigger AS t
        JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE p.pronamespace = 'embedline_data'::regnamespace AND t.tgparentid = 0
            AND p.proname = ANY ($1)
        """,
        ["text[]"], [names.generated(name, suffix) for suffix in TRIGGER_FUNCTIONS],
    ):  # fmt: skip
        session.execute(f"DROP TRIGGER {row['trigger']} ON {row['source']}")
    pipeline = load_pipeline(session, name)
    versions = load_versions(session, name)
    for oid in (pipeline.view_oid, *(version.version.view_oid for version in versions)):
        view = session.scalar("SELECT oid::regclass::text FROM pg_class WHERE oid = $1::oid", ["bigint"], oid)
        if view is not None:
            require_droppable(session, view, oid)
            session.execute(f"DROP VIEW {view}")
    for row in generated_functions(session, name, (*FUNCTIONS, *TRIGGER_FUNCTIONS, "serving")):
        session.execute(f"DROP FUNCTION IF EXISTS {row['signature']}")
    for version in versions:
        drop_search_functions(session, version)
        session.execute(f"DROP TABLE IF EXISTS {version.vectors}")
    tables = [
        *(pipeline.generated(suffix) for suffix in TABLES),
        *pipeline.chunk_tables,
        *(pipeline.generated(suffix) for suffix in table_suffixes(chunk_set_numbers(pipeline))),
    ]
    session.execute(f"DROP TABLE IF EXISTS {', '.join(tables)}")
    # No foreign key leads there, because it would lock the pipeline's row with each search.
    session.query("DELETE FROM embedline.query_sample WHERE pipeline_id = $1", ["bigint"], pipeline.pipeline_id)
    session.query("DELETE FROM embedline.pipeline WHERE name = $1", ["text"], name)
