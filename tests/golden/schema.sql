CREATE SCHEMA embedline;

CREATE SCHEMA embedline_data;

CREATE SCHEMA embedline_expression;

CREATE SCHEMA embedline_search;

CREATE SCHEMA public;

CREATE TABLE embedline.alembic_version (
    version_num character varying(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);

CREATE VIEW embedline.alert (
    severity text,
    alert text,
    subject text,
    since timestamp with time zone,
    message text,
    remedy text
);

CREATE TABLE embedline.alert_state (
    alert text NOT NULL,
    subject text NOT NULL,
    since timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT alert_state_pkey PRIMARY KEY (alert, subject)
);

CREATE TABLE embedline.allowed_endpoint (
    scheme text NOT NULL,
    host text NOT NULL,
    port integer DEFAULT 0 NOT NULL,
    added_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT allowed_endpoint_host_check CHECK (((host = lower(host)) AND (host ~ '^([*][.])?[^][*/?#@\s]+$'::text))),
    CONSTRAINT allowed_endpoint_pkey PRIMARY KEY (scheme, host, port),
    CONSTRAINT allowed_endpoint_port_check CHECK (((port >= 0) AND (port <= 65535))),
    CONSTRAINT allowed_endpoint_scheme_check CHECK ((scheme = ANY (ARRAY['http'::text, 'https'::text])))
);

CREATE TABLE embedline.backfill_range (
    range_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    relation regclass NOT NULL,
    file_node oid NOT NULL,
    next_tid tid NOT NULL,
    end_tid tid NOT NULL,
    done boolean DEFAULT false NOT NULL,
    claimed_by integer,
    crash_count smallint DEFAULT 0 NOT NULL,
    keys text[],
    CONSTRAINT backfill_range_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT backfill_range_pkey PRIMARY KEY (range_id)
) WITH (fillfactor=70);

CREATE VIEW embedline.batch (
    pipeline text,
    version integer,
    kind text,
    rows integer,
    chunks integer,
    tokens bigint,
    claim numeric,
    read numeric,
    chunk numeric,
    embed numeric,
    write numeric,
    finished_at timestamp with time zone,
    embedded integer,
    retried integer,
    dead integer,
    requests integer,
    content_bytes bigint,
    failures jsonb,
    lag interval,
    worker_id integer,
    batch_id bigint
);

CREATE TABLE embedline.batch_hour (
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
    hour timestamp with time zone NOT NULL,
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
    CONSTRAINT batch_hour_pkey PRIMARY KEY (pipeline_id, version_id, hour)
);

CREATE TABLE embedline.batch_total (
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
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
    CONSTRAINT batch_total_pkey PRIMARY KEY (pipeline_id, version_id)
);

CREATE VIEW embedline.budget (
    scope text,
    name text,
    period text,
    unit text,
    amount numeric,
    spent numeric,
    reserved numeric,
    remaining numeric,
    starts_at timestamp with time zone,
    resets_at timestamp with time zone,
    state text
);

CREATE TABLE embedline.budget_stop (
    pipeline_id bigint NOT NULL,
    tokens bigint NOT NULL,
    stopped_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT budget_stop_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT budget_stop_pkey PRIMARY KEY (pipeline_id)
);

CREATE TABLE embedline.bulk_change (
    pipeline_id bigint NOT NULL,
    enqueued_at timestamp with time zone NOT NULL,
    CONSTRAINT bulk_change_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT bulk_change_pkey PRIMARY KEY (pipeline_id, enqueued_at)
);

CREATE TABLE embedline.bulk_rule (
    pipeline_id bigint NOT NULL,
    bulk_rows integer,
    starts_at time without time zone,
    ends_at time without time zone,
    CONSTRAINT bulk_rule_any_check CHECK (((bulk_rows IS NOT NULL) OR (starts_at IS NOT NULL))),
    CONSTRAINT bulk_rule_bulk_rows_check CHECK ((bulk_rows > 0)),
    CONSTRAINT bulk_rule_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT bulk_rule_pkey PRIMARY KEY (pipeline_id),
    CONSTRAINT bulk_rule_window_check CHECK (((starts_at IS NULL) = (ends_at IS NULL)))
);

CREATE TABLE embedline.canary (
    pipeline_id bigint NOT NULL,
    "position" integer NOT NULL,
    query text NOT NULL,
    grades jsonb NOT NULL,
    baseline_recall double precision,
    last_recall double precision,
    CONSTRAINT canary_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT canary_pkey PRIMARY KEY (pipeline_id, "position")
);

CREATE TABLE embedline.chunk_set (
    chunk_set_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    number integer NOT NULL,
    chunking text NOT NULL,
    chunk_tokens integer,
    chunk_overlap integer DEFAULT 0 NOT NULL,
    chunking_options jsonb DEFAULT '{}'::jsonb NOT NULL,
    tokenizer text,
    CONSTRAINT chunk_set_chunk_overlap_check CHECK ((chunk_overlap >= 0)),
    CONSTRAINT chunk_set_chunk_tokens_check CHECK ((chunk_tokens > 0)),
    CONSTRAINT chunk_set_chunking_check CHECK ((chunking = ANY (ARRAY['recursive'::text, 'sentences'::text, 'markdown'::text, 'fixed'::text, 'semantic'::text, 'none'::text, 'tiles'::text, 'windows'::text, 'silence'::text]))) NOT VALID,
    CONSTRAINT chunk_set_number_check CHECK ((number > 0)),
    CONSTRAINT chunk_set_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT chunk_set_pipeline_id_number_key UNIQUE (pipeline_id, number),
    CONSTRAINT chunk_set_pkey PRIMARY KEY (chunk_set_id)
);

CREATE TABLE embedline.circuit (
    model_id bigint NOT NULL,
    failure_count integer NOT NULL,
    open_until timestamp with time zone NOT NULL,
    last_error text NOT NULL,
    CONSTRAINT circuit_model_id_fkey FOREIGN KEY (model_id) REFERENCES embedline.model(model_id) ON DELETE CASCADE,
    CONSTRAINT circuit_pkey PRIMARY KEY (model_id)
);

CREATE TABLE embedline.cutover (
    cutover_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    kind text NOT NULL,
    from_version_id bigint NOT NULL,
    to_version_id bigint NOT NULL,
    from_number integer NOT NULL,
    to_number integer NOT NULL,
    evaluation_id bigint,
    override_reason text,
    swap_seconds double precision,
    performed_by text DEFAULT SESSION_USER NOT NULL,
    performed_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT cutover_evaluation_id_fkey FOREIGN KEY (evaluation_id) REFERENCES embedline.evaluation(evaluation_id) ON DELETE SET NULL,
    CONSTRAINT cutover_kind_check CHECK ((kind = ANY (ARRAY['cutover'::text, 'rollback'::text]))),
    CONSTRAINT cutover_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT cutover_pkey PRIMARY KEY (cutover_id)
);

CREATE TABLE embedline.dead_letter (
    dead_letter_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    key jsonb NOT NULL,
    stage text NOT NULL,
    error_code text NOT NULL,
    message text NOT NULL,
    content_hash bytea,
    attempts integer NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT dead_letter_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT dead_letter_pkey PRIMARY KEY (dead_letter_id),
    CONSTRAINT dead_letter_stage_check CHECK ((stage = ANY (ARRAY['claim'::text, 'read'::text, 'validate'::text, 'chunk'::text, 'embed'::text, 'write'::text])))
);

CREATE TABLE embedline.derived (
    derived_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    name text NOT NULL,
    pipeline_id bigint NOT NULL,
    events regclass NOT NULL,
    event_columns jsonb NOT NULL,
    subject_expression text NOT NULL,
    item_expression text NOT NULL,
    weight_expression text,
    at_expression text,
    expression_search_path text NOT NULL,
    subject_type text NOT NULL,
    item_type text NOT NULL,
    half_life interval,
    derived_view regclass,
    created_by name NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    swept_at timestamp with time zone,
    last_error text,
    last_error_at timestamp with time zone,
    CONSTRAINT derived_half_life_check CHECK ((((half_life > '00:00:00'::interval) AND (at_expression IS NOT NULL)) OR (half_life IS NULL))),
    CONSTRAINT derived_name_key UNIQUE (name),
    CONSTRAINT derived_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id),
    CONSTRAINT derived_pkey PRIMARY KEY (derived_id)
);

CREATE VIEW embedline.derived_status (
    name text,
    pipeline text,
    events regclass,
    view regclass,
    half_life interval,
    subjects bigint,
    waiting bigint,
    oldest_enqueued_at timestamp with time zone,
    last_error text,
    last_error_at timestamp with time zone
);

CREATE TABLE embedline.drift_probe (
    version_id bigint NOT NULL,
    "position" integer NOT NULL,
    probe text NOT NULL,
    reference real[] NOT NULL,
    fingerprint text NOT NULL,
    referenced_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT drift_probe_pkey PRIMARY KEY (version_id, "position"),
    CONSTRAINT drift_probe_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.evaluation (
    evaluation_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
    baseline_number integer,
    kind text NOT NULL,
    verdict text NOT NULL,
    fidelity_verdict text NOT NULL,
    quality_verdict text NOT NULL,
    query_source text NOT NULL,
    query_count integer NOT NULL,
    k integer NOT NULL,
    margin double precision NOT NULL,
    seed bigint NOT NULL,
    fingerprint text NOT NULL,
    evidence jsonb NOT NULL,
    evaluated_by text DEFAULT SESSION_USER NOT NULL,
    evaluated_at timestamp with time zone DEFAULT statement_timestamp() NOT NULL,
    baseline_version_id bigint,
    baseline_fingerprint text,
    CONSTRAINT evaluation_fidelity_verdict_check CHECK ((fidelity_verdict = ANY (ARRAY['pass'::text, 'fail'::text, 'inconclusive'::text]))),
    CONSTRAINT evaluation_kind_check CHECK ((kind = ANY (ARRAY['gate'::text, 'preview'::text, 'mode'::text]))),
    CONSTRAINT evaluation_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT evaluation_pkey PRIMARY KEY (evaluation_id),
    CONSTRAINT evaluation_quality_verdict_check CHECK ((quality_verdict = ANY (ARRAY['pass'::text, 'fail'::text, 'inconclusive'::text]))),
    CONSTRAINT evaluation_query_source_check CHECK ((query_source = ANY (ARRAY['canary'::text, 'known_item'::text]))),
    CONSTRAINT evaluation_verdict_check CHECK ((verdict = ANY (ARRAY['pass'::text, 'fail'::text, 'inconclusive'::text]))),
    CONSTRAINT evaluation_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.finished_batch (
    batch_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    finished_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
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
    CONSTRAINT finished_batch_kind_check CHECK ((kind = ANY (ARRAY['change'::text, 'backfill'::text, 'fill'::text]))),
    CONSTRAINT finished_batch_pkey PRIMARY KEY (batch_id)
) WITH (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=5000);

CREATE TABLE embedline.index_reach (
    version_id bigint NOT NULL,
    checked_to bigint DEFAULT 0 NOT NULL,
    pending_to bigint,
    pending_xact xid8,
    pending_writers text[],
    ef_search integer,
    wide_ef_search integer,
    far_distance double precision,
    recall_target real,
    recall real,
    measures jsonb,
    measured_at timestamp with time zone,
    measured_rows bigint,
    probes integer,
    wide_probes integer,
    index_node oid,
    built_rows bigint,
    built_probes integer,
    built_recall real,
    kept_recall real,
    CONSTRAINT index_reach_ef_search_check CHECK (((ef_search >= 1) AND (ef_search <= 1000))),
    CONSTRAINT index_reach_pkey PRIMARY KEY (version_id),
    CONSTRAINT index_reach_probes_check CHECK (((probes >= 1) AND (probes <= 32768))),
    CONSTRAINT index_reach_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE,
    CONSTRAINT index_reach_wide_ef_search_check CHECK (((wide_ef_search >= 1) AND (wide_ef_search <= 1000))),
    CONSTRAINT index_reach_wide_probes_check CHECK (((wide_probes >= 1) AND (wide_probes <= 32768)))
);

CREATE TABLE embedline.keyword_build (
    chunk_set_id bigint NOT NULL,
    built_to bigint DEFAULT 0 NOT NULL,
    build_to bigint NOT NULL,
    begun_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT keyword_build_chunk_set_id_fkey FOREIGN KEY (chunk_set_id) REFERENCES embedline.chunk_set(chunk_set_id) ON DELETE CASCADE,
    CONSTRAINT keyword_build_pkey PRIMARY KEY (chunk_set_id)
);

CREATE TABLE embedline.loan (
    version_id bigint NOT NULL,
    begun_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    CONSTRAINT loan_pkey PRIMARY KEY (version_id),
    CONSTRAINT loan_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.loan_taken (
    loan_taken_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    version_id bigint NOT NULL,
    lent_hash uuid NOT NULL,
    chunk_hash uuid NOT NULL,
    CONSTRAINT loan_taken_pkey PRIMARY KEY (loan_taken_id),
    CONSTRAINT loan_taken_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.loan(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.loan_vector (
    version_id bigint NOT NULL,
    content_hash uuid NOT NULL,
    vector bytea NOT NULL,
    CONSTRAINT loan_vector_pkey PRIMARY KEY (version_id, content_hash),
    CONSTRAINT loan_vector_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.loan(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.media_source (
    prefix text NOT NULL,
    CONSTRAINT media_source_pkey PRIMARY KEY (prefix),
    CONSTRAINT media_source_prefix_check CHECK (((prefix ~ '^(file:///|s3://[^/@]+/|https?://[^/@]+/).*'::text) AND ("right"(prefix, 1) = '/'::text) AND (prefix !~ '[[:space:]?#]|/[.][.]?/'::text)))
);

CREATE TABLE embedline.model (
    model_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    name text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    revision text,
    dimensions integer,
    max_tokens integer,
    tokenizer text,
    base_url text,
    api_key_env text,
    document_prefix text DEFAULT ''::text NOT NULL,
    query_prefix text DEFAULT ''::text NOT NULL,
    max_batch_items integer DEFAULT 2048 NOT NULL,
    max_batch_tokens integer DEFAULT 300000 NOT NULL,
    concurrency integer DEFAULT 8 NOT NULL,
    timeout_seconds double precision DEFAULT 60 NOT NULL,
    options jsonb DEFAULT '{}'::jsonb NOT NULL,
    fingerprint text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    price_per_million_tokens numeric,
    batch_items integer,
    batch_items_refused integer,
    batch_items_at timestamp with time zone,
    text_size_refused integer,
    learned jsonb DEFAULT '{}'::jsonb NOT NULL,
    probed_fingerprint text,
    task text DEFAULT 'embed'::text NOT NULL,
    modalities text[] DEFAULT '{text}'::text[] NOT NULL,
    CONSTRAINT model_batch_items_check CHECK ((batch_items > 0)),
    CONSTRAINT model_batch_items_refused_check CHECK ((batch_items_refused > batch_items)),
    CONSTRAINT model_concurrency_check CHECK (((concurrency >= 1) AND (concurrency <= 256))),
    CONSTRAINT model_dimensions_check CHECK (((dimensions >= 1) AND (dimensions <= 16000))),
    CONSTRAINT model_max_batch_items_check CHECK ((max_batch_items > 0)),
    CONSTRAINT model_max_batch_tokens_check CHECK ((max_batch_tokens > 0)),
    CONSTRAINT model_max_tokens_check CHECK ((max_tokens > 0)),
    CONSTRAINT model_name_key UNIQUE (name),
    CONSTRAINT model_pkey PRIMARY KEY (model_id),
    CONSTRAINT model_price_per_million_tokens_check CHECK ((price_per_million_tokens >= (0)::numeric)),
    CONSTRAINT model_task_check CHECK ((((task = 'embed'::text) AND (dimensions IS NOT NULL)) OR ((task = 'rerank'::text) AND (dimensions IS NULL)))),
    CONSTRAINT model_text_size_refused_check CHECK ((text_size_refused > 0)),
    CONSTRAINT model_timeout_seconds_check CHECK ((timeout_seconds > (0)::double precision))
);

CREATE TABLE embedline.model_rate (
    model_id bigint NOT NULL,
    tokens_per_second double precision NOT NULL,
    measured_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT model_rate_model_id_fkey FOREIGN KEY (model_id) REFERENCES embedline.model(model_id) ON DELETE CASCADE,
    CONSTRAINT model_rate_pkey PRIMARY KEY (model_id),
    CONSTRAINT model_rate_tokens_per_second_check CHECK ((tokens_per_second > (0)::double precision))
);

CREATE TABLE embedline.pipeline (
    pipeline_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    name text NOT NULL,
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
    capture text NOT NULL,
    state text DEFAULT 'active'::text NOT NULL,
    serving_version_id bigint,
    created_by text DEFAULT SESSION_USER NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    document_prefix_expression text,
    tenant_expression text,
    weight double precision DEFAULT 1 NOT NULL,
    code_version integer DEFAULT 1 NOT NULL,
    generation integer DEFAULT 1 NOT NULL,
    recipe integer,
    view_attributes jsonb DEFAULT '{}'::jsonb NOT NULL,
    source_columns jsonb DEFAULT '{}'::jsonb NOT NULL,
    attributes_of text,
    altered_at timestamp with time zone,
    source_name text,
    is_resting boolean DEFAULT false NOT NULL,
    input_columns jsonb DEFAULT '{}'::jsonb NOT NULL,
    query_sample_share double precision DEFAULT 0 NOT NULL,
    query_retention interval DEFAULT '7 days'::interval NOT NULL,
    keyword text,
    modality text DEFAULT 'text'::text NOT NULL,
    is_reference boolean DEFAULT false NOT NULL,
    CONSTRAINT pipeline_capture_check CHECK ((capture = ANY (ARRAY['statement'::text, 'row'::text]))),
    CONSTRAINT pipeline_modality_check CHECK ((modality = ANY (ARRAY['text'::text, 'image'::text, 'audio'::text]))),
    CONSTRAINT pipeline_name_key UNIQUE (name),
    CONSTRAINT pipeline_pkey PRIMARY KEY (pipeline_id),
    CONSTRAINT pipeline_query_sample_share_check CHECK (((query_sample_share >= (0)::double precision) AND (query_sample_share <= (1)::double precision))),
    CONSTRAINT pipeline_serving_version_id_fkey FOREIGN KEY (serving_version_id) REFERENCES embedline.version(version_id) ON DELETE SET NULL,
    CONSTRAINT pipeline_state_check CHECK ((state = ANY (ARRAY['active'::text, 'paused'::text]))),
    CONSTRAINT pipeline_weight_check CHECK (((weight > (0)::double precision) AND (weight < 'Infinity'::double precision)))
);

CREATE TABLE embedline.pipeline_health (
    pipeline_id bigint NOT NULL,
    last_error text,
    last_error_at timestamp with time zone,
    CONSTRAINT pipeline_health_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT pipeline_health_pkey PRIMARY KEY (pipeline_id)
) WITH (fillfactor=50);

CREATE TABLE embedline.precision_index (
    precision_index_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    version_id bigint NOT NULL,
    name text NOT NULL,
    kind text NOT NULL,
    dimensions integer NOT NULL,
    oversampling real DEFAULT 4 NOT NULL,
    CONSTRAINT precision_index_kind_check CHECK ((kind = ANY (ARRAY['halfvec'::text, 'binary'::text, 'prefix'::text]))),
    CONSTRAINT precision_index_oversampling_check CHECK (((oversampling >= (1)::double precision) AND (oversampling <= (100)::double precision))),
    CONSTRAINT precision_index_pkey PRIMARY KEY (precision_index_id),
    CONSTRAINT precision_index_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE,
    CONSTRAINT precision_index_version_id_name_key UNIQUE (version_id, name)
);

CREATE VIEW embedline.progress (
    pipeline text,
    version integer,
    task text,
    phase text,
    done bigint,
    total bigint,
    unit text,
    percent numeric,
    rate numeric,
    eta interval,
    tokens bigint,
    money numeric
);

CREATE TABLE embedline.provider_batch (
    batch_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
    model_id bigint NOT NULL,
    config jsonb NOT NULL,
    fingerprint text NOT NULL,
    token text DEFAULT (gen_random_uuid())::text NOT NULL,
    state text DEFAULT 'collecting'::text NOT NULL,
    provider_id text,
    outcome text,
    text_count integer DEFAULT 0 NOT NULL,
    row_count bigint DEFAULT 0 NOT NULL,
    byte_count bigint DEFAULT 0 NOT NULL,
    tokens bigint DEFAULT 0 NOT NULL,
    reservation_id bigint,
    attempts integer DEFAULT 0 NOT NULL,
    last_error text,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    touched_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    next_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    sent_at timestamp with time zone,
    ended_at timestamp with time zone,
    CONSTRAINT provider_batch_pkey PRIMARY KEY (batch_id),
    CONSTRAINT provider_batch_state_check CHECK ((state = ANY (ARRAY['collecting'::text, 'sending'::text, 'waiting'::text, 'done'::text])))
);

CREATE TABLE embedline.provider_batch_hold (
    hold_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    batch_id bigint NOT NULL,
    version_id bigint NOT NULL,
    of_version boolean NOT NULL,
    queue_ids bigint[] NOT NULL,
    CONSTRAINT provider_batch_hold_pkey PRIMARY KEY (hold_id),
    CONSTRAINT provider_batch_hold_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.provider_batch_text (
    version_id bigint NOT NULL,
    content_hash uuid NOT NULL,
    text_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    batch_id bigint NOT NULL,
    content text,
    tokens integer NOT NULL,
    state text DEFAULT 'pending'::text NOT NULL,
    tries smallint DEFAULT 0 NOT NULL,
    vector bytea,
    detail text,
    CONSTRAINT provider_batch_text_pkey PRIMARY KEY (version_id, content_hash),
    CONSTRAINT provider_batch_text_state_check CHECK ((state = ANY (ARRAY['pending'::text, 'answered'::text, 'refused'::text, 'unanswered'::text]))),
    CONSTRAINT provider_batch_text_text_id_key UNIQUE (text_id),
    CONSTRAINT provider_batch_text_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE VIEW embedline.quality (
    pipeline text,
    kind text,
    measured_at timestamp with time zone,
    value numeric,
    low numeric,
    high numeric,
    baseline numeric,
    verdict text,
    queries integer,
    version integer,
    error text
);

CREATE TABLE embedline.quality_baseline (
    pipeline_id bigint NOT NULL,
    kind text NOT NULL,
    value double precision NOT NULL,
    set_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    accepted_by name,
    CONSTRAINT quality_baseline_kind_check CHECK ((kind = ANY (ARRAY['canary'::text, 'reach'::text, 'fidelity'::text]))),
    CONSTRAINT quality_baseline_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT quality_baseline_pkey PRIMARY KEY (pipeline_id, kind)
);

CREATE TABLE embedline.quality_check (
    check_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
    kind text NOT NULL,
    measured_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    value double precision,
    low double precision,
    high double precision,
    baseline double precision,
    query_count integer DEFAULT 0 NOT NULL,
    is_poor boolean DEFAULT false NOT NULL,
    error text,
    seconds real NOT NULL,
    CONSTRAINT quality_check_kind_check CHECK ((kind = ANY (ARRAY['canary'::text, 'reach'::text, 'fidelity'::text, 'drift'::text, 'lag'::text]))),
    CONSTRAINT quality_check_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT quality_check_pkey PRIMARY KEY (check_id),
    CONSTRAINT quality_check_value_check CHECK (((value IS NULL) = (error IS NOT NULL))),
    CONSTRAINT quality_check_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.quality_state (
    pipeline_id bigint NOT NULL,
    chunk_ids bigint[] NOT NULL,
    CONSTRAINT quality_state_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT quality_state_pkey PRIMARY KEY (pipeline_id)
);

CREATE UNLOGGED TABLE embedline.query_sample (
    pipeline_id bigint NOT NULL,
    asked_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    query text NOT NULL
) WITH (vacuum_truncate=false);

CREATE TABLE embedline.rate_limit (
    model_id bigint NOT NULL,
    requests_per_minute integer,
    tokens_per_minute bigint,
    CONSTRAINT rate_limit_limit_check CHECK ((num_nonnulls(requests_per_minute, tokens_per_minute) >= 1)),
    CONSTRAINT rate_limit_model_id_fkey FOREIGN KEY (model_id) REFERENCES embedline.model(model_id) ON DELETE CASCADE,
    CONSTRAINT rate_limit_pkey PRIMARY KEY (model_id),
    CONSTRAINT rate_limit_requests_per_minute_check CHECK ((requests_per_minute > 0)),
    CONSTRAINT rate_limit_tokens_per_minute_check CHECK ((tokens_per_minute > 0))
);

CREATE TABLE embedline.remote_grant (
    pipeline_id bigint NOT NULL,
    role_name text NOT NULL,
    is_exclusive boolean NOT NULL,
    granted_by text NOT NULL,
    granted_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT remote_grant_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT remote_grant_pkey PRIMARY KEY (pipeline_id, role_name)
);

CREATE TABLE embedline.request_failure (
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
    class text NOT NULL,
    count bigint NOT NULL,
    CONSTRAINT request_failure_pkey PRIMARY KEY (pipeline_id, version_id, class)
);

CREATE TABLE embedline.reservation (
    reservation_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    model_id bigint NOT NULL,
    pipeline_id bigint NOT NULL,
    worker_id integer,
    reserved_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    settled_at timestamp with time zone,
    requests integer NOT NULL,
    tokens bigint NOT NULL,
    price numeric,
    is_batch boolean DEFAULT false NOT NULL,
    CONSTRAINT reservation_pkey PRIMARY KEY (reservation_id)
) WITH (fillfactor=70, autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=2000, autovacuum_analyze_scale_factor=0, autovacuum_analyze_threshold=2000);

CREATE TABLE embedline.setting (
    name text NOT NULL,
    value text NOT NULL,
    CONSTRAINT setting_pkey PRIMARY KEY (name)
);

CREATE TABLE embedline.shadow_read (
    shadow_read_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
    k integer NOT NULL,
    overlap double precision NOT NULL,
    serving_seconds double precision NOT NULL,
    shadow_seconds double precision NOT NULL,
    read_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT shadow_read_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT shadow_read_pkey PRIMARY KEY (shadow_read_id),
    CONSTRAINT shadow_read_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE UNLOGGED TABLE embedline.signal (
    pipeline text NOT NULL,
    due_at timestamp with time zone DEFAULT now() NOT NULL
) WITH (autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=2000, vacuum_truncate=false);

CREATE TABLE embedline.spending_cap (
    spending_cap_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint,
    model_id bigint,
    period text NOT NULL,
    unit text NOT NULL,
    amount numeric NOT NULL,
    set_by text NOT NULL,
    set_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT spending_cap_amount_check CHECK ((amount >= (0)::numeric)),
    CONSTRAINT spending_cap_model_id_fkey FOREIGN KEY (model_id) REFERENCES embedline.model(model_id) ON DELETE CASCADE,
    CONSTRAINT spending_cap_period_check CHECK ((period = ANY (ARRAY['day'::text, 'month'::text]))),
    CONSTRAINT spending_cap_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT spending_cap_pkey PRIMARY KEY (spending_cap_id),
    CONSTRAINT spending_cap_scope_check CHECK ((num_nonnulls(pipeline_id, model_id) = 1)),
    CONSTRAINT spending_cap_scope_period_unit_key UNIQUE NULLS NOT DISTINCT (pipeline_id, model_id, period, unit),
    CONSTRAINT spending_cap_unit_check CHECK ((unit = ANY (ARRAY['tokens'::text, 'money'::text])))
);

CREATE VIEW embedline.status (
    pipeline text,
    source text,
    model text,
    state text,
    pending bigint,
    backfill_done bigint,
    backfill_total bigint,
    backfill_complete boolean,
    oldest_pending_age interval,
    dead_letters bigint,
    last_error text,
    last_error_at timestamp with time zone,
    workers_alive bigint,
    index_state text,
    batch_rows integer,
    held_back_by text,
    verified_at timestamp with time zone,
    unrepaired bigint,
    backfill_percent numeric,
    ef_search integer,
    index_recall real,
    remedy text,
    request_items integer,
    probes integer,
    in_batches bigint
);

CREATE VIEW embedline.throughput (
    hour timestamp with time zone,
    pipeline text,
    version integer,
    batches bigint,
    rows bigint,
    embedded bigint,
    retried bigint,
    dead bigint,
    chunks bigint,
    requests bigint,
    tokens bigint,
    content_bytes bigint,
    claim_seconds double precision,
    read_seconds double precision,
    chunk_seconds double precision,
    embed_seconds double precision,
    write_seconds double precision
);

CREATE TABLE embedline.traffic (
    pipeline_id bigint NOT NULL,
    version_id bigint NOT NULL,
    share double precision NOT NULL,
    shadow_share double precision NOT NULL,
    CONSTRAINT traffic_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT traffic_pkey PRIMARY KEY (pipeline_id),
    CONSTRAINT traffic_shadow_share_check CHECK (((shadow_share >= (0)::double precision) AND (shadow_share <= (1)::double precision))),
    CONSTRAINT traffic_share_check CHECK (((share >= (0)::double precision) AND (share <= (1)::double precision))),
    CONSTRAINT traffic_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.traffic_tenant (
    pipeline_id bigint NOT NULL,
    tenant text NOT NULL,
    version_id bigint NOT NULL,
    CONSTRAINT traffic_tenant_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT traffic_tenant_pkey PRIMARY KEY (pipeline_id, tenant),
    CONSTRAINT traffic_tenant_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.training (
    training_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
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
    trained_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT training_model_id_fkey FOREIGN KEY (model_id) REFERENCES embedline.model(model_id) ON DELETE CASCADE,
    CONSTRAINT training_model_id_key UNIQUE (model_id),
    CONSTRAINT training_outcome_check CHECK ((outcome = ANY (ARRAY['gain'::text, 'inconclusive'::text, 'loss'::text]))),
    CONSTRAINT training_pkey PRIMARY KEY (training_id)
);

CREATE TABLE embedline.training_pair (
    training_id bigint NOT NULL,
    "position" integer NOT NULL,
    query text NOT NULL,
    query_hash text NOT NULL,
    key text NOT NULL,
    grade double precision NOT NULL,
    source text,
    at timestamp with time zone,
    is_held_out boolean NOT NULL,
    CONSTRAINT training_pair_pkey PRIMARY KEY (training_id, "position"),
    CONSTRAINT training_pair_training_id_fkey FOREIGN KEY (training_id) REFERENCES embedline.training(training_id) ON DELETE CASCADE
);

CREATE VIEW embedline.usage (
    day date,
    model text,
    pipeline text,
    requests bigint,
    tokens bigint,
    reserved_tokens bigint,
    money numeric
);

CREATE TABLE embedline.usage_day (
    day date NOT NULL,
    model_id bigint NOT NULL,
    pipeline_id bigint NOT NULL,
    requests bigint NOT NULL,
    tokens bigint NOT NULL,
    money numeric NOT NULL,
    busy_seconds double precision NOT NULL,
    batch_tokens bigint DEFAULT 0 NOT NULL,
    CONSTRAINT usage_day_pkey PRIMARY KEY (day, model_id, pipeline_id)
) WITH (fillfactor=50);

CREATE TABLE embedline.verification (
    verification_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    verified_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    repair boolean DEFAULT false NOT NULL,
    finding_count bigint DEFAULT 0 NOT NULL,
    repaired_count bigint DEFAULT 0 NOT NULL,
    findings jsonb DEFAULT '[]'::jsonb NOT NULL,
    error text,
    CONSTRAINT verification_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT verification_pkey PRIMARY KEY (verification_id)
);

CREATE TABLE embedline.version (
    version_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    pipeline_id bigint NOT NULL,
    number integer NOT NULL,
    model_id bigint NOT NULL,
    dimensions integer NOT NULL,
    column_type text NOT NULL,
    distance text NOT NULL,
    index_method text NOT NULL,
    index_options jsonb DEFAULT '{}'::jsonb NOT NULL,
    state text DEFAULT 'backfilling'::text NOT NULL,
    fingerprint text NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    completed_at timestamp with time zone,
    vectors_valid_from timestamp with time zone,
    chunk_set integer DEFAULT 1 NOT NULL,
    view regclass,
    backfill_order text DEFAULT 'oldest_first'::text NOT NULL,
    backfill_rate integer,
    backfill_due_at timestamp with time zone DEFAULT now() NOT NULL,
    search_precision text,
    last_error text,
    search_mode text DEFAULT 'vector'::text NOT NULL,
    search_mode_reason text,
    CONSTRAINT version_backfill_order_check CHECK ((backfill_order = ANY (ARRAY['oldest_first'::text, 'newest_first'::text]))),
    CONSTRAINT version_backfill_rate_check CHECK ((backfill_rate > 0)),
    CONSTRAINT version_chunk_set_fkey FOREIGN KEY (pipeline_id, chunk_set) REFERENCES embedline.chunk_set(pipeline_id, number) DEFERRABLE INITIALLY DEFERRED,
    CONSTRAINT version_column_type_check CHECK ((column_type = ANY (ARRAY['vector'::text, 'halfvec'::text]))),
    CONSTRAINT version_distance_check CHECK ((distance = ANY (ARRAY['cosine'::text, 'inner_product'::text, 'l2'::text]))),
    CONSTRAINT version_index_method_check CHECK ((index_method = ANY (ARRAY['hnsw'::text, 'ivfflat'::text, 'none'::text]))),
    CONSTRAINT version_model_id_fkey FOREIGN KEY (model_id) REFERENCES embedline.model(model_id),
    CONSTRAINT version_pipeline_id_fkey FOREIGN KEY (pipeline_id) REFERENCES embedline.pipeline(pipeline_id) ON DELETE CASCADE,
    CONSTRAINT version_pipeline_id_number_key UNIQUE (pipeline_id, number),
    CONSTRAINT version_pkey PRIMARY KEY (version_id),
    CONSTRAINT version_search_mode_check CHECK ((search_mode = ANY (ARRAY['vector'::text, 'keyword'::text, 'hybrid'::text]))),
    CONSTRAINT version_state_check CHECK ((state = ANY (ARRAY['backfilling'::text, 'complete'::text])))
);

CREATE TABLE embedline.version_dead_letter (
    version_id bigint NOT NULL,
    chunk_id bigint NOT NULL,
    key jsonb,
    stage text NOT NULL,
    error_code text NOT NULL,
    message text NOT NULL,
    attempts integer NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    accepted_by text,
    CONSTRAINT version_dead_letter_pkey PRIMARY KEY (version_id, chunk_id),
    CONSTRAINT version_dead_letter_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE
);

CREATE TABLE embedline.version_queue (
    queue_id bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
    version_id bigint NOT NULL,
    chunk_ids bigint[],
    first_id bigint,
    end_id bigint,
    attempts smallint DEFAULT 0 NOT NULL,
    crash_count smallint DEFAULT 0 NOT NULL,
    of_backfill boolean DEFAULT false NOT NULL,
    claimed_by integer,
    enqueued_at timestamp with time zone DEFAULT now() NOT NULL,
    not_before timestamp with time zone DEFAULT now() NOT NULL,
    last_error text,
    CONSTRAINT version_queue_pkey PRIMARY KEY (queue_id),
    CONSTRAINT version_queue_version_id_fkey FOREIGN KEY (version_id) REFERENCES embedline.version(version_id) ON DELETE CASCADE,
    CONSTRAINT version_queue_work_check CHECK (((chunk_ids IS NULL) = ((first_id IS NOT NULL) AND (end_id IS NOT NULL))))
) WITH (fillfactor=70, autovacuum_vacuum_scale_factor=0, autovacuum_vacuum_threshold=2000, autovacuum_analyze_scale_factor=0, autovacuum_analyze_threshold=2000);

CREATE VIEW embedline.versions (
    pipeline text,
    version integer,
    model text,
    state text,
    serving boolean,
    chunks bigint,
    vectors bigint,
    missing bigint,
    queued bigint,
    dead_letters bigint,
    accepted bigint,
    index_state text,
    rollback_until timestamp with time zone,
    last_error text,
    gate text,
    ef_search integer,
    index_recall real,
    probes integer,
    trained_from text,
    pairs_hash text,
    in_batches bigint
);

CREATE TABLE embedline.worker (
    worker_id integer NOT NULL,
    slot integer,
    pid integer NOT NULL,
    stop_requested boolean DEFAULT false NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    batch_rows integer,
    requests_in_flight integer,
    claim_seconds real,
    embed_seconds real,
    write_seconds real,
    held_back_by text,
    reported_at timestamp with time zone,
    commit_seconds real,
    login text,
    CONSTRAINT worker_pkey PRIMARY KEY (worker_id)
);

CREATE INDEX backfill_range_open_idx ON embedline.backfill_range USING btree (pipeline_id, range_id) WHERE (NOT done);

CREATE INDEX cutover_pipeline_id_idx ON embedline.cutover USING btree (pipeline_id, cutover_id);

CREATE INDEX derived_pipeline_id_idx ON embedline.derived USING btree (pipeline_id);

CREATE INDEX evaluation_version_id_evaluated_at_idx ON embedline.evaluation USING btree (version_id, evaluated_at);

CREATE INDEX finished_batch_finished_at_idx ON embedline.finished_batch USING btree (finished_at);

CREATE INDEX loan_taken_version_id_idx ON embedline.loan_taken USING btree (version_id);

CREATE INDEX provider_batch_hold_batch_id_idx ON embedline.provider_batch_hold USING btree (batch_id);

CREATE INDEX provider_batch_open_idx ON embedline.provider_batch USING btree (next_at) WHERE (state <> 'done'::text);

CREATE INDEX provider_batch_text_batch_id_idx ON embedline.provider_batch_text USING btree (batch_id, text_id);

CREATE INDEX provider_batch_version_id_idx ON embedline.provider_batch USING btree (version_id, state);

CREATE INDEX quality_check_last_idx ON embedline.quality_check USING btree (pipeline_id, kind, measured_at DESC);

CREATE INDEX quality_check_poor_idx ON embedline.quality_check USING btree (pipeline_id, kind, measured_at DESC) WHERE is_poor;

CREATE INDEX quality_check_version_id_idx ON embedline.quality_check USING btree (version_id);

CREATE INDEX query_sample_asked_at_idx ON embedline.query_sample USING btree (pipeline_id, asked_at);

CREATE INDEX reservation_reserved_at_idx ON embedline.reservation USING btree (reserved_at);

CREATE INDEX shadow_read_version_id_read_at_idx ON embedline.shadow_read USING btree (version_id, read_at);

CREATE INDEX training_pair_query_hash_idx ON embedline.training_pair USING btree (training_id, query_hash);

CREATE INDEX verification_pipeline_id_verified_at_idx ON embedline.verification USING btree (pipeline_id, verified_at);

CREATE INDEX version_backfilling_idx ON embedline.version USING btree (pipeline_id) WHERE (state = 'backfilling'::text);

CREATE INDEX version_queue_version_id_not_before_idx ON embedline.version_queue USING btree (version_id, not_before, queue_id);

CREATE UNIQUE INDEX dead_letter_pipeline_id_key_digest_idx ON embedline.dead_letter USING btree (pipeline_id, sha256((replace((key)::text, '\'::text, '\\'::text))::bytea));

CREATE EVENT TRIGGER embedline_build_settings ON ddl_command_start WHEN TAG IN (CREATE INDEX) EXECUTE FUNCTION embedline._on_create_index();

CREATE EVENT TRIGGER embedline_follow_source ON ddl_command_end WHEN TAG IN (ALTER TABLE, ALTER TYPE, ALTER DOMAIN, ALTER SCHEMA, ALTER EXTENSION) EXECUTE FUNCTION embedline._on_alter_table();

CREATE EVENT TRIGGER embedline_resolve_attributes ON ddl_command_start WHEN TAG IN (ALTER TABLE, ALTER TYPE) EXECUTE FUNCTION embedline._on_before_alter();

CREATE FUNCTION embedline._alert_conditions()
RETURNS TABLE(severity text, alert text, subject text, since timestamp with time zone, message text, remedy text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._derived_counts(derived_name text)
RETURNS TABLE(subjects bigint, waiting bigint, oldest_enqueued_at timestamp with time zone)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._embed_chunkings(pipeline_name text, specs jsonb, chunk_ids bigint[], contents text[], is_cut_only boolean)
RETURNS TABLE(spec integer, document integer, chunk_start integer, chunk_end integer, tokens integer, vector bytea)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._embed_chunks(pipeline_name text, model text, chunk_ids bigint[])
RETURNS TABLE(chunk_id bigint, vector bytea)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._follow_source(pipeline_name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._gate(wanted_version_id bigint)
RETURNS TABLE(evaluation_id bigint, verdict text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._index_alerts()
RETURNS TABLE(severity text, alert text, subject text, since timestamp with time zone, message text, remedy text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._index_plan(pipeline_name text, version_number integer, precision_name text, parallel_workers integer)
RETURNS jsonb
LANGUAGE plpython3u STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._index_state(index_name text)
RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._is_type(given regtype, wanted regtype)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._job_troubles()
RETURNS TABLE(jobs text, trouble text, remedy text)
LANGUAGE plpython3u STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._measured_rates()
RETURNS TABLE(model_id bigint, tokens_per_second double precision, origin text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._nightly_step(step text, pipeline_name text, repair boolean, message text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline._note_alerts()
RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._note_query(pipeline_id bigint, query text)
RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET lock_timeout=1ms;

CREATE FUNCTION embedline._note_rate(model_name text, tokens_per_second double precision)
RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._note_shadow_read(shadow_version_id bigint, k integer, overlap double precision, serving_seconds double precision, shadow_seconds double precision)
RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._on_alter_table()
RETURNS event_trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._on_before_alter()
RETURNS event_trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._on_create_index()
RETURNS event_trigger
LANGUAGE plpgsql VOLATILE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._pipeline_counts(pipeline_name text)
RETURNS TABLE(pending bigint, oldest_enqueued_at timestamp with time zone, last_row_error text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET synchronize_seqscans=off;

CREATE FUNCTION embedline._progress()
RETURNS TABLE(pipeline text, version integer, task text, phase text, done bigint, total bigint, unit text, percent numeric, rate numeric, tokens bigint, money numeric)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._provider_alerts()
RETURNS TABLE(severity text, alert text, subject text, since timestamp with time zone, message text, remedy text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._purge_loans()
RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._purge_quality()
RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._purge_query_samples()
RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._put_back(source_number bigint)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off
SET standard_conforming_strings=on;

CREATE FUNCTION embedline._quality_alerts()
RETURNS TABLE(severity text, alert text, subject text, since timestamp with time zone, message text, remedy text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._quality_step(pipeline_name text, is_last boolean)
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex
SET plan_cache_mode=force_generic_plan
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1;

CREATE FUNCTION embedline._record_training(model_name text, training jsonb, pairs jsonb)
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._regenerate_pipelines()
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off
SET standard_conforming_strings=on;

CREATE FUNCTION embedline._reserve_rerank(model_name text, pipeline_id bigint, amount bigint, OUT reservation_id bigint, OUT wait_seconds double precision, OUT reason text)
RETURNS record
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._resolve_attributes()
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._roll_up_usage()
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._server_alerts()
RETURNS TABLE(severity text, alert text, subject text, since timestamp with time zone, message text, remedy text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._server_facts()
RETURNS TABLE(disk_free_bytes bigint, disk_bytes bigint, memory_bytes bigint, package_version text, scheduled_workers bigint)
LANGUAGE plpython3u STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._settle_rerank(reservation_id bigint, amount bigint)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._shown_error(message text)
RETURNS text
LANGUAGE sql STABLE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._signal_work()
RETURNS trigger
LANGUAGE plpgsql VOLATILE;

CREATE FUNCTION embedline._source_trouble(pipeline_number bigint)
RETURNS TABLE(state text, message text, remedy text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._store_canaries(pipeline_name text, queries jsonb)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._take_away(source regclass)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off
SET standard_conforming_strings=on;

CREATE FUNCTION embedline._version_counts(pipeline_name text, version_number integer, set_number integer, counted_version_id bigint)
RETURNS TABLE(chunks bigint, vectors bigint, dead_letters bigint, accepted bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._work_alerts()
RETURNS TABLE(severity text, alert text, subject text, since timestamp with time zone, message text, remedy text)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline._work_done(pipeline_name text)
RETURNS TABLE(documents bigint, pending bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline._worker_step(step text, slot integer, pipeline_name text, message text)
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline._workers_alive()
RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.accept_dead_letters(pipeline_name text, version_number integer)
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.accept_quality(pipeline_name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.add_embedding_version(pipeline_name text, model text, column_type text DEFAULT NULL::text, distance text DEFAULT NULL::text, index_method text DEFAULT NULL::text, index_options jsonb DEFAULT NULL::jsonb, chunking text DEFAULT NULL::text, chunk_tokens integer DEFAULT NULL::integer, chunk_overlap integer DEFAULT NULL::integer, chunking_options jsonb DEFAULT NULL::jsonb, backfill_order text DEFAULT 'oldest_first'::text, backfill_rate integer DEFAULT NULL::integer)
RETURNS integer
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.add_loan(pipeline_name text, version integer, content_hashes uuid[], vectors bytea[])
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.add_precision_index(pipeline_name text, version_number integer, kind text, dimensions integer DEFAULT NULL::integer, oversampling real DEFAULT 4)
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.alter_model(name text, base_url text DEFAULT NULL::text, api_key_env text DEFAULT NULL::text, concurrency integer DEFAULT NULL::integer, max_batch_items integer DEFAULT NULL::integer, max_batch_tokens integer DEFAULT NULL::integer, timeout_seconds double precision DEFAULT NULL::double precision, options jsonb DEFAULT NULL::jsonb, price_per_million_tokens numeric DEFAULT NULL::numeric, model text DEFAULT NULL::text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.alter_pipeline(name text, content text DEFAULT NULL::text, filter text DEFAULT NULL::text, document_prefix text DEFAULT NULL::text, tenant text DEFAULT NULL::text, chunking text DEFAULT NULL::text, chunk_tokens integer DEFAULT NULL::integer, chunk_overlap integer DEFAULT NULL::integer, chunking_options jsonb DEFAULT NULL::jsonb, weight double precision DEFAULT NULL::double precision, keyword text DEFAULT NULL::text, drop text[] DEFAULT '{}'::text[], caption text DEFAULT NULL::text, changed_by text DEFAULT NULL::text, expression_search_path text DEFAULT current_setting('search_path'::text))
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off
SET standard_conforming_strings=on;

CREATE FUNCTION embedline.alter_source(source regclass, statement text)
RETURNS void
LANGUAGE plpgsql VOLATILE;

CREATE FUNCTION embedline.build_vector_index(pipeline_name text, version_number integer DEFAULT NULL::integer)
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.check_quality(pipeline_name text DEFAULT NULL::text, only_due boolean DEFAULT false)
RETURNS TABLE(pipeline text, kind text, value double precision, low double precision, high double precision, baseline double precision, queries integer, verdict text, detail text)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex
SET plan_cache_mode=force_generic_plan
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1;

CREATE FUNCTION embedline.check_vectors(pipeline_name text, version integer, texts text[], vectors bytea[])
RETURNS TABLE(compared integer, of_another_model integer, lowest_cosine double precision, required_cosine double precision)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.claim_batch(pipeline_name text, version integer DEFAULT NULL::integer, max_rows integer DEFAULT NULL::integer, max_tokens integer DEFAULT NULL::integer, max_requests integer DEFAULT NULL::integer)
RETURNS TABLE(state text, claim bigint, fence integer, texts text[])
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline.collect_pairs(pipeline_name text, pairs regclass, query_count integer DEFAULT 1000, reranker text DEFAULT NULL::text)
RETURNS TABLE(outcome text, queries integer)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1;

CREATE FUNCTION embedline.compare_chunkings(pipeline_name text, specs jsonb, canaries regclass, k integer DEFAULT 5, sample_rows integer DEFAULT 1000, seed bigint DEFAULT 0, estimate_only boolean DEFAULT false)
RETURNS TABLE(chunking text, recall double precision, difference double precision, low double precision, high double precision, chunks integer, mean_tokens double precision, mean_characters double precision, tokens bigint, money numeric, detail text)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline.compare_costs(pipeline_or_table text, hosted_model text DEFAULT NULL::text, own_model text DEFAULT NULL::text, machine_price_per_hour numeric DEFAULT NULL::numeric, documents_per_day numeric DEFAULT 0, bulk_share numeric DEFAULT 0, batch_discount numeric DEFAULT 0, queries_per_second numeric DEFAULT 0, tokens_per_query numeric DEFAULT 16, search_milliseconds numeric DEFAULT NULL::numeric, storage_price_per_gigabyte numeric DEFAULT NULL::numeric, price_per_million_tokens numeric DEFAULT NULL::numeric, own_tokens_per_second numeric DEFAULT NULL::numeric, content text DEFAULT NULL::text, sample_rows integer DEFAULT 1000, expression_search_path text DEFAULT current_setting('search_path'::text))
RETURNS TABLE(way text, figure text, value numeric, low numeric, high numeric, unit text, note text)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off;

CREATE FUNCTION embedline.configure(setting text, value double precision DEFAULT NULL::double precision)
RETURNS double precision
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.configure(setting text, value text)
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.configure_backfill(pipeline_name text, version_number integer, backfill_order text DEFAULT NULL::text, backfill_rate integer DEFAULT NULL::integer)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.configure_bulk(pipeline_name text, bulk_rows integer DEFAULT NULL::integer, window_start time without time zone DEFAULT NULL::time without time zone, window_end time without time zone DEFAULT NULL::time without time zone)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.create_derived(name text, pipeline text, events regclass, subject text, item_key text, weight text DEFAULT NULL::text, at text DEFAULT NULL::text, half_life interval DEFAULT NULL::interval, expression_search_path text DEFAULT current_setting('search_path'::text))
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off
SET standard_conforming_strings=on;

CREATE FUNCTION embedline.create_model(name text, provider text, model text, dimensions integer DEFAULT NULL::integer, base_url text DEFAULT NULL::text, api_key_env text DEFAULT NULL::text, revision text DEFAULT NULL::text, document_prefix text DEFAULT ''::text, query_prefix text DEFAULT ''::text, max_batch_items integer DEFAULT 2048, max_batch_tokens integer DEFAULT 300000, concurrency integer DEFAULT 8, timeout_seconds double precision DEFAULT 60, options jsonb DEFAULT '{}'::jsonb, price_per_million_tokens numeric DEFAULT NULL::numeric, task text DEFAULT 'embed'::text)
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.create_pipeline(name text, source regclass, content text, model text, filter text DEFAULT NULL::text, chunking text DEFAULT NULL::text, chunk_tokens integer DEFAULT NULL::integer, chunk_overlap integer DEFAULT 0, column_type text DEFAULT 'vector'::text, distance text DEFAULT 'cosine'::text, index_method text DEFAULT 'hnsw'::text, index_options jsonb DEFAULT '{}'::jsonb, capture text DEFAULT 'auto'::text, document_prefix text DEFAULT NULL::text, tenant text DEFAULT NULL::text, weight double precision DEFAULT 1, chunking_options jsonb DEFAULT '{}'::jsonb, keyword text DEFAULT NULL::text, modality text DEFAULT 'text'::text, caption text DEFAULT NULL::text, changed_by text DEFAULT NULL::text, expression_search_path text DEFAULT current_setting('search_path'::text))
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off
SET standard_conforming_strings=on;

CREATE FUNCTION embedline.cutover(pipeline_name text, version_number integer, override_reason text DEFAULT NULL::text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline.doctor()
RETURNS TABLE(severity text, finding text, subject text, message text, remedy text)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.drop_budget(pipeline text DEFAULT NULL::text, model text DEFAULT NULL::text, period text DEFAULT NULL::text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.drop_derived(name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.drop_embedding_version(pipeline_name text, version_number integer, rollback_window interval DEFAULT NULL::interval)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.drop_model(name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.drop_pipeline(name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.drop_precision_index(pipeline_name text, version_number integer, name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.drop_publication(pipeline_name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.embed_pending(max_rows integer DEFAULT 1000, pipeline_name text DEFAULT NULL::text)
RETURNS integer
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline.embed_query(pipeline_name text, query bytea)
RETURNS public.vector
LANGUAGE plpython3u STABLE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.embed_query(pipeline_name text, query text)
RETURNS public.vector
LANGUAGE plpython3u STABLE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.end_loan(pipeline_name text, version integer DEFAULT NULL::integer)
RETURNS TABLE(lent bigint, taken bigint, chunks bigint, lent_chunks bigint)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.estimate(pipeline_or_table text, model text DEFAULT NULL::text, content text DEFAULT NULL::text, sample_rows integer DEFAULT 1000, expression_search_path text DEFAULT current_setting('search_path'::text))
RETURNS TABLE(figure text, value numeric, low numeric, high numeric, unit text, note text)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off;

CREATE FUNCTION embedline.evaluate(pipeline_name text, version_number integer, canaries regclass DEFAULT NULL::regclass, k integer DEFAULT 10, margin double precision DEFAULT 0.01, query_count integer DEFAULT 500, breakdown name DEFAULT NULL::name, seed bigint DEFAULT 0, min_recall double precision DEFAULT 0.9, mode text DEFAULT NULL::text)
RETURNS TABLE(measure text, old double precision, new double precision, difference double precision, low double precision, high double precision, verdict text, detail text)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1
SET enable_seqscan=on
SET enable_sort=on
SET enable_nestloop=on
SET enable_indexscan=on;

CREATE FUNCTION embedline.evaluation_progress(pipeline_name text DEFAULT NULL::text)
RETURNS TABLE(pid integer, task text, pipeline text, version integer, step text, percent double precision, seconds double precision)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.fail_batch(claim bigint, fence integer, failure text, detail text DEFAULT NULL::text, retry_after double precision DEFAULT NULL::double precision)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline.finish_batch(claim bigint, fence integer, vectors bytea, tokens bigint DEFAULT NULL::bigint)
RETURNS integer
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline.grant_remote(pipeline_name text, role_name name, is_exclusive boolean DEFAULT false)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.index_progress(pipeline_name text DEFAULT NULL::text)
RETURNS TABLE(pipeline text, version integer, name text, state text, phase text, percent double precision, bytes bigint)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.index_statement(pipeline_name text, version_number integer DEFAULT NULL::integer, precision_name text DEFAULT NULL::text)
RETURNS text
LANGUAGE plpython3u STABLE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.metrics()
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline.move_pipeline(name text, new_source regclass)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off
SET standard_conforming_strings=on;

CREATE FUNCTION embedline.pause_pipeline(name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.preview_version(pipeline_name text, model text, canaries regclass DEFAULT NULL::regclass, sample integer DEFAULT 3000, k integer DEFAULT 10, margin double precision DEFAULT 0.01, query_count integer DEFAULT 500, seed bigint DEFAULT 0)
RETURNS TABLE(measure text, old double precision, new double precision, difference double precision, low double precision, high double precision, verdict text, detail text)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION embedline.publication(pipeline_name text, with_source boolean DEFAULT NULL::boolean, source_filter text DEFAULT NULL::text, tables_created boolean DEFAULT false, subscriber_role text DEFAULT NULL::text)
RETURNS TABLE(publication text, published_table text, is_new boolean)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.purge_dead_letters(older_than interval DEFAULT NULL::interval)
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET IntervalStyle=postgres;

CREATE FUNCTION embedline.query_hash(query text)
RETURNS text
LANGUAGE plpython3u IMMUTABLE STRICT
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.refresh_pipeline(name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.release_batches()
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline.remote_model(pipeline_name text, version integer DEFAULT NULL::integer)
RETURNS jsonb
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.requeue(pipeline text, key jsonb DEFAULT NULL::jsonb, error_code text DEFAULT NULL::text, include_embedded boolean DEFAULT false)
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline.requeue_version(pipeline_name text, version_number integer)
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.rerank(model text, query text, texts text[])
RETURNS double precision[]
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.resume_model(name text)
RETURNS bigint
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.resume_pipeline(name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.revoke_remote(pipeline_name text, role_name name)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.rollback(pipeline_name text)
RETURNS integer
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE PROCEDURE embedline.run_nightly(IN repair boolean DEFAULT true)
LANGUAGE plpython3u;

CREATE PROCEDURE embedline.run_worker(IN max_seconds double precision DEFAULT 1200, IN pipeline_name text DEFAULT NULL::text, IN slot integer DEFAULT NULL::integer, IN until_idle boolean DEFAULT false)
LANGUAGE plpython3u;

CREATE FUNCTION embedline.sample_chunks(pipeline_name text, sample_rows integer DEFAULT 1000)
RETURNS TABLE(chunk text, prefix text)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET quote_all_identifiers=off;

CREATE FUNCTION embedline.sample_queries(pipeline_name text, share double precision, retention interval DEFAULT '7 days'::interval)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.schedule_nightly(at time without time zone DEFAULT '03:30:00'::time without time zone, repair boolean DEFAULT true)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.schedule_workers(count integer DEFAULT 1)
RETURNS integer
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.search(pipeline_name text, query bytea, k integer DEFAULT 10, per_document boolean DEFAULT false, ef_search integer DEFAULT NULL::integer, tenant text DEFAULT NULL::text, session_key text DEFAULT NULL::text, mode text DEFAULT NULL::text, filter text DEFAULT NULL::text, explain boolean DEFAULT false, filter_search_path text DEFAULT current_setting('search_path'::text))
RETURNS TABLE(key text, chunk text, score double precision, semantic_rank integer, keyword_rank integer, chunk_start integer, chunk_end integer)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET plan_cache_mode=force_generic_plan
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1;

CREATE FUNCTION embedline.search(pipeline_name text, query text, k integer DEFAULT 10, per_document boolean DEFAULT false, ef_search integer DEFAULT NULL::integer, tenant text DEFAULT NULL::text, session_key text DEFAULT NULL::text, mode text DEFAULT NULL::text, semantic_weight double precision DEFAULT 1, keyword_weight double precision DEFAULT 1, rrf_k integer DEFAULT 60, window_size integer DEFAULT NULL::integer, reranker text DEFAULT NULL::text, filter text DEFAULT NULL::text, explain boolean DEFAULT false, filter_search_path text DEFAULT current_setting('search_path'::text))
RETURNS TABLE(key text, chunk text, score double precision, semantic_rank integer, keyword_rank integer, chunk_start integer, chunk_end integer)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET plan_cache_mode=force_generic_plan
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1;

CREATE FUNCTION embedline.search_across(pipeline_names text[], query bytea, k integer DEFAULT 10, per_document boolean DEFAULT false)
RETURNS TABLE(pipeline text, key text, chunk text, score double precision, chunk_start integer, chunk_end integer)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET plan_cache_mode=force_generic_plan
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1;

CREATE FUNCTION embedline.search_across(pipeline_names text[], query text, k integer DEFAULT 10, per_document boolean DEFAULT false)
RETURNS TABLE(pipeline text, key text, chunk text, score double precision, chunk_start integer, chunk_end integer)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET plan_cache_mode=force_generic_plan
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40
SET ivfflat.iterative_scan=relaxed_order
SET ivfflat.probes=1;

CREATE FUNCTION embedline.search_derived(name text, subject text, k integer DEFAULT 10, leave_out_seen boolean DEFAULT false, per_document boolean DEFAULT true)
RETURNS TABLE(key text, chunk text, score double precision, chunk_start integer, chunk_end integer)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET plan_cache_mode=force_generic_plan
SET hnsw.iterative_scan=strict_order
SET hnsw.ef_search=40;

CREATE FUNCTION embedline.set_budget(period text, pipeline text DEFAULT NULL::text, model text DEFAULT NULL::text, tokens bigint DEFAULT NULL::bigint, money numeric DEFAULT NULL::numeric)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.set_canaries(pipeline_name text, canaries regclass)
RETURNS integer
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.set_price(model text, price_per_million_tokens numeric)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.set_rate_limit(model text, requests_per_minute integer DEFAULT NULL::integer, tokens_per_minute bigint DEFAULT NULL::bigint)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.set_tenant_version(pipeline_name text, tenant text, version_number integer)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.set_traffic(pipeline_name text, version_number integer, share double precision DEFAULT 0, shadow_share double precision DEFAULT 0)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.state(pipeline_name text, key text, version integer DEFAULT NULL::integer)
RETURNS TABLE(state text, since timestamp with time zone, reason text)
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp
SET jit=off
SET extra_float_digits=1;

CREATE FUNCTION embedline.subscriber_ddl(pipeline_name text, with_source boolean DEFAULT NULL::boolean, reader text DEFAULT NULL::text)
RETURNS text
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.unschedule_workers()
RETURNS integer
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.use_mode(pipeline_name text, mode text, version_number integer DEFAULT NULL::integer, override_reason text DEFAULT NULL::text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.use_precision(pipeline_name text, version_number integer, name text)
RETURNS void
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline.verify(pipeline text, repair boolean DEFAULT false, sample integer DEFAULT 20)
RETURNS TABLE(finding text, count bigint, repaired bigint, example jsonb)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off
SET extra_float_digits=1
SET DateStyle=ISO
SET TimeZone=UTC
SET IntervalStyle=postgres
SET bytea_output=hex;

CREATE FUNCTION embedline_data._hold_postings(segment_ids bigint[], words bigint[], chunk_counts integer[], total_lengths bigint[], heads bytea[], postings bytea[], counts bytea[])
RETURNS bigint
LANGUAGE plpython3u VOLATILE
SET search_path=pg_catalog, pg_temp;

CREATE FUNCTION embedline_data._row_state(pipeline_name text, version_number integer, key_texts text[])
RETURNS TABLE(state text, since timestamp with time zone, reason text)
LANGUAGE plpython3u VOLATILE SECURITY DEFINER
SET search_path=pg_catalog, pg_temp
SET jit=off;

CREATE FUNCTION public.embed_pending(max_rows integer DEFAULT 1000, pipeline_name text DEFAULT NULL::text)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path=pg_catalog, pg_temp;
