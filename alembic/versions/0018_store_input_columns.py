"""Store which columns of its source each expression of a pipeline reads.

What: column input_columns of embedline.pipeline. Until now the columns were recovered from the text of generated functions.
Existing pipelines are filled from there, for the last time. Lock: ACCESS EXCLUSIVE on embedline.pipeline for an instant;
none on any table of the user. How long: under a second. Undo: `alembic downgrade 0017`; nothing is lost, because the
functions of a pipeline still tell its columns.

Revision ID: 0018
Revises: 0017
"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

UPGRADE = (
    "ALTER TABLE embedline.pipeline ADD COLUMN input_columns jsonb NOT NULL DEFAULT '{}'",
    "COMMENT ON COLUMN embedline.pipeline.input_columns IS "
    "'Attribute numbers of the columns that each expression reads, in the order of its function''s parameters'",
    # PostgreSQL prints a function's body with the names that the columns have now. The functions of a pipeline whose source
    # lost a column by CASCADE are gone; it keeps an empty object.
    r"""
    UPDATE embedline.pipeline AS p SET input_columns = f.columns FROM (
        SELECT q.pipeline_id, jsonb_object_agg(e.suffix, (
            SELECT coalesce(jsonb_agg(a.attnum ORDER BY n.position), '[]')
            FROM regexp_matches(e.arguments, 'source_row\.("(?:[^"]|"")*"|[^\s",()]+)', 'g') WITH ORDINALITY AS n (name, position)
            INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = q.source AND a.attnum > 0 AND a.attname = CASE
                WHEN n.name[1] LIKE '"%' THEN replace(substr(n.name[1], 2, length(n.name[1]) - 2), '""', '"')
                ELSE n.name[1] END
        )) AS columns
        FROM embedline.pipeline AS q
        CROSS JOIN LATERAL (
            SELECT c.suffix, (regexp_match(pg_catalog.pg_get_function_sqlbody(r.oid),
                'embedline_(?:data|expression)\."?' || q.name || '_' || c.called
                    || '"?\(((?:source_row\.(?:"(?:[^"]|"")*"|[^\s",()]+)(?:, )?)*)\)'))[1] AS arguments
            FROM (VALUES ('content', 'read', 'content'), ('filter', 'read', 'filter'), ('prefix', 'read', 'prefix'),
                ('tenant_value', 'tenant', 'tenant_or_null')) AS c (suffix, reader, called)
            INNER JOIN pg_catalog.pg_proc AS r ON r.proname = q.name || '_' || c.reader
                AND r.pronamespace = 'embedline_data'::regnamespace
        ) AS e
        WHERE e.arguments IS NOT NULL
        GROUP BY q.pipeline_id
    ) AS f
    WHERE p.pipeline_id = f.pipeline_id
    """,
)

DOWNGRADE = ("ALTER TABLE embedline.pipeline DROP COLUMN input_columns",)


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
