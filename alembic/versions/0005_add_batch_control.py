"""Add claims in bulk, what workers report of their batches, indexes for what is due, and let packages bring providers.

What: a table of claims for each pipeline, columns of embedline.worker and of the outboxes. Lock: ACCESS EXCLUSIVE on
embedline.worker and on the outboxes, for an instant; stop the workers first. How long: under a second, plus the indexes
of outboxes that are long. Undo: `alembic downgrade 0004`.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# For each pipeline: `command` is formatted with the pipeline's name and run.
_EACH_PIPELINE = """
    DO $do$
    DECLARE
        pipeline record;
    BEGIN
        PERFORM set_config('lock_timeout', '10s', true);
        FOR pipeline IN SELECT p.name, p.key_columns, p.key_types FROM embedline.pipeline AS p LOOP
            {commands}
        END LOOP;
    END
    $do$
"""

UPGRADE = (
    # Other packages may bring providers; embedline.embedders says which there are.
    "ALTER TABLE embedline.model DROP CONSTRAINT model_provider_check",
    """
    ALTER TABLE embedline.worker
        ADD COLUMN batch_rows integer,
        ADD COLUMN requests_in_flight integer,
        ADD COLUMN claim_seconds real,
        ADD COLUMN embed_seconds real,
        ADD COLUMN write_seconds real,
        ADD COLUMN held_back_by text,
        ADD COLUMN reported_at timestamptz
    """,
    "COMMENT ON COLUMN embedline.worker.batch_rows IS 'Rows of the next batch: grows while batches keep to batch_seconds and commit_seconds, else halves'",
    "COMMENT ON COLUMN embedline.worker.embed_seconds IS 'Last batch, from its claim to the last answer'",
    "COMMENT ON COLUMN embedline.worker.write_seconds IS 'Last batch, its longest write with the commit'",
    "COMMENT ON COLUMN embedline.worker.held_back_by IS 'Why the worker takes less on: a replica that lags, an old snapshot; NULL: nothing'",
    _EACH_PIPELINE.format(
        commands="""
            EXECUTE format('CREATE TABLE embedline_data.%I (claim_id bigint GENERATED ALWAYS AS IDENTITY, %s,'
                ' claimed_by integer NOT NULL, enqueued_at timestamptz NOT NULL, CONSTRAINT %I PRIMARY KEY (claim_id))'
                ' WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)',
                pipeline.name || '_claim',
                (SELECT string_agg(format('%I %s[] NOT NULL', k.column_name, k.column_type), ', ' ORDER BY k.position)
                 FROM unnest(pipeline.key_columns, pipeline.key_types) WITH ORDINALITY AS k (column_name, column_type, position)),
                pipeline.name || '_claim_pkey');
            EXECUTE format('REVOKE ALL ON TABLE embedline_data.%I FROM public', pipeline.name || '_claim');
            EXECUTE format('UPDATE embedline_data.%I SET not_before = now() WHERE not_before IS NULL', pipeline.name || '_outbox');
            EXECUTE format('ALTER TABLE embedline_data.%I ALTER COLUMN not_before SET DEFAULT now(),'
                ' ALTER COLUMN not_before SET NOT NULL, ADD COLUMN of_backfill boolean NOT NULL DEFAULT false',
                pipeline.name || '_outbox');
            EXECUTE format('CREATE INDEX %I ON embedline_data.%I (not_before, outbox_id) WHERE claimed_by IS NULL',
                pipeline.name || '_outbox_due_idx', pipeline.name || '_outbox');
            EXECUTE format('CREATE INDEX %I ON embedline_data.%I (crash_count, not_before)'
                ' WHERE claimed_by IS NULL AND crash_count > 0',
                pipeline.name || '_outbox_suspect_idx', pipeline.name || '_outbox');
            EXECUTE format('CREATE INDEX %I ON embedline_data.%I (outbox_id) WHERE of_backfill',
                pipeline.name || '_outbox_backfill_idx', pipeline.name || '_outbox');
        """
    ),
    # The functions that read the queue are written anew by the replay that follows.
    "UPDATE embedline.pipeline SET code_version = 0",
)

DOWNGRADE = (
    # Models of other packages are on their way out.
    """
    ALTER TABLE embedline.model ADD CONSTRAINT model_provider_check CHECK (provider IN ('sentence-transformers', 'openai')) NOT VALID
    """,
    _EACH_PIPELINE.format(
        commands="""
            EXECUTE format('INSERT INTO embedline_data.%I (%s) SELECT k.* FROM embedline_data.%I AS c CROSS JOIN LATERAL unnest(%s) AS k',
                pipeline.name || '_outbox',
                (SELECT string_agg(quote_ident(k), ', ' ORDER BY n) FROM unnest(pipeline.key_columns) WITH ORDINALITY AS u (k, n)),
                pipeline.name || '_claim',
                (SELECT string_agg('c.' || quote_ident(k), ', ' ORDER BY n) FROM unnest(pipeline.key_columns) WITH ORDINALITY AS u (k, n)));
            -- With the functions that read it; the next replay at head makes them anew.
            EXECUTE format('DROP TABLE embedline_data.%I CASCADE', pipeline.name || '_claim');
            EXECUTE format('DROP INDEX embedline_data.%I, embedline_data.%I, embedline_data.%I', pipeline.name || '_outbox_due_idx',
                pipeline.name || '_outbox_suspect_idx', pipeline.name || '_outbox_backfill_idx');
            EXECUTE format('ALTER TABLE embedline_data.%I ALTER COLUMN not_before DROP NOT NULL, ALTER COLUMN not_before DROP DEFAULT,'
                ' DROP COLUMN of_backfill', pipeline.name || '_outbox');
        """
    ),
    "UPDATE embedline.pipeline SET code_version = 0",
    # It shows the columns; the next replay at head makes it anew.
    "DROP VIEW IF EXISTS embedline.status",
    """
    ALTER TABLE embedline.worker DROP COLUMN batch_rows, DROP COLUMN requests_in_flight, DROP COLUMN claim_seconds,
        DROP COLUMN embed_seconds, DROP COLUMN write_seconds, DROP COLUMN held_back_by, DROP COLUMN reported_at
    """,
    "DROP FUNCTION IF EXISTS embedline.configure(text, double precision)",
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
