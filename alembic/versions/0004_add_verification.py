"""Add what verify and requeue keep.

What: table verification (one row for each run of verify), version.vectors_valid_from, the setting dead_letter_retention.
Lock: ACCESS EXCLUSIVE on embedline.version for an instant (a column without a default is no rewrite); none on any table of
the user. How long: milliseconds. Undo: `alembic downgrade 0003` drops the results of past runs and takes the nightly job away.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

UPGRADE: tuple[str, ...] = (
    "ALTER TABLE embedline.version ADD COLUMN vectors_valid_from timestamptz",
    "COMMENT ON COLUMN embedline.version.vectors_valid_from IS 'Documents embedded before have vectors of another model, as verify found: they are embedded anew, and lend none; NULL: all are valid'",
    """
    CREATE TABLE embedline.verification (
        verification_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT verification_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL
            CONSTRAINT verification_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        verified_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        repair boolean NOT NULL DEFAULT false,
        finding_count bigint NOT NULL DEFAULT 0,
        repaired_count bigint NOT NULL DEFAULT 0,
        findings jsonb NOT NULL DEFAULT '[]',
        error text
    )
    """,
    "CREATE INDEX verification_pipeline_id_verified_at_idx ON embedline.verification (pipeline_id, verified_at)",
    "COMMENT ON TABLE embedline.verification IS 'Results of embedline.verify, by hand or nightly; kept for 90 days'",
    "COMMENT ON COLUMN embedline.verification.finding_count IS 'What was not as it should be; rows that the backfill has still to read are none of it'",
    "COMMENT ON COLUMN embedline.verification.error IS 'Why the pipeline could not be verified; NULL: it was'",
    "INSERT INTO embedline.setting (name, value) VALUES ('dead_letter_retention', '90 days')",
)

DOWNGRADE: tuple[str, ...] = (
    """
    DO $do$
    BEGIN
        IF to_regclass('cron.job') IS NOT NULL THEN
            EXECUTE 'SELECT cron.unschedule(jobid) FROM cron.job'
                ' WHERE database = current_database() AND jobname = ''embedline nightly''';
        END IF;
    END
    $do$
    """,
    "DELETE FROM embedline.setting WHERE name = 'dead_letter_retention'",
    # Replayed objects of this revision: an older package would not know them.
    "DROP PROCEDURE IF EXISTS embedline.run_nightly(boolean)",
    "DROP FUNCTION IF EXISTS embedline._nightly_step(text, text, boolean, text)",
    "DROP FUNCTION IF EXISTS embedline.schedule_nightly(time, boolean)",
    "DROP FUNCTION IF EXISTS embedline.verify(text, boolean, integer)",
    "DROP FUNCTION IF EXISTS embedline.requeue(text, jsonb, text, boolean)",
    "DROP FUNCTION IF EXISTS embedline.purge_dead_letters(interval)",
    "DROP TABLE embedline.verification",
    "ALTER TABLE embedline.version DROP COLUMN vectors_valid_from",
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
