"""Embed what can wait through the provider's batch endpoint.

What: tables provider_batch, provider_batch_text and provider_batch_hold, which outlive the session of a worker; tables
bulk_rule and bulk_change, which say what may wait; columns reservation.is_batch and usage_day.batch_tokens, so that what a batch takes counts in no rate. Lock: ACCESS EXCLUSIVE on
embedline.reservation and embedline.usage_day for an instant; none on any table of the user. How long: under a second. Undo:
`alembic downgrade 0030`; rows that wait for batches are due at once, and batches at the provider run to their end unread.

Revision ID: 0031
Revises: 0030
"""

from __future__ import annotations

from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    CREATE TABLE embedline.provider_batch (
        batch_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT provider_batch_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL,
        version_id bigint NOT NULL,
        model_id bigint NOT NULL,
        config jsonb NOT NULL,
        fingerprint text NOT NULL,
        token text NOT NULL DEFAULT gen_random_uuid()::text,
        state text NOT NULL DEFAULT 'collecting',
        provider_id text,
        outcome text,
        text_count integer NOT NULL DEFAULT 0,
        row_count bigint NOT NULL DEFAULT 0,
        byte_count bigint NOT NULL DEFAULT 0,
        tokens bigint NOT NULL DEFAULT 0,
        reservation_id bigint,
        attempts integer NOT NULL DEFAULT 0,
        last_error text,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        touched_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        next_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        sent_at timestamptz,
        ended_at timestamptz,
        CONSTRAINT provider_batch_state_check CHECK (state IN ('collecting', 'sending', 'waiting', 'done'))
    )
    """,
    "CREATE INDEX provider_batch_open_idx ON embedline.provider_batch (next_at) WHERE state <> 'done'",
    "CREATE INDEX provider_batch_version_id_idx ON embedline.provider_batch (version_id, state)",
    "COMMENT ON TABLE embedline.provider_batch IS 'Texts that are embedded together by a provider''s batch endpoint'",
    "COMMENT ON COLUMN embedline.provider_batch.config IS"
    " 'The model as it was registered when the batch was begun, without any key: it may be altered or dropped meanwhile'",
    "COMMENT ON COLUMN embedline.provider_batch.fingerprint IS 'Fingerprint of the version when the batch was begun'",
    "COMMENT ON COLUMN embedline.provider_batch.token IS"
    " 'Stands in the batch''s metadata at the provider, so that a batch whose worker died is found there'",
    "COMMENT ON COLUMN embedline.provider_batch.state IS"
    " 'collecting: texts are added; sending: the provider is asked for a batch, or is about to be; waiting: it has the"
    " batch; done: its answers are stored, its rows are due'",
    "COMMENT ON COLUMN embedline.provider_batch.provider_id IS 'The batch''s number at the provider'",
    "COMMENT ON COLUMN embedline.provider_batch.outcome IS"
    " 'Of a batch that is done: completed, expired, cancelled or failed, as the provider tells; lost, if it knows nothing of"
    " it; dropped, with its version; dissolved, if it was never sent'",
    "COMMENT ON COLUMN embedline.provider_batch.row_count IS 'Rows of the queue that wait for it'",
    "COMMENT ON COLUMN embedline.provider_batch.attempts IS 'Times that it was sent, or asked for, since the last answer'",
    "COMMENT ON COLUMN embedline.provider_batch.next_at IS 'When a worker deals with it next'",
    """
    CREATE TABLE embedline.provider_batch_text (
        version_id bigint NOT NULL
            CONSTRAINT provider_batch_text_version_id_fkey REFERENCES embedline.version (version_id) ON DELETE CASCADE,
        content_hash uuid NOT NULL,
        text_id bigint GENERATED ALWAYS AS IDENTITY,
        batch_id bigint NOT NULL,
        content text,
        tokens integer NOT NULL,
        state text NOT NULL DEFAULT 'pending',
        tries smallint NOT NULL DEFAULT 0,
        vector bytea,
        detail text,
        CONSTRAINT provider_batch_text_pkey PRIMARY KEY (version_id, content_hash),
        CONSTRAINT provider_batch_text_text_id_key UNIQUE (text_id),
        CONSTRAINT provider_batch_text_state_check CHECK (state IN ('pending', 'answered', 'refused', 'unanswered'))
    )
    """,
    "CREATE INDEX provider_batch_text_batch_id_idx ON embedline.provider_batch_text (batch_id, text_id)",
    "COMMENT ON TABLE embedline.provider_batch_text IS"
    " 'Texts of batches by hash of their content, with their vectors until these are written'",
    "COMMENT ON COLUMN embedline.provider_batch_text.text_id IS 'Its custom_id at the provider'",
    "COMMENT ON COLUMN embedline.provider_batch_text.content IS 'NULL once the batch is done'",
    "COMMENT ON COLUMN embedline.provider_batch_text.state IS"
    " 'pending: its batch is open; answered: its vector waits for the row; refused: the provider refused it, the ordinary"
    " endpoint is asked; unanswered: its batch ended without it, another one may have it'",
    "COMMENT ON COLUMN embedline.provider_batch_text.tries IS 'Batches that ended without an answer to it'",
    "COMMENT ON COLUMN embedline.provider_batch_text.vector IS 'float32, little-endian, normalised as its version''s'",
    """
    CREATE TABLE embedline.provider_batch_hold (
        hold_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT provider_batch_hold_pkey PRIMARY KEY,
        batch_id bigint NOT NULL,
        version_id bigint NOT NULL
            CONSTRAINT provider_batch_hold_version_id_fkey REFERENCES embedline.version (version_id) ON DELETE CASCADE,
        of_version boolean NOT NULL,
        queue_ids bigint [] NOT NULL
    )
    """,
    "CREATE INDEX provider_batch_hold_batch_id_idx ON embedline.provider_batch_hold (batch_id)",
    "COMMENT ON TABLE embedline.provider_batch_hold IS"
    " 'Entries of a queue that wait for a batch; they are due when it is done, or after 26 hours'",
    "COMMENT ON COLUMN embedline.provider_batch_hold.of_version IS"
    " 'True: queue_ids are of embedline.version_queue; false: of the pipeline''s outbox'",
    """
    CREATE TABLE embedline.bulk_rule (
        pipeline_id bigint NOT NULL CONSTRAINT bulk_rule_pkey PRIMARY KEY
            CONSTRAINT bulk_rule_pipeline_id_fkey REFERENCES embedline.pipeline (pipeline_id) ON DELETE CASCADE,
        bulk_rows integer CONSTRAINT bulk_rule_bulk_rows_check CHECK (bulk_rows > 0),
        starts_at time,
        ends_at time,
        CONSTRAINT bulk_rule_window_check CHECK ((starts_at IS NULL) = (ends_at IS NULL)),
        CONSTRAINT bulk_rule_any_check CHECK (bulk_rows IS NOT NULL OR starts_at IS NOT NULL)
    )
    """,
    "COMMENT ON TABLE embedline.bulk_rule IS 'Changes of a pipeline that may wait for a provider''s batch endpoint'",
    "COMMENT ON COLUMN embedline.bulk_rule.bulk_rows IS 'Changes of more rows than that in one transaction may wait'",
    "COMMENT ON COLUMN embedline.bulk_rule.starts_at IS 'Changes from this time of the day (UTC) on may wait'",
    "COMMENT ON COLUMN embedline.bulk_rule.ends_at IS 'Up to this time; before starts_at: over midnight'",
    """
    CREATE TABLE embedline.bulk_change (
        pipeline_id bigint NOT NULL
            CONSTRAINT bulk_change_pipeline_id_fkey REFERENCES embedline.pipeline (pipeline_id) ON DELETE CASCADE,
        enqueued_at timestamptz NOT NULL,
        CONSTRAINT bulk_change_pkey PRIMARY KEY (pipeline_id, enqueued_at)
    )
    """,
    "COMMENT ON TABLE embedline.bulk_change IS 'Transactions, by their start, that changed more rows than bulk_rows'",
    "REVOKE ALL ON TABLE embedline.provider_batch, embedline.provider_batch_text, embedline.provider_batch_hold,"
    " embedline.bulk_rule, embedline.bulk_change FROM public",
    "ALTER TABLE embedline.reservation ADD COLUMN is_batch boolean NOT NULL DEFAULT false",
    "COMMENT ON COLUMN embedline.reservation.is_batch IS"
    " 'True: of a batch endpoint, at its price; it counts in no rate limit and in no speed'",
    "ALTER TABLE embedline.usage_day ADD COLUMN batch_tokens bigint NOT NULL DEFAULT 0",
    "COMMENT ON COLUMN embedline.usage_day.batch_tokens IS 'Those of the tokens that a batch endpoint took'",
)

DOWNGRADE = (
    # What waits for a batch is due at once.
    """
    DO $do$
    DECLARE
        held record;
    BEGIN
        FOR held IN
            SELECT p.name, h.queue_ids FROM embedline.provider_batch_hold AS h
            JOIN embedline.version AS v ON v.version_id = h.version_id
            JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id WHERE NOT h.of_version
        LOOP
            EXECUTE format('UPDATE embedline_data.%I SET not_before = now() WHERE outbox_id = ANY ($1)', held.name || '_outbox')
                USING held.queue_ids;
        END LOOP;
        UPDATE embedline.version_queue SET not_before = now() WHERE queue_id IN (
            SELECT unnest(h.queue_ids) FROM embedline.provider_batch_hold AS h WHERE h.of_version);
        INSERT INTO embedline.signal (pipeline) SELECT p.name FROM embedline.pipeline AS p;
    END
    $do$
    """,
    "DROP VIEW IF EXISTS embedline.status, embedline.versions",
    "ALTER TABLE embedline.usage_day DROP COLUMN batch_tokens",
    "ALTER TABLE embedline.reservation DROP COLUMN is_batch",
    "DROP TABLE embedline.bulk_change",
    "DROP TABLE embedline.bulk_rule",
    "DROP TABLE embedline.provider_batch_hold",
    "DROP TABLE embedline.provider_batch_text",
    "DROP TABLE embedline.provider_batch",
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
