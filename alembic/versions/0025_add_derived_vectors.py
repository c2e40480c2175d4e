"""Keep vectors of subjects, derived from those of the items that they had.

What: table derived. Lock: none on any table of the user. How long: under a second. Undo: `alembic downgrade 0024`; derived
vectors are lost with their tables, views and the triggers on their tables of events. No row of yours is.

Revision ID: 0025
Revises: 0024
"""

from __future__ import annotations

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    CREATE TABLE embedline.derived (
        derived_id bigint GENERATED ALWAYS AS IDENTITY,
        name text NOT NULL,
        pipeline_id bigint NOT NULL,
        events regclass NOT NULL,
        event_columns jsonb NOT NULL,
        subject_expression text NOT NULL,
        item_expression text NOT NULL,
        weight_expression text,
        at_expression text,
        expression_search_path text NOT NULL,
        subject_type text NOT NULL,
        item_type text NOT NULL,
        half_life interval,
        derived_view regclass,
        created_by name NOT NULL,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        swept_at timestamptz,
        last_error text,
        last_error_at timestamptz,
        CONSTRAINT derived_pkey PRIMARY KEY (derived_id),
        CONSTRAINT derived_name_key UNIQUE (name),
        CONSTRAINT derived_half_life_check CHECK (half_life > '0' AND at_expression IS NOT NULL OR half_life IS NULL),
        CONSTRAINT derived_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline
    )
    """,
    "CREATE INDEX derived_pipeline_id_idx ON embedline.derived (pipeline_id)",
    "COMMENT ON TABLE embedline.derived IS 'Vectors of subjects, such as readers: the weighted mean of their items'' vectors'",
    "COMMENT ON COLUMN embedline.derived.events IS 'The table whose rows say which subject had which item'",
    "COMMENT ON COLUMN embedline.derived.event_columns IS"
    " 'Names of the columns that the expressions use, by attribute number'",
    "COMMENT ON COLUMN embedline.derived.item_type IS 'Type of the expression for the item''s key'",
    "COMMENT ON COLUMN embedline.derived.half_life IS 'Age at which an event counts half; NULL: events do not age'",
    "COMMENT ON COLUMN embedline.derived.swept_at IS 'When all subjects were last queued; NULL: not yet'",
    "REVOKE ALL ON TABLE embedline.derived FROM public",
)

DOWNGRADE = (
    r"""
    DO $do$
    DECLARE
        statement text;
    BEGIN
        FOR statement IN
            SELECT format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass)
            FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
            WHERE p.pronamespace = 'embedline_data'::regnamespace AND t.tgparentid = 0
                AND p.proname IN (SELECT d.name || '_derived_note_' || s.suffix FROM embedline.derived AS d,
                    unnest('{insert,delete,update,truncate,items}'::text[]) AS s (suffix))
            UNION ALL
            SELECT format('DROP VIEW %s', d.derived_view) FROM embedline.derived AS d JOIN pg_class AS c ON c.oid = d.derived_view
        LOOP
            EXECUTE statement;
        END LOOP;
        FOR statement IN
            SELECT format('DROP FUNCTION %s', p.oid::regprocedure) FROM pg_proc AS p, embedline.derived AS d
            WHERE p.pronamespace IN ('embedline_data'::regnamespace, 'embedline_search'::regnamespace)
                AND p.proname ~ ('^' || d.name || '_derived_(note_(insert|delete|update|truncate|items)|read|of_items|all|seen|of_v[0-9]+)$')
            UNION ALL
            SELECT format('DROP TABLE %s CASCADE', c.oid::regclass) FROM pg_class AS c, embedline.derived AS d
            WHERE c.relnamespace = 'embedline_data'::regnamespace AND c.relkind = 'r'
                AND c.relname ~ ('^' || d.name || '_derived_(dirty|items|subject|of_v[0-9]+)$')
        LOOP
            EXECUTE statement;
        END LOOP;
    END
    $do$
    """,
    "DROP VIEW IF EXISTS embedline.derived_status",
    "DROP FUNCTION IF EXISTS embedline._derived_counts(text)",
    "DROP FUNCTION IF EXISTS embedline.create_derived(text, text, regclass, text, text, text, text, interval, text)",
    "DROP FUNCTION IF EXISTS embedline.drop_derived(text)",
    "DROP FUNCTION IF EXISTS embedline.search_derived(text, text, integer, boolean, boolean)",
    # Replayed functions that read the table are replaced by those of the version that is gone back to.
    "DROP TABLE embedline.derived",
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
