"""Mark the rows of a backfill that are in flight.

What: column backfill_range.keys. A row may be in a range of the backfill and in the queue of changes; a worker that takes it from
one sees now that another has it in flight from the other, and it is paid for once. Lock: ACCESS EXCLUSIVE on
embedline.backfill_range, an instant. How long: under a second. Undo: `alembic downgrade 0031`.

Revision ID: 0032
Revises: 0031
"""

from __future__ import annotations

from alembic import op

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None

UPGRADE = (
    "ALTER TABLE embedline.backfill_range ADD COLUMN keys text[]",
    "COMMENT ON COLUMN embedline.backfill_range.keys IS 'Keys in flight while a worker has claimed the range: a list for each key column'",
)

DOWNGRADE = ("ALTER TABLE embedline.backfill_range DROP COLUMN keys",)


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
