"""Keep with each model what its endpoint was found to need, and the fingerprint under which that endpoint is probed.

What: columns learned and probed_fingerprint of embedline.model. Lock: ACCESS EXCLUSIVE on embedline.model for an instant;
none on any table of the user. How long: under a second. Undo: `alembic downgrade 0016`; what was learned is then learned
again, and `verify` reports the fingerprint of a model whose endpoint was changed by alter_model.

Revision ID: 0017
Revises: 0016
"""

from __future__ import annotations

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    ALTER TABLE embedline.model ADD COLUMN learned jsonb NOT NULL DEFAULT '{}', ADD COLUMN probed_fingerprint text
    """,
    "COMMENT ON COLUMN embedline.model.learned IS "
    "'How answers of the endpoint were found to differ from OpenAI''s: encoding_format that it takes, index that it leaves out'",
    "COMMENT ON COLUMN embedline.model.probed_fingerprint IS "
    "'What a probe of the endpoint of now gives, where alter_model found its vectors to be those of fingerprint; NULL: the same'",
)

DOWNGRADE = ("ALTER TABLE embedline.model DROP COLUMN learned, DROP COLUMN probed_fingerprint",)


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
