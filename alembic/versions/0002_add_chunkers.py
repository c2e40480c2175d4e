"""Add what the chunkers, the document prefix, tenants and the recipe stamp need.

What: columns of embedline.pipeline; columns tenant (outbox), recipe (document) and prefix (chunk) of each pipeline's tables.
The functions that read the source are written anew by the replay that follows.
Lock: ACCESS EXCLUSIVE on the pipelines' generated tables for an instant, none on any table of the user.
How long: under a second a pipeline; no table is rewritten. Documents embedded before count as of their version's recipe.
Undo: takes the columns away. A pipeline with a document prefix, a tenant or another chunking than 'recursive' and 'none'
does not work at 0001: drop it before, unless you go on to base.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UPGRADE: tuple[str, ...] = (
    """
    ALTER TABLE embedline.pipeline
        ADD COLUMN chunking_options jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN document_prefix_expression text,
        ADD COLUMN tenant_expression text,
        ADD COLUMN weight double precision NOT NULL DEFAULT 1
            CONSTRAINT pipeline_weight_check CHECK (weight > 0 AND weight < 'Infinity'),
        ADD COLUMN code_version integer NOT NULL DEFAULT 1,
        DROP CONSTRAINT pipeline_chunking_check,
        ADD CONSTRAINT pipeline_chunking_check
            CHECK (chunking IN ('recursive', 'sentences', 'markdown', 'fixed', 'semantic', 'none'))
    """,
    "COMMENT ON COLUMN embedline.pipeline.input_attributes IS 'Attribute numbers of the columns that content, filter and document prefix read'",
    "COMMENT ON COLUMN embedline.pipeline.chunking_options IS 'Options of the chunking method, such as {\"percentile\": 95} of semantic'",
    "COMMENT ON COLUMN embedline.pipeline.document_prefix_expression IS 'Text put before each chunk of a row for embedding only; NULL: none'",
    "COMMENT ON COLUMN embedline.pipeline.tenant_expression IS 'Whose row it is: tenants share the workers; NULL: nobody''s'",
    "COMMENT ON COLUMN embedline.pipeline.weight IS 'Share of the workers beside other pipelines'",
    "COMMENT ON COLUMN embedline.pipeline.code_version IS 'Version of the generated functions; an upgrade writes others anew'",
    """
    DO $do$
    DECLARE
        pipeline record;
    BEGIN
        FOR pipeline IN
            SELECT p.name, ('x' || left(v.fingerprint, 8))::bit(32)::integer AS recipe
            FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.version_id = p.serving_version_id
        LOOP
            EXECUTE format('ALTER TABLE embedline_data.%I ADD COLUMN IF NOT EXISTS tenant text', pipeline.name || '_outbox');
            EXECUTE format('COMMENT ON COLUMN embedline_data.%I.tenant IS %L', pipeline.name || '_outbox',
                'Whose change it is, set when it is claimed; NULL without a tenant expression');
            -- The default stands for all rows that are there, without a rewrite, and then goes.
            EXECUTE format('ALTER TABLE embedline_data.%I ADD COLUMN IF NOT EXISTS recipe integer DEFAULT %s',
                pipeline.name || '_document', pipeline.recipe);
            EXECUTE format('ALTER TABLE embedline_data.%I ALTER COLUMN recipe DROP DEFAULT', pipeline.name || '_document');
            EXECUTE format('COMMENT ON COLUMN embedline_data.%I.recipe IS %L', pipeline.name || '_document',
                'First four bytes of the version''s fingerprint at the time of embedding');
            EXECUTE format('ALTER TABLE embedline_data.%I ADD COLUMN IF NOT EXISTS prefix text', pipeline.name || '_chunk');
            EXECUTE format('COMMENT ON COLUMN embedline_data.%I.prefix IS %L', pipeline.name || '_chunk',
                'Text put before the chunk for embedding, NULL if none');
        END LOOP;
    END
    $do$
    """,
    # The replay creates it with more parameters; this one would stay beside it.
    "DROP FUNCTION IF EXISTS embedline.create_pipeline("
    "text, regclass, text, text, text, text, integer, integer, text, text, text, jsonb, text, text)",
)
DOWNGRADE: tuple[str, ...] = (
    "DROP FUNCTION IF EXISTS embedline.create_pipeline(text, regclass, text, text, text, text, integer, integer, text, text, "
    "text, jsonb, text, text, text, double precision, jsonb, text)",
    "DROP FUNCTION IF EXISTS embedline.alter_pipeline("
    "text, text, text, text, text, text, integer, integer, jsonb, double precision, text[], text)",
    "DROP FUNCTION IF EXISTS embedline._regenerate_pipelines()",
    """
    DO $do$
    DECLARE
        pipeline_name text;
        generated record;
    BEGIN
        FOR pipeline_name IN SELECT p.name FROM embedline.pipeline AS p LOOP
            -- Generated functions that 0001 does not know, callers first; they read what goes away.
            FOR generated IN
                SELECT f.oid::regprocedure AS signature
                FROM unnest('{tenant,audit,gone,present,digest,tenant_or_null,tenant_value}'::text[])
                    WITH ORDINALITY AS w (suffix, position)
                JOIN pg_catalog.pg_proc AS f ON f.proname = pipeline_name || '_' || w.suffix
                    AND f.pronamespace = 'embedline_data'::regnamespace
                ORDER BY w.position
            LOOP
                EXECUTE format('DROP FUNCTION %s', generated.signature);
            END LOOP;
            EXECUTE format('ALTER TABLE embedline_data.%I DROP COLUMN tenant', pipeline_name || '_outbox');
            EXECUTE format('ALTER TABLE embedline_data.%I DROP COLUMN recipe', pipeline_name || '_document');
            EXECUTE format('ALTER TABLE embedline_data.%I DROP COLUMN prefix', pipeline_name || '_chunk');
        END LOOP;
    END
    $do$
    """,
    """
    ALTER TABLE embedline.pipeline
        DROP COLUMN chunking_options, DROP COLUMN document_prefix_expression, DROP COLUMN tenant_expression,
        DROP COLUMN weight, DROP COLUMN code_version,
        DROP CONSTRAINT pipeline_chunking_check,
        -- Rows of newer methods are on their way out: see above.
        ADD CONSTRAINT pipeline_chunking_check CHECK (chunking IN ('recursive', 'none')) NOT VALID
    """,
    "COMMENT ON COLUMN embedline.pipeline.input_attributes IS 'Attribute numbers of the columns that content and filter read'",
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
