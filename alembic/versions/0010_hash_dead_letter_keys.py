"""Index dead letters by a hash of their key: the key itself may be longer than an index entry can be.

What: a unique index in place of the constraint dead_letter_pipeline_id_key_key. Lock: ACCESS EXCLUSIVE on
embedline.dead_letter, while the index of what is in it is built. How long: under a second for 100,000 dead letters. Undo:
`alembic downgrade` to the revision before, which refuses while there are keys too long for the constraint.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

UPGRADE = (
    "ALTER TABLE embedline.dead_letter DROP CONSTRAINT dead_letter_pipeline_id_key_key",
    # Not convert_to, which is not immutable: the escape format of bytea, in which a backslash is written twice.
    r"""
    CREATE UNIQUE INDEX dead_letter_pipeline_id_key_digest_idx ON embedline.dead_letter
        (pipeline_id, sha256(replace(key::text, E'\\', E'\\\\')::bytea))
    """,
)

DOWNGRADE = (
    "DROP INDEX embedline.dead_letter_pipeline_id_key_digest_idx",
    """
    DO $do$
    BEGIN
        ALTER TABLE embedline.dead_letter ADD CONSTRAINT dead_letter_pipeline_id_key_key UNIQUE (pipeline_id, key);
    EXCEPTION WHEN program_limit_exceeded THEN
        RAISE EXCEPTION 'there are dead letters with keys too long for an earlier release'
            USING HINT = 'DELETE FROM embedline.dead_letter WHERE octet_length(key::text) > 2500;';
    END
    $do$
    """,
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
