"""Remember what models were trained on.

What: table training, a row a model that `embedline finetune` has made, and training_pair, the pairs that it was made of. Lock: none
on any table of the user. How long: under a second. Undo: `alembic downgrade 0029`; the models stay, what they were trained on is
lost.

Revision ID: 0030
Revises: 0029
"""

from __future__ import annotations

from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    CREATE TABLE embedline.training (
        training_id bigint GENERATED ALWAYS AS IDENTITY,
        model_id bigint NOT NULL,
        model text NOT NULL,
        model_fingerprint text NOT NULL,
        base text NOT NULL,
        base_model text NOT NULL,
        base_fingerprint text NOT NULL,
        pipeline text NOT NULL,
        pairs_table text NOT NULL,
        pairs_hash text NOT NULL,
        parameters jsonb NOT NULL,
        seed bigint NOT NULL,
        code_version text NOT NULL,
        evidence jsonb NOT NULL,
        metrics jsonb NOT NULL,
        outcome text NOT NULL,
        trained_by text NOT NULL,
        trained_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT training_pkey PRIMARY KEY (training_id),
        CONSTRAINT training_model_id_key UNIQUE (model_id),
        CONSTRAINT training_outcome_check CHECK (outcome IN ('gain', 'inconclusive', 'loss')),
        CONSTRAINT training_model_id_fkey FOREIGN KEY (model_id) REFERENCES embedline.model ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE embedline.training IS 'Lineage of models that embedline finetune has made'",
    "COMMENT ON COLUMN embedline.training.model IS 'Directory of the model, as the server sees it'",
    "COMMENT ON COLUMN embedline.training.model_fingerprint IS 'Fingerprint of the model when it was registered'",
    "COMMENT ON COLUMN embedline.training.base IS 'Name of the model that was trained further'",
    "COMMENT ON COLUMN embedline.training.base_model IS 'Directory or hub name of the base'",
    "COMMENT ON COLUMN embedline.training.base_fingerprint IS 'Fingerprint of the base when it was trained'",
    "COMMENT ON COLUMN embedline.training.pairs_table IS 'Table that the pairs were read from'",
    "COMMENT ON COLUMN embedline.training.pairs_hash IS 'SHA-256 of the pairs, which training_pair holds'",
    "COMMENT ON COLUMN embedline.training.parameters IS 'Parameters of the training'",
    "COMMENT ON COLUMN embedline.training.code_version IS 'Version of Embedline that trained'",
    "COMMENT ON COLUMN embedline.training.evidence IS 'Hashes of the base''s weights, of the examples and of the new weights; versions of the libraries, and the machine'",
    "COMMENT ON COLUMN embedline.training.metrics IS 'recall@10 and nDCG@10 of the held-out queries before and after, with intervals'",
    "COMMENT ON COLUMN embedline.training.outcome IS 'gain: the interval of the difference in nDCG@10 lies above 0; loss: below 0; inconclusive: neither'",
    """
    CREATE TABLE embedline.training_pair (
        training_id bigint NOT NULL,
        position integer NOT NULL,
        query text NOT NULL,
        query_hash text NOT NULL,
        key text NOT NULL,
        grade double precision NOT NULL,
        source text,
        at timestamptz,
        is_held_out boolean NOT NULL,
        CONSTRAINT training_pair_pkey PRIMARY KEY (training_id, position),
        CONSTRAINT training_pair_training_id_fkey FOREIGN KEY (training_id) REFERENCES embedline.training ON DELETE CASCADE
    )
    """,
    "CREATE INDEX training_pair_query_hash_idx ON embedline.training_pair (training_id, query_hash)",
    "COMMENT ON TABLE embedline.training_pair IS 'Snapshot of the pairs that a model was trained on'",
    "COMMENT ON COLUMN embedline.training_pair.position IS 'Number of the pair, from 1 on'",
    "COMMENT ON COLUMN embedline.training_pair.query_hash IS 'query_hash of the query; a gate refuses canaries of the same hash'",
    "COMMENT ON COLUMN embedline.training_pair.is_held_out IS 'True: the model was measured by it, not trained on it'",
    "REVOKE ALL ON TABLE embedline.training, embedline.training_pair FROM public",
)

DOWNGRADE = (
    # Its columns are of these tables. The code before creates it again.
    "DROP VIEW IF EXISTS embedline.versions",
    "DROP FUNCTION IF EXISTS embedline.query_hash(text), embedline.collect_pairs(text, regclass, integer, text),"
    " embedline._record_training(text, jsonb, jsonb)",
    "DROP TABLE embedline.training_pair, embedline.training",
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
