"""Keep vectors that an import or an adoption lends to a version.

What: tables loan (one row for a version that borrows), loan_vector (its vectors, by content hash) and loan_taken (which of them
chunks have asked for). Lock: none on any table of the user. How long: under a second. Undo: `alembic downgrade 0022`; lent vectors that no chunk has taken yet are lost, and
the generated functions of rows' states and chunks' hashes are dropped.

Revision ID: 0023
Revises: 0022
"""

from __future__ import annotations

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    CREATE TABLE embedline.loan (
        version_id bigint NOT NULL,
        begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        expires_at timestamptz NOT NULL,
        CONSTRAINT loan_pkey PRIMARY KEY (version_id),
        CONSTRAINT loan_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE embedline.loan IS 'Versions whose chunks may take vectors of embedline.loan_vector'",
    "COMMENT ON COLUMN embedline.loan.expires_at IS 'When workers remove what was lent, if end_loan has not'",
    # Beside the generated tables of vectors to lend: those hold vectors for minutes, and each round of a worker reads them
    # whole. An import may hold millions for days.
    """
    CREATE TABLE embedline.loan_vector (
        version_id bigint NOT NULL,
        content_hash uuid NOT NULL,
        vector bytea NOT NULL,
        CONSTRAINT loan_vector_pkey PRIMARY KEY (version_id, content_hash),
        CONSTRAINT loan_vector_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.loan ON DELETE CASCADE
    )
    """,
    # Floats do not compress.
    "ALTER TABLE embedline.loan_vector ALTER COLUMN vector SET STORAGE EXTERNAL",
    "COMMENT ON TABLE embedline.loan_vector IS 'Vectors that chunks with the same content take instead of asking the model'",
    "COMMENT ON COLUMN embedline.loan_vector.content_hash IS 'Hash of a chunk''s content, or of the content without white space around it'",
    "COMMENT ON COLUMN embedline.loan_vector.vector IS 'In the form of vector_send or halfvec_send, as the version''s column'",
    # Appended to alone, so that no worker waits for another: the same pair may be there twice.
    """
    CREATE TABLE embedline.loan_taken (
        loan_taken_id bigint GENERATED ALWAYS AS IDENTITY,
        version_id bigint NOT NULL,
        lent_hash uuid NOT NULL,
        chunk_hash uuid NOT NULL,
        CONSTRAINT loan_taken_pkey PRIMARY KEY (loan_taken_id),
        CONSTRAINT loan_taken_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.loan ON DELETE CASCADE
    )
    """,
    "CREATE INDEX loan_taken_version_id_idx ON embedline.loan_taken (version_id)",
    "COMMENT ON TABLE embedline.loan_taken IS 'Which lent vectors chunks have asked for, to count them when the loan ends'",
    "COMMENT ON COLUMN embedline.loan_taken.chunk_hash IS 'content_hash of the chunk'",
    "REVOKE ALL ON TABLE embedline.loan, embedline.loan_vector, embedline.loan_taken FROM public",
)

DOWNGRADE = (
    "DROP TABLE embedline.loan_taken, embedline.loan_vector, embedline.loan",
    # An earlier version does not know these, and could not drop the tables that they read.
    r"""
    DO $do$
    DECLARE
        signature text;
    BEGIN
        FOR signature IN
            SELECT p.oid::regprocedure::text FROM pg_proc AS p
            WHERE p.pronamespace = 'embedline_search'::regnamespace AND p.proname ~ '_v[0-9]+_(state|stored)$'
        LOOP
            EXECUTE 'DROP FUNCTION ' || signature;
        END LOOP;
    END
    $do$
    """,
    "DROP FUNCTION IF EXISTS embedline_data._row_state(text, integer, text[])",
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
