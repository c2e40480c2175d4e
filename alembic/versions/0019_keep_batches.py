"""Keep what was measured of batches, and since when alerts stand.

What: tables finished_batch (one row for a batch, kept for a day), batch_hour, batch_total and request_failure (their sums),
alert_state; column commit_seconds of embedline.worker. Lock: ACCESS EXCLUSIVE on embedline.worker for an instant; none on
any table of the user. How long: under a second. Undo: `alembic downgrade 0018`; the history of batches is lost, no row or
vector is.

Revision ID: 0019
Revises: 0018
"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

_SUMS = """
        batch_count bigint NOT NULL,
        row_count bigint NOT NULL,
        embedded_count bigint NOT NULL,
        retried_count bigint NOT NULL,
        dead_count bigint NOT NULL,
        chunk_count bigint NOT NULL,
        request_count bigint NOT NULL,
        token_count bigint NOT NULL,
        content_bytes bigint NOT NULL,
        claim_ms double precision NOT NULL,
        read_ms double precision NOT NULL,
        chunk_ms double precision NOT NULL,
        embed_ms double precision NOT NULL,
        write_ms double precision NOT NULL,
"""

UPGRADE = (
    """
    CREATE TABLE embedline.finished_batch (
        batch_id bigint GENERATED ALWAYS AS IDENTITY,
        finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        pipeline_id bigint NOT NULL,
        version_id bigint NOT NULL,
        worker_id integer,
        kind text NOT NULL,
        row_count integer NOT NULL,
        embedded_count integer NOT NULL,
        retried_count integer NOT NULL,
        dead_count integer NOT NULL,
        chunk_count integer NOT NULL,
        request_count integer NOT NULL,
        token_count bigint NOT NULL,
        content_bytes bigint NOT NULL,
        failures jsonb,
        lag_seconds real,
        claim_ms real NOT NULL,
        read_ms real NOT NULL,
        chunk_ms real NOT NULL,
        embed_ms real NOT NULL,
        write_ms real NOT NULL,
        CONSTRAINT finished_batch_pkey PRIMARY KEY (batch_id),
        CONSTRAINT finished_batch_kind_check CHECK (kind IN ('change', 'backfill', 'fill'))
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000)
    """,
    "CREATE INDEX finished_batch_finished_at_idx ON embedline.finished_batch (finished_at)",
    "COMMENT ON TABLE embedline.finished_batch IS 'One row for each batch that is through; view embedline.batch shows it by name'",
    "COMMENT ON COLUMN embedline.finished_batch.worker_id IS 'The resident worker; NULL: a call of embed_pending'",
    "COMMENT ON COLUMN embedline.finished_batch.kind IS 'change: changed rows; backfill: rows from before the pipeline; fill: chunks of a new version'",
    "COMMENT ON COLUMN embedline.finished_batch.failures IS 'Requests that failed, by class: {\"rate_limited\": 2}'",
    "COMMENT ON COLUMN embedline.finished_batch.lag_seconds IS 'Seconds from the oldest change of the batch to its last write; NULL if the queue does not tell'",
    f"""
    CREATE TABLE embedline.batch_hour (
        pipeline_id bigint NOT NULL,
        version_id bigint NOT NULL,
        hour timestamptz NOT NULL,{_SUMS}        CONSTRAINT batch_hour_pkey PRIMARY KEY (pipeline_id, version_id, hour)
    )
    """,
    "COMMENT ON TABLE embedline.batch_hour IS 'Sums of batches by the hour (UTC) in which they ended, of those that finished_batch no longer has'",
    f"""
    CREATE TABLE embedline.batch_total (
        pipeline_id bigint NOT NULL,
        version_id bigint NOT NULL,{_SUMS}        CONSTRAINT batch_total_pkey PRIMARY KEY (pipeline_id, version_id)
    )
    """,
    "COMMENT ON TABLE embedline.batch_total IS 'Sums of all batches that finished_batch no longer has'",
    """
    CREATE TABLE embedline.request_failure (
        pipeline_id bigint NOT NULL,
        version_id bigint NOT NULL,
        class text NOT NULL,
        count bigint NOT NULL,
        CONSTRAINT request_failure_pkey PRIMARY KEY (pipeline_id, version_id, class)
    )
    """,
    "COMMENT ON TABLE embedline.request_failure IS 'Failed requests by class, of batches that finished_batch no longer has'",
    """
    CREATE TABLE embedline.alert_state (
        alert text NOT NULL,
        subject text NOT NULL,
        since timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT alert_state_pkey PRIMARY KEY (alert, subject)
    )
    """,
    "COMMENT ON TABLE embedline.alert_state IS 'When each alert was first seen; workers note it, and view embedline.alert shows it'",
    "ALTER TABLE embedline.worker ADD COLUMN commit_seconds real",
    "COMMENT ON COLUMN embedline.worker.commit_seconds IS 'Seconds of the last commit of a write, which waits for the disk and for synchronous replicas'",
)

DOWNGRADE = (
    "DROP VIEW IF EXISTS embedline.alert, embedline.progress, embedline.batch, embedline.throughput",
    "DROP TABLE embedline.finished_batch, embedline.batch_hour, embedline.batch_total, embedline.request_failure, embedline.alert_state",
    "ALTER TABLE embedline.worker DROP COLUMN commit_seconds",
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
