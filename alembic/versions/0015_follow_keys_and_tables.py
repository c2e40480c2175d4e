"""Note what a pipeline's source is called, and whether the pipeline rests because its source has lost its key.

What: embedline.pipeline gets source_name, filled from the sources, and is_resting. Lock: ACCESS EXCLUSIVE on
embedline.pipeline for an instant (columns with a constant default are no rewrite); the replay that follows writes the
functions of existing pipelines again. How long: under a second. Undo: `alembic downgrade 0014`.

Revision ID: 0015
Revises: 0014
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

UPGRADE = (
    "ALTER TABLE embedline.pipeline ADD COLUMN source_name text, ADD COLUMN is_resting boolean NOT NULL DEFAULT false",
    "COMMENT ON COLUMN embedline.pipeline.source_name IS "
    "'Schema and table as create_pipeline, move_pipeline or refresh_pipeline found it: another table of that name has taken its place'",
    "COMMENT ON COLUMN embedline.pipeline.is_resting IS "
    "'Workers leave it alone: its key has lost a column; refresh_pipeline follows the key that the source has'",
    """
    UPDATE embedline.pipeline AS p SET source_name = format('%I.%I', n.nspname, c.relname)
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = p.source
    """,
)

DOWNGRADE = (
    "DROP VIEW IF EXISTS embedline.status, embedline.versions",
    "DROP FUNCTION IF EXISTS embedline._source_trouble(bigint)",
    "DROP FUNCTION IF EXISTS embedline._index_state(text)",
    "DROP FUNCTION IF EXISTS embedline.move_pipeline(text, regclass)",
    "DROP FUNCTION IF EXISTS embedline.alter_source(regclass, text), embedline._take_away(regclass), embedline._put_back(bigint)",
    "ALTER TABLE embedline.pipeline DROP COLUMN source_name, DROP COLUMN is_resting",
    # The functions that the code before knows are written again by its replay.
    "UPDATE embedline.pipeline SET code_version = 0",
)


def _run(statements: tuple[str, ...]) -> None:
    for statement in statements:
        if op.get_context().as_sql:
            op.get_context().impl.static_output(statement + ";")
        else:
            # Plain execution would take ":name" and "%" in the statement for parameters.
            op.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})


def upgrade() -> None:
    _run(UPGRADE)


def downgrade() -> None:
    _run(DOWNGRADE)
