"""Keep the names of a source's columns beside their numbers.

What: embedline.pipeline gets source_columns, filled from the sources, and attributes_of, which the next look at the pipeline
fills. pg_dump numbers columns anew where one was dropped: a restored database finds them again by these names. Lock: ACCESS
EXCLUSIVE on embedline.pipeline for an instant (columns with a constant default are no rewrite); what is generated is written
anew, and a source in capture mode statement that is a part of another table gets row triggers (SHARE ROW EXCLUSIVE on it).
How long: under a second. Undo: `alembic downgrade 0006`.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

UPGRADE: tuple[str, ...] = (
    """
    ALTER TABLE embedline.pipeline
        ADD COLUMN source_columns jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN attributes_of text
    """,
    "COMMENT ON COLUMN embedline.pipeline.source_columns IS 'Names of the source''s columns by attribute number, as of when its functions were last written'",
    "COMMENT ON COLUMN embedline.pipeline.attributes_of IS 'Cluster, database and table that the attribute numbers hold for: after a restore they are found again by name'",
    "COMMENT ON COLUMN embedline.pipeline.capture IS "
    "'statement: transition-table triggers; row: row triggers (partitioned sources, parts of other tables, logical-replication subscribers)'",
    """
    UPDATE embedline.pipeline AS p SET code_version = 0, source_columns = coalesce((
        SELECT jsonb_object_agg(a.attnum, a.attname) FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = p.source AND a.attnum > 0 AND NOT a.attisdropped), '{}')
    """,
)

DOWNGRADE: tuple[str, ...] = (
    "DROP EVENT TRIGGER IF EXISTS embedline_resolve_attributes",
    "DROP FUNCTION IF EXISTS embedline._on_before_alter()",
    "DROP FUNCTION IF EXISTS embedline._resolve_attributes()",
    "COMMENT ON COLUMN embedline.pipeline.capture IS "
    "'statement: transition-table triggers; row: row triggers (partitioned sources and logical-replication subscribers)'",
    "ALTER TABLE embedline.pipeline DROP COLUMN source_columns, DROP COLUMN attributes_of",
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
