"""Register rerankers beside the models that embed.

What: column task of embedline.model, and dimensions that a reranker lacks; a parameter of create_model. Lock: ACCESS
EXCLUSIVE on embedline.model for an instant (a constant default is no rewrite); none on any table of the user. How long:
under a second. Undo: `alembic downgrade 0021`; the rerankers are forgotten with their budgets, no row or vector is.

Revision ID: 0022
Revises: 0021
"""

from __future__ import annotations

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_CREATE_MODEL = (
    "embedline.create_model(text, text, text, integer, text, text, text, text, text, integer, integer, integer,"
    " double precision, jsonb, numeric{task})"
)

UPGRADE = (
    "ALTER TABLE embedline.model ALTER COLUMN dimensions DROP NOT NULL, ADD COLUMN task text NOT NULL DEFAULT 'embed'"
    " CONSTRAINT model_task_check CHECK (task = 'embed' AND dimensions IS NOT NULL OR task = 'rerank' AND dimensions IS NULL)",
    "COMMENT ON TABLE embedline.model IS 'Models that pipelines may use, and rerankers; see embedline.create_model'",
    "COMMENT ON COLUMN embedline.model.task IS "
    "'embed: makes the vectors of pipelines; rerank: scores texts for a query. A model keeps its task'",
    "COMMENT ON COLUMN embedline.model.dimensions IS 'Width of the vectors; NULL: a reranker'",
    "COMMENT ON COLUMN embedline.model.fingerprint IS "
    "'Hash of what decides the vectors or scores: weights, backend, precision, dimensions, task'",
    # The replay writes the signature with one parameter more.
    f"DROP FUNCTION IF EXISTS {_CREATE_MODEL.format(task='')}",
)

DOWNGRADE = (
    "DROP FUNCTION IF EXISTS embedline.rerank(text, text, text[]), embedline._reserve_rerank(text, bigint, bigint),"
    " embedline._settle_rerank(bigint, bigint)",
    f"DROP FUNCTION IF EXISTS {_CREATE_MODEL.format(task=', text')}",
    "DELETE FROM embedline.model WHERE task = 'rerank'",
    "ALTER TABLE embedline.model DROP COLUMN task, ALTER COLUMN dimensions SET NOT NULL",
    "COMMENT ON TABLE embedline.model IS 'Embedding models that pipelines may use; see embedline.create_model'",
    "COMMENT ON COLUMN embedline.model.dimensions IS NULL",
    "COMMENT ON COLUMN embedline.model.fingerprint IS 'Hash of what decides the vectors: weights, backend, precision, dimensions'",
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
