"""Take compare_chunkings away again when going back.

What: nothing going forward; sql/ creates embedline.compare_chunkings and its helper. Lock: none. How long: an instant.
Undo: `alembic downgrade 0023` drops both functions.

Revision ID: 0024
Revises: 0023
"""

from __future__ import annotations

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

DOWNGRADE = (
    "DROP FUNCTION IF EXISTS embedline.compare_chunkings(text, jsonb, regclass, integer, integer, bigint, boolean)",
    "DROP FUNCTION IF EXISTS embedline._embed_chunkings(text, jsonb, bigint [], text [], boolean)",
)


def upgrade() -> None:
    """Leave the functions to sql/, which is replayed after every upgrade."""


def downgrade() -> None:
    """Drop the functions."""
    for statement in DOWNGRADE:
        if op.get_context().as_sql:
            op.get_context().impl.static_output(statement + ";")
        else:
            op.get_bind().exec_driver_sql(statement, execution_options={"no_parameters": True})
