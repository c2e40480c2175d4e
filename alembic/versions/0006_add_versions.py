"""Let a pipeline have several versions: chunk sets, the queue of versions that fill, gates, cutovers, shadow indexes, traffic.

What: tables chunk_set, version_queue, version_dead_letter, evaluation, cutover, precision_index, traffic, traffic_tenant,
shadow_read; chunking moves from embedline.pipeline to chunk_set. Lock: ACCESS EXCLUSIVE on embedline.pipeline and
embedline.version for an instant, none on any table of the user. How long: under a second. Undo: `alembic downgrade 0005`, which
refuses while a pipeline has more than one version, or chunks in a table of a later version.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UPGRADE = (
    """
    CREATE TABLE embedline.chunk_set (
        chunk_set_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT chunk_set_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL CONSTRAINT chunk_set_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        number integer NOT NULL CONSTRAINT chunk_set_number_check CHECK (number > 0),
        chunking text NOT NULL CONSTRAINT chunk_set_chunking_check
            CHECK (chunking IN ('recursive', 'sentences', 'markdown', 'fixed', 'semantic', 'none')),
        chunk_tokens integer CONSTRAINT chunk_set_chunk_tokens_check CHECK (chunk_tokens > 0),
        chunk_overlap integer NOT NULL DEFAULT 0 CONSTRAINT chunk_set_chunk_overlap_check CHECK (chunk_overlap >= 0),
        chunking_options jsonb NOT NULL DEFAULT '{}',
        tokenizer text,
        CONSTRAINT chunk_set_pipeline_id_number_key UNIQUE (pipeline_id, number)
    )
    """,
    "COMMENT ON TABLE embedline.chunk_set IS "
    "'One way of cutting a pipeline''s contents, with a table of its own: embedline_data.<pipeline>_chunk, later ones _chunk_<number>'",
    "COMMENT ON COLUMN embedline.chunk_set.chunking_options IS 'Options of the chunking method, such as {\"percentile\": 95} of semantic'",
    "COMMENT ON COLUMN embedline.chunk_set.tokenizer IS 'The tokenizer.json that chunk_tokens counts with, of the model the set was made for; NULL: estimated'",
    """
    INSERT INTO embedline.chunk_set (pipeline_id, number, chunking, chunk_tokens, chunk_overlap, chunking_options, tokenizer)
    SELECT p.pipeline_id, 1, p.chunking, p.chunk_tokens, p.chunk_overlap, p.chunking_options, m.tokenizer
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    JOIN embedline.model AS m ON m.model_id = v.model_id
    """,
    """
    ALTER TABLE embedline.version
        ADD COLUMN chunk_set integer NOT NULL DEFAULT 1,
        ADD COLUMN view regclass,
        ADD COLUMN backfill_order text NOT NULL DEFAULT 'oldest_first'
            CONSTRAINT version_backfill_order_check CHECK (backfill_order IN ('oldest_first', 'newest_first')),
        ADD COLUMN backfill_rate integer CONSTRAINT version_backfill_rate_check CHECK (backfill_rate > 0),
        ADD COLUMN backfill_due_at timestamptz NOT NULL DEFAULT now(),
        ADD COLUMN search_precision text,
        ADD COLUMN last_error text,
        ADD CONSTRAINT version_chunk_set_fkey FOREIGN KEY (pipeline_id, chunk_set)
            REFERENCES embedline.chunk_set (pipeline_id, number) DEFERRABLE INITIALLY DEFERRED
    """,
    "COMMENT ON COLUMN embedline.version.view IS 'The view over this version alone; the routing view shows the serving one'",
    "COMMENT ON COLUMN embedline.version.backfill_rate IS 'Chunks a second that its backfill takes at most, over all workers; NULL: no limit'",
    "COMMENT ON COLUMN embedline.version.backfill_due_at IS 'When the rate allows the next chunks'",
    "COMMENT ON COLUMN embedline.version.search_precision IS 'Shadow index that search uses; NULL: the index of the column itself'",
    """
    ALTER TABLE embedline.pipeline
        ADD COLUMN generation integer NOT NULL DEFAULT 1,
        ADD COLUMN recipe integer,
        ADD COLUMN serving_function oid,
        ADD COLUMN view_attributes jsonb NOT NULL DEFAULT '{}'
    """,
    """
    UPDATE embedline.pipeline AS p SET recipe = ('x' || left(v.fingerprint, 8))::bit(32)::integer
    FROM embedline.version AS v WHERE v.version_id = p.serving_version_id
    """,
    "ALTER TABLE embedline.pipeline DROP COLUMN chunking, DROP COLUMN chunk_tokens, DROP COLUMN chunk_overlap, DROP COLUMN chunking_options",
    "COMMENT ON COLUMN embedline.pipeline.generation IS 'Counts changes of the versions and the chunking: a worker that began before one writes nothing after it'",
    "COMMENT ON COLUMN embedline.pipeline.recipe IS 'Stamp of the documents that were cut as all chunk sets ask for; others are looked at again'",
    "COMMENT ON COLUMN embedline.pipeline.view_attributes IS 'Attribute numbers of the source''s columns, by the names that the routing view gives them'",
    "COMMENT ON COLUMN embedline.pipeline.serving_function IS 'Function whose body names the serving version: read past the snapshot, as the view''s definition is'",
    """
    CREATE TABLE embedline.version_queue (
        queue_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT version_queue_pkey PRIMARY KEY,
        version_id bigint NOT NULL CONSTRAINT version_queue_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        chunk_ids bigint[],
        first_id bigint,
        end_id bigint,
        attempts smallint NOT NULL DEFAULT 0,
        crash_count smallint NOT NULL DEFAULT 0,
        of_backfill boolean NOT NULL DEFAULT false,
        claimed_by integer,
        enqueued_at timestamptz NOT NULL DEFAULT now(),
        not_before timestamptz NOT NULL DEFAULT now(),
        last_error text,
        CONSTRAINT version_queue_work_check CHECK ((chunk_ids IS NULL) = (first_id IS NOT NULL AND end_id IS NOT NULL))
    ) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
        autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 2000)
    """,
    "CREATE INDEX version_queue_version_id_not_before_idx ON embedline.version_queue (version_id, not_before, queue_id)",
    "COMMENT ON TABLE embedline.version_queue IS "
    "'Chunks that a version has still to embed: new ones as lists, its backfill as ranges of which only what is missing is done'",
    """
    CREATE TABLE embedline.version_dead_letter (
        version_id bigint NOT NULL CONSTRAINT version_dead_letter_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        chunk_id bigint NOT NULL,
        key jsonb,
        stage text NOT NULL,
        error_code text NOT NULL,
        message text NOT NULL,
        attempts integer NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        accepted_by text,
        CONSTRAINT version_dead_letter_pkey PRIMARY KEY (version_id, chunk_id)
    )
    """,
    "COMMENT ON TABLE embedline.version_dead_letter IS 'Chunks that a version beside the serving one could not embed, with the reason'",
    "COMMENT ON COLUMN embedline.version_dead_letter.accepted_by IS 'Who said that the version may go without the chunk (accept_dead_letters); NULL: nobody'",
    """
    CREATE TABLE embedline.evaluation (
        evaluation_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT evaluation_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL CONSTRAINT evaluation_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        version_id bigint NOT NULL CONSTRAINT evaluation_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        baseline_number integer,
        kind text NOT NULL CONSTRAINT evaluation_kind_check CHECK (kind IN ('gate', 'preview')),
        verdict text NOT NULL CONSTRAINT evaluation_verdict_check CHECK (verdict IN ('pass', 'fail', 'inconclusive')),
        fidelity_verdict text NOT NULL CONSTRAINT evaluation_fidelity_verdict_check
            CHECK (fidelity_verdict IN ('pass', 'fail', 'inconclusive')),
        quality_verdict text NOT NULL CONSTRAINT evaluation_quality_verdict_check
            CHECK (quality_verdict IN ('pass', 'fail', 'inconclusive')),
        query_source text NOT NULL CONSTRAINT evaluation_query_source_check
            CHECK (query_source IN ('canary', 'known_item')),
        query_count integer NOT NULL,
        k integer NOT NULL,
        margin double precision NOT NULL,
        seed bigint NOT NULL,
        fingerprint text NOT NULL,
        evidence jsonb NOT NULL,
        evaluated_by text NOT NULL DEFAULT session_user,
        evaluated_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "CREATE INDEX evaluation_version_id_evaluated_at_idx ON embedline.evaluation (version_id, evaluated_at)",
    "COMMENT ON TABLE embedline.evaluation IS 'Gates: what embedline.evaluate measured of a version, against the serving one'",
    "COMMENT ON COLUMN embedline.evaluation.verdict IS 'pass: fidelity and quality pass; fail: one fails; inconclusive: more queries are needed'",
    "COMMENT ON COLUMN embedline.evaluation.fingerprint IS 'The version''s fingerprint then; a gate of another recipe counts for nothing'",
    """
    CREATE TABLE embedline.cutover (
        cutover_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT cutover_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL CONSTRAINT cutover_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        kind text NOT NULL CONSTRAINT cutover_kind_check CHECK (kind IN ('cutover', 'rollback')),
        from_version_id bigint NOT NULL,
        to_version_id bigint NOT NULL,
        from_number integer NOT NULL,
        to_number integer NOT NULL,
        evaluation_id bigint CONSTRAINT cutover_evaluation_id_fkey REFERENCES embedline.evaluation ON DELETE SET NULL,
        override_reason text,
        swap_seconds double precision,
        performed_by text NOT NULL DEFAULT session_user,
        performed_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "CREATE INDEX cutover_pipeline_id_idx ON embedline.cutover (pipeline_id, cutover_id)",
    "COMMENT ON TABLE embedline.cutover IS 'Which version came to serve when, by whom, on what evidence'",
    "COMMENT ON COLUMN embedline.cutover.from_version_id IS 'Versions may be gone, and a later one may have the number of one that is'",
    "COMMENT ON COLUMN embedline.cutover.override_reason IS 'Why it was done without a passing gate'",
    """
    CREATE TABLE embedline.precision_index (
        precision_index_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT precision_index_pkey PRIMARY KEY,
        version_id bigint NOT NULL CONSTRAINT precision_index_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        name text NOT NULL,
        kind text NOT NULL CONSTRAINT precision_index_kind_check CHECK (kind IN ('halfvec', 'binary', 'prefix')),
        dimensions integer NOT NULL,
        oversampling real NOT NULL DEFAULT 4 CONSTRAINT precision_index_oversampling_check CHECK (oversampling BETWEEN 1 AND 100),
        CONSTRAINT precision_index_version_id_name_key UNIQUE (version_id, name)
    )
    """,
    "COMMENT ON TABLE embedline.precision_index IS 'Shadow indexes: a version''s vectors in less precision, reranked by the vectors themselves'",
    """
    CREATE TABLE embedline.traffic (
        pipeline_id bigint CONSTRAINT traffic_pkey PRIMARY KEY
            CONSTRAINT traffic_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        version_id bigint NOT NULL CONSTRAINT traffic_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        share double precision NOT NULL CONSTRAINT traffic_share_check CHECK (share BETWEEN 0 AND 1),
        shadow_share double precision NOT NULL CONSTRAINT traffic_shadow_share_check CHECK (shadow_share BETWEEN 0 AND 1)
    )
    """,
    "COMMENT ON TABLE embedline.traffic IS 'What share of search calls another version serves, or answers in the shadow, before its cutover'",
    """
    CREATE TABLE embedline.traffic_tenant (
        pipeline_id bigint CONSTRAINT traffic_tenant_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        tenant text NOT NULL,
        version_id bigint NOT NULL CONSTRAINT traffic_tenant_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        CONSTRAINT traffic_tenant_pkey PRIMARY KEY (pipeline_id, tenant)
    )
    """,
    "COMMENT ON TABLE embedline.traffic_tenant IS 'Tenants that search has cut over, or kept back, by themselves'",
    """
    CREATE TABLE embedline.shadow_read (
        shadow_read_id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT shadow_read_pkey PRIMARY KEY,
        pipeline_id bigint NOT NULL CONSTRAINT shadow_read_pipeline_id_fkey REFERENCES embedline.pipeline ON DELETE CASCADE,
        version_id bigint NOT NULL CONSTRAINT shadow_read_version_id_fkey REFERENCES embedline.version ON DELETE CASCADE,
        k integer NOT NULL,
        overlap double precision NOT NULL,
        serving_seconds double precision NOT NULL,
        shadow_seconds double precision NOT NULL,
        read_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "CREATE INDEX shadow_read_version_id_read_at_idx ON embedline.shadow_read (version_id, read_at)",
    "COMMENT ON TABLE embedline.shadow_read IS 'Search calls that a second version answered, too: nothing of the query is kept'",
    "COMMENT ON COLUMN embedline.shadow_read.overlap IS 'Share of the k results that both have'",
    # The replay makes these anew with other columns or parameters; views, generated functions and view types follow it.
    "DROP FUNCTION IF EXISTS embedline.search(text, text, integer, boolean, integer)",
    "DROP FUNCTION IF EXISTS embedline.index_statement(text)",
    "UPDATE embedline.pipeline SET code_version = 0",
)

DOWNGRADE = (
    """
    DO $do$
    DECLARE
        pipeline_name text;
    BEGIN
        SELECT p.name INTO pipeline_name FROM embedline.pipeline AS p JOIN embedline.version AS v USING (pipeline_id)
        GROUP BY p.name HAVING count(*) > 1 OR max(v.chunk_set) > 1 LIMIT 1;
        IF pipeline_name IS NOT NULL THEN
            RAISE EXCEPTION 'pipeline "%" has versions that an earlier release does not know', pipeline_name
                USING HINT = format('SELECT embedline.drop_embedding_version(%L, number) for all but the serving one, or '
                    'SELECT embedline.drop_pipeline(%L).', pipeline_name, pipeline_name);
        END IF;
    END
    $do$
    """,
    "DROP EVENT TRIGGER IF EXISTS embedline_build_settings",
    "DROP VIEW IF EXISTS embedline.versions",
    "DROP VIEW IF EXISTS embedline.status",
    # Views of one version, functions of the serving one, and the functions and views that name what goes.
    """
    DO $do$
    DECLARE
        doomed text;
    BEGIN
        PERFORM set_config('lock_timeout', '10s', true);
        FOR doomed IN
            SELECT format('DROP VIEW %s', v.view::oid::regclass) FROM embedline.version AS v JOIN pg_catalog.pg_class AS c ON c.oid = v.view
        LOOP
            EXECUTE doomed;
        END LOOP;
        FOR doomed IN
            SELECT format('DROP FUNCTION %s', f.oid::regprocedure) FROM embedline.pipeline AS p
            JOIN pg_catalog.pg_proc AS f ON f.oid = p.serving_function
        LOOP
            EXECUTE doomed;
        END LOOP;
        FOR doomed IN
            SELECT format('DROP %s %s', CASE f.prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END, f.oid::regprocedure)
            FROM pg_catalog.pg_proc AS f
            WHERE f.pronamespace = 'embedline'::regnamespace AND f.proname IN (
                'search', 'index_statement', 'add_embedding_version', 'configure_backfill', 'build_vector_index',
                'accept_dead_letters', 'requeue_version', 'evaluate', 'preview_version', 'cutover', 'rollback', 'drop_embedding_version',
                'add_precision_index', 'drop_precision_index', 'use_precision', 'set_traffic', 'set_tenant_version',
                'index_progress', '_index_plan', '_on_create_index', '_note_shadow_read', '_embed_chunks', '_version_counts')
        LOOP
            EXECUTE doomed;
        END LOOP;
    END
    $do$
    """,
    """
    ALTER TABLE embedline.pipeline
        ADD COLUMN chunking text CONSTRAINT pipeline_chunking_check
            CHECK (chunking IN ('recursive', 'sentences', 'markdown', 'fixed', 'semantic', 'none')),
        ADD COLUMN chunk_tokens integer CONSTRAINT pipeline_chunk_tokens_check CHECK (chunk_tokens > 0),
        ADD COLUMN chunk_overlap integer NOT NULL DEFAULT 0 CONSTRAINT pipeline_chunk_overlap_check CHECK (chunk_overlap >= 0),
        ADD COLUMN chunking_options jsonb NOT NULL DEFAULT '{}'
    """,
    """
    UPDATE embedline.pipeline AS p SET chunking = s.chunking, chunk_tokens = s.chunk_tokens, chunk_overlap = s.chunk_overlap,
        chunking_options = s.chunking_options
    FROM embedline.chunk_set AS s WHERE s.pipeline_id = p.pipeline_id
    """,
    "ALTER TABLE embedline.pipeline ALTER COLUMN chunking SET NOT NULL",
    "COMMENT ON COLUMN embedline.pipeline.chunking_options IS 'Options of the chunking method, such as {\"percentile\": 95} of semantic'",
    "ALTER TABLE embedline.pipeline DROP COLUMN generation, DROP COLUMN recipe, DROP COLUMN serving_function, DROP COLUMN view_attributes",
    """
    ALTER TABLE embedline.version DROP COLUMN chunk_set, DROP COLUMN view, DROP COLUMN backfill_order, DROP COLUMN backfill_rate,
        DROP COLUMN backfill_due_at, DROP COLUMN search_precision, DROP COLUMN last_error
    """,
    "DROP TABLE embedline.shadow_read, embedline.traffic_tenant, embedline.traffic, embedline.precision_index, "
    "embedline.cutover, embedline.evaluation, embedline.version_dead_letter, embedline.version_queue, embedline.chunk_set",
    "UPDATE embedline.pipeline SET code_version = 0",
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
