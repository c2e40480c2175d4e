"""Create the schemas, roles and catalogue tables of Embedline.

What: schemas embedline (catalogue and API) and embedline_data (generated tables), three roles, the extensions.
Lock: none on any table of the user. How long: under a second. Undo: `alembic downgrade base` drops every pipeline
and all of the above, and leaves the user's tables as they were.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

UPGRADE = (
    # Extensions that this installation adds are noted, so that the downgrade takes only these away again.
    """
    CREATE TABLE embedline.setting (
        name text CONSTRAINT setting_pkey PRIMARY KEY,
        value text NOT NULL
    )
    """,
    """
    DO $do$
    DECLARE
        extension_name text;
    BEGIN
        FOREACH extension_name IN ARRAY ARRAY['plpython3u', 'vector'] LOOP
            IF NOT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = extension_name) THEN
                INSERT INTO embedline.setting (name, value) VALUES ('created_extension_' || extension_name, 'true');
                IF extension_name = 'vector' THEN
                    EXECUTE 'CREATE EXTENSION vector SCHEMA public';
                ELSE
                    EXECUTE format('CREATE EXTENSION %I', extension_name);
                END IF;
            END IF;
        END LOOP;
        -- Where the server runs pg_cron for this very database, the workers can be scheduled at once.
        IF current_setting('cron.database_name', true) = current_database()
            AND EXISTS (SELECT FROM pg_catalog.pg_available_extensions WHERE name = 'pg_cron' AND installed_version IS NULL)
        THEN
            INSERT INTO embedline.setting (name, value) VALUES ('created_extension_pg_cron', 'true');
            CREATE EXTENSION pg_cron;
        END IF;
    END
    $do$
    """,
    """
    DO $do$
    DECLARE
        role_name text;
    BEGIN
        FOREACH role_name IN ARRAY ARRAY['embedline_admin', 'embedline_worker', 'embedline_reader'] LOOP
            -- Roles belong to the whole server: another database may have created them.
            IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role_name) THEN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role_name);
            END IF;
        END LOOP;
    END
    $do$
    """,
    "CREATE SCHEMA embedline_data",
    "COMMENT ON SCHEMA embedline IS 'Embedline: functions, catalogue and status'",
    "COMMENT ON SCHEMA embedline_data IS 'Embedline: generated tables and functions, one set a pipeline; not a public interface'",
    """
    CREATE TABLE embedline.model (
        model_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT model_pkey PRIMARY KEY,
        name text NOT NULL CONSTRAINT model_name_key UNIQUE,
        provider text NOT NULL CONSTRAINT model_provider_check CHECK (provider IN ('sentence-transformers', 'openai')),
        model text NOT NULL,
        revision text,
        dimensions integer NOT NULL CONSTRAINT model_dimensions_check CHECK (dimensions BETWEEN 1 AND 16000),
        max_tokens integer CONSTRAINT model_max_tokens_check CHECK (max_tokens > 0),
        tokenizer text,
        base_url text,
        api_key_env text,
        document_prefix text NOT NULL DEFAULT '',
        query_prefix text NOT NULL DEFAULT '',
        max_batch_items integer NOT NULL DEFAULT 2048 CONSTRAINT model_max_batch_items_check CHECK (max_batch_items > 0),
        max_batch_tokens integer NOT NULL DEFAULT 300000 CONSTRAINT model_max_batch_tokens_check CHECK (max_batch_tokens > 0),
        concurrency integer NOT NULL DEFAULT 8 CONSTRAINT model_concurrency_check CHECK (concurrency BETWEEN 1 AND 256),
        timeout_seconds double precision NOT NULL DEFAULT 60 CONSTRAINT model_timeout_seconds_check CHECK (timeout_seconds > 0),
        options jsonb NOT NULL DEFAULT '{}',
        fingerprint text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "COMMENT ON TABLE embedline.model IS 'Embedding models that pipelines may use; see embedline.create_model'",
    "COMMENT ON COLUMN embedline.model.max_tokens IS 'Longest text in the model''s own tokens, special tokens taken off; NULL: no known limit'",
    "COMMENT ON COLUMN embedline.model.tokenizer IS 'The model''s tokenizer.json without truncation and padding: chunks are measured with it; NULL: estimated'",
    "COMMENT ON COLUMN embedline.model.api_key_env IS 'Name of the server''s environment variable with the key; the key itself is stored nowhere'",
    "COMMENT ON COLUMN embedline.model.fingerprint IS 'Hash of what decides the vectors: weights, backend, precision, dimensions'",
    """
    CREATE TABLE embedline.pipeline (
        pipeline_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pipeline_pkey PRIMARY KEY,
        name text NOT NULL CONSTRAINT pipeline_name_key UNIQUE,
        source regclass NOT NULL,
        content_expression text NOT NULL,
        filter_expression text,
        expression_search_path text NOT NULL,
        key_attributes smallint[] NOT NULL,
        input_attributes smallint[] NOT NULL,
        key_columns text[] NOT NULL,
        key_types text[] NOT NULL,
        view_columns jsonb NOT NULL,
        routing_view regclass,
        chunking text NOT NULL CONSTRAINT pipeline_chunking_check CHECK (chunking IN ('recursive', 'none')),
        chunk_tokens integer CONSTRAINT pipeline_chunk_tokens_check CHECK (chunk_tokens > 0),
        chunk_overlap integer NOT NULL DEFAULT 0 CONSTRAINT pipeline_chunk_overlap_check CHECK (chunk_overlap >= 0),
        capture text NOT NULL CONSTRAINT pipeline_capture_check CHECK (capture IN ('statement', 'row')),
        state text NOT NULL DEFAULT 'active' CONSTRAINT pipeline_state_check CHECK (state IN ('active', 'paused')),
        serving_version_id bigint,
        created_by text NOT NULL DEFAULT session_user,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "COMMENT ON TABLE embedline.pipeline IS 'One row for each watched source table; see embedline.create_pipeline'",
    "COMMENT ON COLUMN embedline.pipeline.key_attributes IS 'Attribute numbers of the source''s key; they survive RENAME COLUMN'",
    "COMMENT ON COLUMN embedline.pipeline.input_attributes IS 'Attribute numbers of the columns that content and filter read'",
    "COMMENT ON COLUMN embedline.pipeline.key_columns IS 'Names of the key columns in the generated tables'",
    "COMMENT ON COLUMN embedline.pipeline.capture IS "
    "'statement: transition-table triggers; row: row triggers (partitioned sources and logical-replication subscribers)'",
    "COMMENT ON COLUMN embedline.pipeline.state IS "
    "'active: workers embed; paused: changes are captured and wait (pause_pipeline, resume_pipeline)'",
    """
    CREATE TABLE embedline.version (
        version_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT version_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL CONSTRAINT version_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        number integer NOT NULL,
        model_id bigint NOT NULL CONSTRAINT version_model_id_fkey REFERENCES embedline.model,
        dimensions integer NOT NULL,
        column_type text NOT NULL CONSTRAINT version_column_type_check CHECK (column_type IN ('vector', 'halfvec')),
        distance text NOT NULL CONSTRAINT version_distance_check CHECK (distance IN ('cosine', 'inner_product', 'l2')),
        index_method text NOT NULL CONSTRAINT version_index_method_check CHECK (index_method IN ('hnsw', 'none')),
        index_options jsonb NOT NULL DEFAULT '{}',
        state text NOT NULL DEFAULT 'backfilling' CONSTRAINT version_state_check CHECK (state IN ('backfilling', 'complete')),
        fingerprint text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        completed_at timestamptz,
        CONSTRAINT version_pipeline_id_number_key UNIQUE (pipeline_id, number)
    )
    """,
    "COMMENT ON TABLE embedline.version IS 'One row for each embedding recipe of a pipeline; its vectors are in embedline_data.<pipeline>_v<number>'",
    "COMMENT ON COLUMN embedline.version.state IS "
    "'backfilling: ranges of the source are still open; complete: every row was counted, the index may be built'",
    """
    ALTER TABLE embedline.pipeline ADD CONSTRAINT pipeline_serving_version_id_fkey
        FOREIGN KEY (serving_version_id) REFERENCES embedline.version ON DELETE SET NULL
    """,
    """
    CREATE TABLE embedline.backfill_range (
        range_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT backfill_range_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL
            CONSTRAINT backfill_range_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        relation oid NOT NULL,
        file_node oid NOT NULL,
        next_tid tid NOT NULL,
        end_tid tid NOT NULL,
        done boolean NOT NULL DEFAULT false,
        claimed_by integer,
        crash_count smallint NOT NULL DEFAULT 0
    ) WITH (fillfactor = 70)
    """,
    """
    CREATE INDEX backfill_range_open_idx ON embedline.backfill_range (pipeline_id, range_id) WHERE NOT done
    """,
    "COMMENT ON TABLE embedline.backfill_range IS 'Block ranges of a source that were there before its triggers; next_tid is how far each has come'",
    "COMMENT ON COLUMN embedline.backfill_range.file_node IS 'relfilenode when the ranges were made: a table rewrite moves rows, so it starts them anew'",
    """
    CREATE TABLE embedline.dead_letter (
        dead_letter_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT dead_letter_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL
            CONSTRAINT dead_letter_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        key jsonb NOT NULL,
        stage text NOT NULL CONSTRAINT dead_letter_stage_check
            CHECK (stage IN ('claim', 'read', 'validate', 'chunk', 'embed', 'write')),
        error_code text NOT NULL,
        message text NOT NULL,
        content_hash bytea,
        attempts integer NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT dead_letter_pipeline_id_key_key UNIQUE (pipeline_id, key)
    )
    """,
    "COMMENT ON TABLE embedline.dead_letter IS 'Source rows that could not be embedded, with the reason; a later change of the row tries it again'",
    """
    CREATE TABLE embedline.pipeline_health (
        pipeline_id bigint CONSTRAINT pipeline_health_pkey PRIMARY KEY
            CONSTRAINT pipeline_health_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        last_error text,
        last_error_at timestamptz
    ) WITH (fillfactor = 50)
    """,
    """
    CREATE TABLE embedline.circuit (
        model_id bigint CONSTRAINT circuit_pkey PRIMARY KEY
            CONSTRAINT circuit_model_id_fkey REFERENCES embedline.model ON DELETE CASCADE,
        failure_count integer NOT NULL,
        open_until timestamptz NOT NULL,
        last_error text NOT NULL
    )
    """,
    "COMMENT ON TABLE embedline.circuit IS 'Models whose provider failed as a whole; they are left alone until open_until'",
    "CREATE SEQUENCE embedline.worker_id_seq AS integer",
    """
    CREATE TABLE embedline.worker (
        worker_id integer CONSTRAINT worker_pkey PRIMARY KEY,
        slot integer,
        pid integer NOT NULL,
        stop_requested boolean NOT NULL DEFAULT false,
        started_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "COMMENT ON TABLE embedline.worker IS 'Resident workers; one is alive exactly as long as its session advisory lock (class 1164797804, worker_id) is held'",
)

DOWNGRADE = (
    # Objects of the pipelines that live outside our schemas: triggers on sources and routing views.
    """
    DO $do$
    DECLARE
        trigger_row record;
        view_row record;
    BEGIN
        PERFORM set_config('lock_timeout', '5s', true);
        FOR trigger_row IN
            SELECT t.tgname, t.tgrelid::regclass AS source
            FROM pg_catalog.pg_trigger AS t
            JOIN pg_catalog.pg_proc AS p ON p.oid = t.tgfoid
            JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
            WHERE n.nspname = 'embedline_data' AND t.tgparentid = 0
        LOOP
            EXECUTE format('DROP TRIGGER %I ON %s', trigger_row.tgname, trigger_row.source);
        END LOOP;
        FOR view_row IN
            SELECT p.routing_view::oid::regclass AS routing_view FROM embedline.pipeline AS p
            JOIN pg_catalog.pg_class AS c ON c.oid = p.routing_view
        LOOP
            EXECUTE format('DROP VIEW %s', view_row.routing_view);
        END LOOP;
    END
    $do$
    """,
    """
    DO $do$
    DECLARE
        others boolean;
    BEGIN
        IF to_regclass('cron.job') IS NOT NULL THEN
            EXECUTE 'SELECT cron.unschedule(jobid) FROM cron.job'
                ' WHERE database = current_database() AND jobname LIKE ''embedline %''';
            EXECUTE 'SELECT EXISTS (SELECT FROM cron.job)' INTO others;
            IF NOT others AND EXISTS (SELECT FROM embedline.setting WHERE name = 'created_extension_pg_cron') THEN
                DROP EXTENSION pg_cron;
            END IF;
        END IF;
    END
    $do$
    """,
    "DROP EVENT TRIGGER IF EXISTS embedline_follow_source",
    "DROP FUNCTION IF EXISTS public.embed_pending(integer, text)",
    # Replayed functions go with their schema; env.py drops schema embedline itself once the version row is gone.
    "DROP SCHEMA embedline_data CASCADE",
    """
    DO $do$
    DECLARE
        doomed record;
    BEGIN
        FOR doomed IN
            SELECT CASE p.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END AS kind, p.oid::regprocedure AS signature
            FROM pg_catalog.pg_proc AS p
            WHERE p.pronamespace = 'embedline'::regnamespace
        LOOP
            EXECUTE format('DROP %s %s CASCADE', doomed.kind, doomed.signature);
        END LOOP;
    END
    $do$
    """,
    "DROP TABLE embedline.worker, embedline.circuit, embedline.pipeline_health, embedline.dead_letter, embedline.backfill_range, "
    "embedline.version, embedline.pipeline, embedline.model CASCADE",
    "DROP SEQUENCE embedline.worker_id_seq",
    """
    DO $do$
    DECLARE
        extension_name text;
    BEGIN
        FOREACH extension_name IN ARRAY ARRAY['vector', 'plpython3u'] LOOP
            IF EXISTS (SELECT FROM embedline.setting AS s WHERE s.name = 'created_extension_' || extension_name) THEN
                BEGIN
                    EXECUTE format('DROP EXTENSION %I', extension_name);
                EXCEPTION WHEN dependent_objects_still_exist THEN
                    RAISE NOTICE 'extension % stays: objects of yours depend on it', extension_name;
                END;
            END IF;
        END LOOP;
    END
    $do$
    """,
    "DROP TABLE embedline.setting",
    """
    DO $do$
    DECLARE
        role_name text;
    BEGIN
        FOREACH role_name IN ARRAY ARRAY['embedline_admin', 'embedline_worker', 'embedline_reader'] LOOP
            BEGIN
                EXECUTE format('REVOKE ALL ON SCHEMA embedline FROM %I', role_name);
                EXECUTE format('DROP ROLE IF EXISTS %I', role_name);
            EXCEPTION WHEN dependent_objects_still_exist THEN
                RAISE NOTICE 'role % stays: another database or an object of yours uses it', role_name;
            END;
        END LOOP;
    END
    $do$
    """,
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
