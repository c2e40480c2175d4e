"""Building the vector index once the backfill is complete, and CONCURRENTLY, so that no application write waits for it."""

from __future__ import annotations

from typing import Any

from embedline.catalog import Pipeline, load_pipeline
from embedline.database import Session, entry_point, quote_ident, quote_literal

_INDEX_STATE = """
    SELECT i.indisvalid AS valid, EXISTS (
        SELECT FROM pg_stat_progress_create_index AS p WHERE p.relid = i.indrelid) AS building
    FROM pg_class AS c JOIN pg_index AS i ON i.indexrelid = c.oid
    WHERE c.oid = to_regclass($1)
"""


def index_name(pipeline: Pipeline) -> str:
    """Name of the serving version's vector index."""
    return f"{pipeline.name}_v{pipeline.version.number}_embedding_idx"


def create_index_statement(pipeline: Pipeline, vector_schema: str) -> str:
    """Return the CREATE INDEX CONCURRENTLY of the serving version."""
    version = pipeline.version
    options = ", ".join(f"{name} = {int(str(value))}" for name, value in sorted(version.index_options.items()))
    return (
        f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {quote_ident(index_name(pipeline))} ON {pipeline.vectors}"
        f" USING hnsw ({quote_ident(version.column)} {vector_schema}.{version.operator_class})"
        + (f" WITH ({options})" if options else "")
    )


def _job_name(pipeline: Pipeline) -> str:
    return f"embedline index {pipeline.name} v{pipeline.version.number}"


def maintain(session: Session, pipeline: Pipeline) -> None:
    """See to it that a complete version gets its index: through pg_cron, since CONCURRENTLY cannot run in a function."""
    from embedline.database import vector_schema

    version = pipeline.version
    if version.index_method == "none" or version.state != "complete":
        return
    qualified = f"embedline_data.{quote_ident(index_name(pipeline))}"
    rows = session.query(_INDEX_STATE, ["text"], qualified)
    state: dict[str, Any] = rows[0] if rows else {"valid": False, "building": False}
    has_cron = session.scalar("SELECT to_regclass('cron.job') IS NOT NULL")
    if state["valid"]:
        if has_cron:
            session.execute(
                "SELECT cron.unschedule(jobid) FROM cron.job WHERE database = current_database()"
                f" AND jobname = {quote_literal(_job_name(pipeline))}"
            )
        return
    if state["building"] or not has_cron:
        return
    if rows:
        # The leftover of a build that failed serves no query and slows every write.
        session.execute("SET LOCAL lock_timeout = '1s'")
        session.execute(f"DROP INDEX {qualified}")
    scheduled = session.query(
        "SELECT 1 FROM cron.job WHERE database = current_database() AND jobname = $1", ["text"], _job_name(pipeline)
    )
    if not scheduled:
        session.query(
            "SELECT cron.schedule($1, '* * * * *', $2)",
            ["text", "text"],
            _job_name(pipeline),
            create_index_statement(pipeline, vector_schema(session)),
        )


@entry_point
def index_statement(session: Session, name: str) -> str | None:
    """Return the statement that builds a pipeline's vector index; NULL where it has none or it is valid already."""
    from embedline.database import vector_schema

    pipeline = load_pipeline(session, name)
    if pipeline.version.index_method == "none":
        return None
    rows = session.query(_INDEX_STATE, ["text"], f"embedline_data.{quote_ident(index_name(pipeline))}")
    if rows and rows[0]["valid"]:
        return None
    return create_index_statement(pipeline, vector_schema(session))
