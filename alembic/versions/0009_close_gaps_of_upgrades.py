"""Keep what completeness, restores and gates of versions rest on.

What: pipeline.altered_at; pipelines that hold documents of an earlier recipe are swept once more; backfill_range.relation is a
regclass; pipeline.serving_function goes; a gate's baseline. Lock: ACCESS EXCLUSIVE on embedline.pipeline, embedline.backfill_range
and embedline.evaluation for an instant, none on any table of the user. How long: one read of each pipeline's documents. Undo:
`alembic downgrade 0008`.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

UPGRADE: tuple[str, ...] = (
    "ALTER TABLE embedline.pipeline ADD COLUMN altered_at timestamptz",
    "COMMENT ON COLUMN embedline.pipeline.altered_at IS 'When content, filter, prefix or chunking last changed: the next sweep compares documents of before with their rows, and gates of before count for nothing; NULL: never'",
    # What earlier releases called complete without the rows that moved while they were read again.
    """
    DO $do$
    DECLARE
        pipeline record;
        has_uncut boolean;
    BEGIN
        FOR pipeline IN
            SELECT p.name, p.recipe, p.serving_version_id FROM embedline.pipeline AS p
            WHERE to_regclass(format('embedline_data.%I', p.name || '_document')) IS NOT NULL
        LOOP
            EXECUTE format('SELECT EXISTS (SELECT FROM embedline_data.%I WHERE state = ''embedded'' AND recipe <> $1)',
                pipeline.name || '_document') INTO has_uncut USING pipeline.recipe;
            IF has_uncut THEN
                UPDATE embedline.version SET state = 'backfilling', completed_at = NULL
                WHERE version_id = pipeline.serving_version_id;
            END IF;
        END LOOP;
    END
    $do$
    """,
    # By name, so that a dump takes it to where the table has another number. Both are stored alike: no rewrite.
    "ALTER TABLE embedline.backfill_range ALTER COLUMN relation TYPE regclass",
    # It is found by its name: functions have other numbers after a restore, and after pg_upgrade.
    "ALTER TABLE embedline.pipeline DROP COLUMN serving_function",
    "ALTER TABLE embedline.evaluation ADD COLUMN baseline_version_id bigint, ADD COLUMN baseline_fingerprint text",
    "COMMENT ON COLUMN embedline.evaluation.baseline_version_id IS 'Against which version: a gate counts for a cutover from that one alone; it may be gone, and a later one may have its number'",
    "COMMENT ON COLUMN embedline.evaluation.baseline_fingerprint IS 'That version''s fingerprint then'",
    # When it began: an alteration in its midst is of after it.
    "ALTER TABLE embedline.evaluation ALTER COLUMN evaluated_at SET DEFAULT statement_timestamp()",
    """
    UPDATE embedline.evaluation AS e SET baseline_version_id = v.version_id, baseline_fingerprint = v.fingerprint
    FROM embedline.version AS v
    WHERE v.pipeline_id = e.pipeline_id AND v.number = e.baseline_number AND v.created_at < e.evaluated_at
    """,
    # Generated functions are written anew by the replay.
    "UPDATE embedline.pipeline SET code_version = 0",
)

DOWNGRADE: tuple[str, ...] = (
    "DROP VIEW IF EXISTS embedline.versions",
    "ALTER TABLE embedline.evaluation ALTER COLUMN evaluated_at SET DEFAULT clock_timestamp()",
    "ALTER TABLE embedline.evaluation DROP COLUMN baseline_version_id, DROP COLUMN baseline_fingerprint",
    "ALTER TABLE embedline.pipeline ADD COLUMN serving_function oid",
    "COMMENT ON COLUMN embedline.pipeline.serving_function IS 'Function whose body names the serving version: read past the snapshot, as the view''s definition is'",
    "UPDATE embedline.pipeline SET serving_function = to_regprocedure(format('embedline_data.%I()', name || '_serving'))",
    "ALTER TABLE embedline.backfill_range ALTER COLUMN relation TYPE oid",
    "ALTER TABLE embedline.pipeline DROP COLUMN altered_at",
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
