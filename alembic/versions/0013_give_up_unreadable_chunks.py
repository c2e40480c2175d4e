"""Say that chunks of the serving version may be given up, too: its model may not be able to read them.

What: comments of embedline.version_dead_letter. Lock: SHARE UPDATE EXCLUSIVE on that table. How long: an instant. Undo:
`alembic downgrade` by one, which also forgets the setting `unknown_token_share`. Dead letters of such chunks stay; the code
before respects them.

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

UPGRADE = (
    "COMMENT ON TABLE embedline.version_dead_letter IS"
    " 'Chunks that a version beside the serving one could not embed, or that the model of the serving one cannot read, with the reason'",
    "COMMENT ON COLUMN embedline.version_dead_letter.accepted_by IS"
    " 'Who said that the version may go without the chunk (accept_dead_letters), or the setting that did; NULL: nothing and no one'",
)

DOWNGRADE = (
    "COMMENT ON TABLE embedline.version_dead_letter IS"
    " 'Chunks that a version beside the serving one could not embed, with the reason'",
    "COMMENT ON COLUMN embedline.version_dead_letter.accepted_by IS"
    " 'Who said that the version may go without the chunk (accept_dead_letters); NULL: nobody'",
    "DELETE FROM embedline.setting WHERE name = 'unknown_token_share'",
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
