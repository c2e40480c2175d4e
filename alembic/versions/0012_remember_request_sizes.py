"""Remember with a model how large a request, and how long a text, its provider takes.

What: four columns of embedline.model, without defaults. The views of the replay that follows show the first. Lock: ACCESS
EXCLUSIVE on embedline.model, for which searches wait. How long: milliseconds, for nothing is rewritten. Undo: `alembic
downgrade 0011`, after which the sizes are found again.

Revision ID: 0012
Revises: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    ALTER TABLE embedline.model
        ADD COLUMN batch_items integer CONSTRAINT model_batch_items_check CHECK (batch_items > 0),
        ADD COLUMN batch_items_refused integer
            CONSTRAINT model_batch_items_refused_check CHECK (batch_items_refused > batch_items),
        ADD COLUMN batch_items_at timestamptz,
        ADD COLUMN text_size_refused integer CONSTRAINT model_text_size_refused_check CHECK (text_size_refused > 0)
    """,
    "COMMENT ON COLUMN embedline.model.batch_items IS "
    "'Texts of the largest request that passed, if the provider refused larger ones; NULL: max_batch_items pass'",
    "COMMENT ON COLUMN embedline.model.batch_items_refused IS 'Texts of the smallest request that was refused for its size'",
    "COMMENT ON COLUMN embedline.model.batch_items_at IS 'When batch_items was last found or a larger request tried'",
    "COMMENT ON COLUMN embedline.model.text_size_refused IS "
    "'Estimated size of the shortest text that was refused for its length, in thirds of a token: others are cut before they "
    "are sent; NULL: none was'",
)

DOWNGRADE = (
    "DROP FUNCTION IF EXISTS embedline.resume_model(text)",
    # The replay of the code before writes them again.
    "DROP VIEW IF EXISTS embedline.status, embedline.versions",
    """
    ALTER TABLE embedline.model
        DROP COLUMN batch_items, DROP COLUMN batch_items_refused, DROP COLUMN batch_items_at, DROP COLUMN text_size_refused
    """,
    "DELETE FROM embedline.setting WHERE name = 'max_provider_wait_seconds'",
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
