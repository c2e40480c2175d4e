"""Keep how well searches find, over time.

What: tables canary (labelled queries), query_sample (noted queries), drift_probe (texts with their first vectors) and
quality_check (the series). Beside them quality_baseline, quality_state, and two columns of embedline.pipeline. Lock: ACCESS EXCLUSIVE on embedline.pipeline for an instant; none on any table of the
user. How long: under a second. Undo: `alembic downgrade 0019`; canaries, noted queries and the series are lost, no row or
vector is.

Revision ID: 0020
Revises: 0019
"""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

UPGRADE = (
    "ALTER TABLE embedline.pipeline ADD COLUMN query_sample_share double precision NOT NULL DEFAULT 0"
    " CONSTRAINT pipeline_query_sample_share_check CHECK (query_sample_share BETWEEN 0 AND 1)",
    "ALTER TABLE embedline.pipeline ADD COLUMN query_retention interval NOT NULL DEFAULT '7 days'",
    "COMMENT ON COLUMN embedline.pipeline.query_sample_share IS 'Share of searches whose text is noted; 0: no text is stored'",
    "COMMENT ON COLUMN embedline.pipeline.query_retention IS 'How long a noted text is kept'",
    """
    CREATE TABLE embedline.canary (
        pipeline_id bigint NOT NULL,
        position integer NOT NULL,
        query text NOT NULL,
        grades jsonb NOT NULL,
        baseline_recall double precision,
        last_recall double precision,
        CONSTRAINT canary_pkey PRIMARY KEY (pipeline_id, position),
        CONSTRAINT canary_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE embedline.canary IS 'Labelled queries of a pipeline, which check_quality asks; set_canaries fills it'",
    "COMMENT ON COLUMN embedline.canary.position IS 'Number of the query, from 1 on'",
    "COMMENT ON COLUMN embedline.canary.grades IS 'The relevant rows: {\"key\": grade}'",
    "COMMENT ON COLUMN embedline.canary.baseline_recall IS 'recall@10 of this query in the baseline; NULL before the first check'",
    "COMMENT ON COLUMN embedline.canary.last_recall IS 'recall@10 of this query in the last check'",
    # Unlogged: a search does not wait for the disk because of it, and the texts reach neither a replica nor an archive of
    # the log. A foreign key would lock the pipeline's row, so there is none.
    """
    CREATE UNLOGGED TABLE embedline.query_sample (
        pipeline_id bigint NOT NULL,
        asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        query text NOT NULL
    ) WITH (vacuum_truncate = false)
    """,
    "CREATE INDEX query_sample_asked_at_idx ON embedline.query_sample (pipeline_id, asked_at)",
    "COMMENT ON TABLE embedline.query_sample IS 'Texts of searches, of pipelines where sample_queries has switched that on'",
    """
    CREATE TABLE embedline.drift_probe (
        version_id bigint NOT NULL,
        position integer NOT NULL,
        probe text NOT NULL,
        reference real[] NOT NULL,
        fingerprint text NOT NULL,
        referenced_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT drift_probe_pkey PRIMARY KEY (version_id, position),
        CONSTRAINT drift_probe_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE embedline.drift_probe IS 'Texts of Embedline''s own with the vectors that the model of a version gave'",
    "COMMENT ON COLUMN embedline.drift_probe.fingerprint IS 'Fingerprint of the model when it gave the vector'",
    """
    CREATE TABLE embedline.quality_check (
        check_id bigint GENERATED ALWAYS AS IDENTITY,
        pipeline_id bigint NOT NULL,
        version_id bigint NOT NULL,
        kind text NOT NULL,
        measured_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        value double precision,
        low double precision,
        high double precision,
        baseline double precision,
        query_count integer NOT NULL DEFAULT 0,
        is_poor boolean NOT NULL DEFAULT false,
        error text,
        seconds real NOT NULL,
        CONSTRAINT quality_check_pkey PRIMARY KEY (check_id),
        CONSTRAINT quality_check_kind_check CHECK (kind IN ('canary', 'reach', 'fidelity', 'drift', 'lag')),
        CONSTRAINT quality_check_value_check CHECK ((value IS NULL) = (error IS NOT NULL)),
        CONSTRAINT quality_check_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline ON DELETE CASCADE,
        CONSTRAINT quality_check_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version ON DELETE CASCADE
    )
    """,
    "CREATE INDEX quality_check_last_idx ON embedline.quality_check (pipeline_id, kind, measured_at DESC)",
    "CREATE INDEX quality_check_poor_idx ON embedline.quality_check (pipeline_id, kind, measured_at DESC) WHERE is_poor",
    "CREATE INDEX quality_check_version_id_idx ON embedline.quality_check (version_id)",
    "COMMENT ON TABLE embedline.quality_check IS 'The series of measurements; view embedline.quality shows it by name'",
    "COMMENT ON COLUMN embedline.quality_check.kind IS 'canary: recall@10 of labelled queries; reach: recall@10 of the index for made-up queries; fidelity: the same for real ones; drift: lowest cosine of probe texts to their first vectors; lag: seconds from commit to write'",
    "COMMENT ON COLUMN embedline.quality_check.low IS 'Interval of 95 % around the value, to compare with the baseline'",
    "COMMENT ON COLUMN embedline.quality_check.is_poor IS 'True if it raises an alert'",
    "COMMENT ON COLUMN embedline.quality_check.error IS 'Why nothing could be measured'",
    "COMMENT ON COLUMN embedline.quality_check.seconds IS 'What the measurement took; the next waits for 100 times as long at least'",
    """
    CREATE TABLE embedline.quality_baseline (
        pipeline_id bigint NOT NULL,
        kind text NOT NULL,
        value double precision NOT NULL,
        set_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        accepted_by name,
        CONSTRAINT quality_baseline_pkey PRIMARY KEY (pipeline_id, kind),
        CONSTRAINT quality_baseline_kind_check CHECK (kind IN ('canary', 'reach', 'fidelity')),
        CONSTRAINT quality_baseline_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE embedline.quality_baseline IS 'What a pipeline''s measurements are compared with'",
    "COMMENT ON COLUMN embedline.quality_baseline.accepted_by IS 'Who called accept_quality; NULL: the first measurement'",
    """
    CREATE TABLE embedline.quality_state (
        pipeline_id bigint NOT NULL,
        chunk_ids bigint[] NOT NULL,
        CONSTRAINT quality_state_pkey PRIMARY KEY (pipeline_id),
        CONSTRAINT quality_state_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline ON DELETE CASCADE
    )
    """,
    "COMMENT ON TABLE embedline.quality_state IS 'What the last check found, to tell how much has changed since'",
    "COMMENT ON COLUMN embedline.quality_state.chunk_ids IS 'Random chunks: the share that is gone is about the share of changed rows'",
)

DOWNGRADE = (
    "DROP VIEW IF EXISTS embedline.quality",
    "DROP TABLE embedline.canary, embedline.query_sample, embedline.drift_probe, embedline.quality_check,"
    " embedline.quality_baseline, embedline.quality_state",
    "ALTER TABLE embedline.pipeline DROP COLUMN query_sample_share, DROP COLUMN query_retention",
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
